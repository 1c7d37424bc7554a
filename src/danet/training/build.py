"""Builds the network with its initial weights, and its optimizer."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from danet.backbone import Backbone
from danet.config import RunConfig, Size, TrainConfig
from danet.convolution import has_hooks
from danet.data.spec import DatasetSpec
from danet.devices import uses_bfloat16
from danet.errors import UserError
from danet.model import DANet, DANetOutput
from danet.model_folder import Metadata, locate, misfits, read_folder
from danet.training.convolution import use_winograd
from danet.training.muon import Float32Muon


def build_model(
    config: RunConfig,
    spec: DatasetSpec,
    resumed: dict[str, Tensor] | None,
    say: Callable[[str], None],
) -> DANet:
    """The recipe's network for a dataset's classes.

    Args:
        resumed: a checkpoint's weights to go on from; the recipe's first weights where None.
        say: is told which of another model's weights were taken.

    Raises:
        UserError: weights cannot be had, or are another network's; class weights do not fit.
    """
    metadata = Metadata(
        classes=spec.classes,
        palette=spec.palette,
        mean=config.data.mean,
        std=config.data.std,
        dataset=spec.name,
        test=config.test,
    )
    require_class_weights(config, spec)
    architecture = config.model
    if resumed is not None or architecture.init_from is not None:
        architecture = architecture.without_backbone_weights()
    torch.manual_seed(config.train.seed)
    model = DANet.from_config(architecture, metadata)
    if resumed is not None:
        try:
            model.load_state_dict(resumed)
        except RuntimeError as error:
            raise UserError(
                "the checkpoint does not fit the recipe's network; resume with the settings in "
                "the run's recipe.yaml"
            ) from error
    elif architecture.init_from is not None:
        _initialize_from(model, architecture.init_from, say)
    elif architecture.pretrained_backbone or architecture.backbone_weights is not None:
        _note_normalization(config, say)
    return model.to(memory_format=torch.channels_last)


def _note_normalization(config: RunConfig, say: Callable[[str], None]) -> None:
    """Says so if timm's weights were trained on pictures of another mean or deviation."""
    backbone, data = config.model.backbone, config.data
    known = timm.get_pretrained_cfg(backbone)
    if known is None:
        return
    theirs = [[round(255 * value, 3) for value in values] for values in (known.mean, known.std)]
    ours = [list(data.mean), list(data.std)]
    if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=0.01):
        say(
            f"note: timm's weights of {backbone} were trained with data.mean={theirs[0]} and "
            f"data.std={theirs[1]}; set these"
        )


def _initialize_from(model: DANet, source: Path, say: Callable[[str], None]) -> None:
    """Loads another model's weights, its classifiers only if it has the same classes.

    Raises:
        UserError: the networks differ in more than their classes.
    """
    stored, state = read_folder(locate(source))
    wanted = model.state_dict()
    same_classes = stored.metadata.classes == model.metadata.classes
    if not same_classes:
        state, wanted = (
            {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
            for tensors in (state, wanted)
        )
    if problems := misfits(state, wanted):
        raise UserError(
            f"model.init_from: {source} is another network ({len(problems)} tensors do not fit, "
            f"first: {problems[0]}); train with the model settings of its config.json"
        )
    model.load_state_dict(state, strict=False)
    omitted = "" if same_classes else ", all but the classifiers, whose classes differ"
    say(f"weights from {source}{omitted}")


def require_class_weights(config: RunConfig, spec: DatasetSpec) -> None:
    """Checks their number.

    Raises:
        UserError: it is not the dataset's number of classes.
    """
    weights = config.train.class_weights
    if weights is not None and len(weights) != spec.num_classes:
        raise UserError(
            f"train.class_weights: {len(weights)} weights, but {spec.name} has "
            f"{spec.num_classes} classes; give one each"
        )


class TooFewValues(UserError):
    """A batch norm has one value per channel, whose variance is none."""


@contextlib.contextmanager
def explaining_batch_norms() -> Iterator[None]:
    """Around a training pass of the network.

    Raises:
        TooFewValues: in place of torch's ValueError.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TooFewValues(
            "batch norm needs more than one value per channel, but this backbone or crop size "
            "leaves it one pixel of a single crop; choose more crops a pass (train.batch_size over "
            "train.accumulate), or larger crops"
        ) from error


def require_enough_values(model: DANet, crop_size: Size) -> None:
    """Checks that one crop can be trained on by itself; computes nothing.

    Raises:
        TooFewValues: it cannot.
    """
    with FakeTensorMode() as fake, explaining_batch_norms():
        _train_without_data(fake, model, 1, crop_size)


def freeze_unreached(model: DANet, crop_size: Size) -> None:
    """Has no gradient asked for where there is none, in place; computes nothing.

    Some backbones, such as HRNet, have layers that only other features than c3 and c4 come from.
    DDP would wait for their gradients. Nothing is changed where shapes follow from values.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with FakeTensorMode() as fake:
        try:
            without_data, output = _train_without_data(fake, model, 2, crop_size)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return
        sums = [logits.sum() for logits in output if logits is not None]
        wanted = [without_data[name] for name in parameters]
        gradients = torch.autograd.grad(sums, wanted, allow_unused=True)
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _train_without_data(
    fake: FakeTensorMode, model: DANet, crops: int, crop_size: Size
) -> tuple[dict[str, Tensor], DANetOutput]:
    """The network's tensors and its logits of a training pass, of which only shapes are known."""
    width, height = crop_size
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    without_data: dict[str, Tensor] = {name: fake.from_tensor(each) for name, each in tensors}
    images = torch.empty(crops, 3, height, width)
    return without_data, functional_call(model.train(), without_data, (images,))


def prepare_for_training(
    model: DANet, config: TrainConfig, runs_on: torch.device | None = None
) -> None:
    """Sets activation checkpointing, compilation and fast convolutions on a CPU, in place.

    To be called when no more copies of the network are made: a copy would share what is set here.

    Args:
        runs_on: the device to train on, if the network is not on it.

    Raises:
        UserError: the backbone has no blocks to checkpoint.
    """
    if config.activation_checkpointing:
        _checkpoint_backbone(model.backbone, early=config.activation_checkpointing == "early")
    device = runs_on or next(model.parameters()).device
    if config.compile:
        model.compile_parts()
    elif device.type == "cpu":
        use_winograd(model)


def _checkpoint_backbone(backbone: Backbone, *, early: bool) -> None:
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

    def compute(*inputs: Any, **named: Any) -> Any:
        output = forwards[0](*inputs, **named)
        for forward in forwards[1:]:
            output = forward(output)
        return output

    def forget(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(*inputs, **named)
        return checkpoint(
            compute,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(norms)),
            **named,
        )

    first.forward = forget
    for module in others:
        module.forward = _unchanged


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


def build_optimizer(model: DANet, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over two groups, backbone and heads.

    Each group's `lr_factor` is what the schedule's learning rate is multiplied by.
    """
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": backbone, "lr_factor": 1.0},
        {"params": heads, "lr_factor": config.head_lr_factor},
    ]
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "muon":
        kind = Muon if uses_bfloat16("auto", backbone[0].device) else Float32Muon
        return kind(groups, lr=lr, weight_decay=decay, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)
    fused = config.strategy != "fsdp"  # which torch's fused SGD does not know
    return torch.optim.SGD(groups, lr=lr, weight_decay=decay, momentum=config.momentum, fused=fused)
