"""Less memory in training: a backbone's activations are forgotten, and recomputed when needed."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from danet.backbone import Backbone
from danet.convolution import has_hooks
from danet.errors import UserError


def checkpoint_backbone(backbone: Backbone, *, early: bool) -> None:
    """Has the stem and the blocks forget their activations, in place.

    Args:
        early: leave out the last stage.

    Raises:
        UserError: the backbone has no blocks.
    """
    if not backbone.blocks():
        raise UserError(
            "train.activation_checkpointing: the backbone has no blocks whose activations could be "
            "recomputed; set it to false"
        )
    for block in backbone.early_blocks() if early else backbone.blocks():
        checkpoint_activations(block)
    stem = backbone.stem()
    if stem and not any(has_hooks(module) for module in stem[1:]):
        checkpoint_activations(*stem)


def checkpoint_activations(*modules: nn.Module) -> None:
    """Makes modules that follow one another forget what is inside them until the backward pass.

    All are computed where the first is called; the others pass on what they get.
    """
    first, *others = modules
    forwards = [module.forward for module in modules]
    norms = [part for each in modules for part in each.modules() if isinstance(part, _BatchNorm)]

    # Not a function defined here, which a copy of the network would share.
    first.forward = functools.partial(_forget, forwards, norms)
    for module in others:
        module.forward = _unchanged


def _forget(
    forwards: list[Callable[..., Any]], norms: list[_BatchNorm], *inputs: Any, **named: Any
) -> Any:
    compute = functools.partial(_compute, forwards)
    if not torch.is_grad_enabled():
        return compute(*inputs, **named)
    return checkpoint(
        compute,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(norms)),
        **named,
    )


def _compute(forwards: list[Callable[..., Any]], *inputs: Any, **named: Any) -> Any:
    first, *others = forwards
    output = first(*inputs, **named)
    for forward in others:
        output = forward(output)
    return output


def _unchanged(features: Tensor) -> Tensor:
    return features


@contextlib.contextmanager
def _statistics_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms do not take the same batch into their running statistics a second time."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
