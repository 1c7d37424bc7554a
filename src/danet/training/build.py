"""Builds the network with its initial weights, and its optimizer."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.optim.muon import Muon
from torch import Tensor

from danet.config import RunConfig, TrainConfig
from danet.data.spec import DatasetSpec
from danet.devices import uses_bfloat16
from danet.errors import UserError
from danet.model import DANet
from danet.model_folder import Metadata, locate, misfits, read_folder
from danet.training.activation_checkpointing import checkpoint_backbone
from danet.training.muon import Float32Muon
from danet.training.winograd import use_winograd


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
    """Loads another model's weights, without classifiers of other classes or an auxiliary head
    that only one of both has.

    Raises:
        UserError: the networks differ in more than that.
    """
    stored, state = read_folder(locate(source))
    wanted = model.state_dict()
    left_out = {}
    if stored.metadata.classes != model.metadata.classes:
        left_out["classifier"] = "the classifiers, whose classes differ"
    if stored.model.auxiliary != model.config.auxiliary:
        left_out["auxiliary_head."] = "the auxiliary head, which only one of both has"
    state, wanted = (
        {
            name: tensor
            for name, tensor in tensors.items()
            if not any(part in name for part in left_out)
        }
        for tensors in (state, wanted)
    )
    if problems := misfits(state, wanted):
        raise UserError(
            f"model.init_from: {source} is another network ({len(problems)} tensors do not fit, "
            f"first: {problems[0]}); train with the model settings of its config.json"
        )
    model.load_state_dict(state, strict=False)
    omitted = f", all but {' and '.join(left_out.values())}" if left_out else ""
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
        checkpoint_backbone(model.backbone, early=config.activation_checkpointing == "early")
    device = runs_on or next(model.parameters()).device
    if config.compile:
        model.compile_parts()
    elif device.type == "cpu":
        use_winograd(model)


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
