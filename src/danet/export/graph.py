"""The module that is exported: from pictures of any size to their logits.

Shapes: B batch, K classes, H W the picture; D key width, C value width, N queries, M keys.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.layers import padding
from torch import Tensor, nn
from torch.fx.experimental import symbolic_shapes

from danet.attention import PositionAttention
from danet.kernels.fused import attend_spread
from danet.model import DANet
from danet.optimize import fold_batch_norms


class WholePicture(nn.Module):
    """Pictures float32 B 3 H W, RGB in 0..1 -> logits B K H W at their size."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: DANet) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        fold_batch_norms(self.model)
        self.register_buffer("mean", torch.tensor(model.metadata.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.metadata.std).view(3, 1, 1))
        self.scale = model.metadata.test.scale
        self.fit = _fitted
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        own_size = images.shape[-2:]
        pixels = (images * 255 - self.mean) / self.std
        if self.scale is not None:
            pixels = F.interpolate(pixels, size=self.fit(own_size, self.scale), mode="bilinear")
        logits = self.model.predict_logits(pixels)
        if self.scale is not None:
            logits = self.model.upsample(logits, own_size)
        return logits


def _fitted(size: Sequence[int], bounds: tuple[int, int]) -> tuple[int, int]:
    """Height and width by `danet.data.transforms.fitted_size`.

    Integer arithmetic, because the graph evaluates it on symbolic sizes; where exactly half a pixel
    is rounded, floats may round the other way. Fits both orientations of the bounds and keeps the
    larger, which avoids dividing by a maximum: files with such divisions take long to open.
    """
    height, width = size
    low, high = sorted(bounds)

    def fit(side: int, other: int) -> Any:
        lying, standing = ((2 * side * bound + other) // (2 * other) for bound in (high, low))
        return torch.sym_max(
            torch.sym_max(torch.sym_min(lying, low), torch.sym_min(standing, high)), 1
        )

    return fit(height, width), fit(width, height)


@contextmanager
def named_sizes(network: WholePicture) -> Iterator[None]:
    """Has a graph give the fitted size a name, for all sizes after it to refer to.

    Else each spells out the formula, and a torch program takes several times as long to open.
    """

    def fit_and_name(size: Sequence[int], bounds: tuple[int, int]) -> tuple[int, int]:
        height, width = (_named(side, max(bounds)) for side in _fitted(size, bounds))
        return height, width

    with (
        errors_alone(symbolic_shapes.__name__),  # it warns of each answer by an example
        patch.object(network, "fit", fit_and_name),
    ):
        yield


@contextmanager
def errors_alone(logger: str | None) -> Iterator[None]:
    """Has a logger, the root's where None, keep warnings to itself."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _named(side: int, largest: int) -> int:
    """The same number read from a tensor, of which tracing knows nothing but its bounds.

    What else it has to know is answered by the example's number, and asserted in the program.
    """
    number = torch.scalar_tensor(side, dtype=torch.int64).item()
    assert isinstance(number, int | torch.SymInt)
    if isinstance(number, torch.SymInt) and isinstance(side, torch.SymInt):
        answers = number.node.shape_env.set_real_tensor_prop_unbacked_vals
        answers(number.node.expr, side.node.hint)
    torch._check(number >= 1)
    torch._check(number <= largest)
    return number


def _same_padding(side: int, kernel: int, stride: int, dilation: int) -> Any:
    """timm's `get_same_padding` in whole numbers: a graph with its division cannot be saved."""
    steps = (side + stride - 1) // stride
    return torch.sym_max((steps - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)


@contextmanager
def traceable_attention(network: nn.Module, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Has the network attend in this way, which a graph can hold, and timm pad likewise."""
    modules = [module for module in network.modules() if isinstance(module, PositionAttention)]
    with ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(patch.object(module, "attend", attend))
        replaced.enter_context(patch.object(padding, "get_same_padding", _same_padding))
        yield


def attend_by_equal_widths(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    """Position attention by torch's fused attention alone: B C N.

    On every device that takes O(N) memory where all widths are equal.
    """
    return attend_spread(query_BDN, key_BDM, value_BCM, width=query_BDN.shape[1])


@torch.library.custom_op("danet::attend_in_onnx", mutates_args=())
def attend_in_onnx(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    """Position attention, B C N; `danet.export.onnx_attention` is what it becomes."""
    raise NotImplementedError("only exported, never run")


@attend_in_onnx.register_fake
def _(query_BDN: Tensor, _key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    return value_BCM.new_empty(*value_BCM.shape[:2], query_BDN.shape[2])
