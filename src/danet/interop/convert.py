"""From other code bases' checkpoints to a model folder."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from danet.data.spec import DatasetSpec
from danet.errors import UserError
from danet.interop import mmseg, reference
from danet.interop.foreign import read_checkpoint, state_dict_of
from danet.interop.layout import Translated
from danet.model import DANet
from danet.model_folder import MAX_CLASSES, Metadata, misfits
from danet.palette import default_palette
from danet.validation_errors import validation_message

_NAMES_SHOWN = 20


def convert(
    path: Path, spec: DatasetSpec | None = None, say: Callable[[str], None] = lambda _: None
) -> DANet:
    """The network of a checkpoint of mmsegmentation (0.x, 1.x) or of the authors.

    Args:
        spec: the classes, for a checkpoint that does not name them, or to rename its own.
        say: is told what differs from the other code base.

    Raises:
        UserError: unreadable, another network, keys that do not fit, or unknown classes.
    """
    content = read_checkpoint(path)
    state = state_dict_of(content)
    for layout in (mmseg, reference):
        if layout.recognises(state):
            translated = layout.translate(state, content)
            for note in translated.notes:
                say(f"note: {path}: {note}")
            return _build(path, translated, spec)
    first = ", ".join(list(state)[:3]) or "none"
    raise UserError(
        f"{path}: not a DANet of mmsegmentation or of the authors "
        f"({len(state)} tensors, first {first})"
    )


def _build(path: Path, translated: Translated, spec: DatasetSpec | None) -> DANet:
    state = translated.state
    num_classes = _width(path, state, "head.fused_classifier.1.weight")
    head_channels = _width(path, state, "head.position_branch.reduce.0.weight")
    key_channels = _width(path, state, "head.position_branch.attention.query.weight")
    if translated.backbone.endswith("d") and translated.output_stride < 32:
        # timm averages 2x2 pixels in the shortcuts of dilated stages; the others' code does not.
        raise UserError(
            f"{path}: its {translated.backbone} at output stride {translated.output_stride} cannot "
            "be converted: timm's dilated ResNet-D computes something else; only output stride 32 "
            "can"
        )
    build = partial(
        DANet,
        num_classes,
        translated.backbone,
        pretrained_backbone=False,
        head_channels=head_channels,
        key_channels=key_channels,
        output_stride=translated.output_stride,
        multi_grid=translated.multi_grid,
        auxiliary=any(name.startswith("auxiliary_head.") for name in state),
        align_corners=translated.align_corners,
        metadata=_metadata(path, translated, spec, num_classes),
    )
    try:
        # Without memory, of which one tensor of a small file could ask for any amount.
        with torch.device("meta"):
            wanted = build().state_dict()
    except UserError as error:
        raise UserError(f"{path}: its weights do not make a network ({error})") from error
    _require_fit(path, translated, wanted)
    model = build()
    model.load_state_dict(state, strict=False)  # without counters it is whole, too
    return model.eval()


def _width(path: Path, state: Mapping[str, Tensor], name: str) -> int:
    """The output channels of a convolution."""
    if name not in state:
        raise UserError(f"{path}: incomplete, {name} is missing")
    if state[name].dim() == 0:
        raise UserError(f"{path}: {name} is a number, not a convolution's weight")
    return state[name].shape[0]


def _require_fit(path: Path, translated: Translated, wanted: Mapping[str, Tensor]) -> None:
    state = translated.state
    problems = [f"{name} is not known" for name in translated.unknown]
    problems += misfits(state, wanted)
    problems += [
        f"{name} holds nan or infinite numbers"
        for name, tensor in state.items()
        if name in wanted and not tensor.isfinite().all()
    ]
    if problems:
        shown = "; ".join(problems[:_NAMES_SHOWN])
        more = f"; and {len(problems) - _NAMES_SHOWN} more" if len(problems) > _NAMES_SHOWN else ""
        raise UserError(
            f"{path}: {len(problems)} keys do not fit {translated.backbone}: {shown}{more}"
        )


def _metadata(
    path: Path, translated: Translated, spec: DatasetSpec | None, num_classes: int
) -> Metadata:
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UserError(
            f"{path}: has {num_classes} classes; only networks of 1 to {MAX_CLASSES} classes can "
            "be converted, because masks are 8 bit"
        )
    classes = translated.classes if spec is None else spec.classes
    palette = translated.palette if spec is None else spec.palette
    if classes is None:
        classes = Metadata.placeholder(num_classes).classes
    if len(classes) != num_classes:
        raise UserError(
            f"{path}: has {num_classes} classes, but {len(classes)} are named; "
            "give the right dataset with --data NAME"
        )
    values = {
        "classes": classes,
        "palette": palette or default_palette(num_classes),
        "dataset": None if spec is None else spec.name,
        "test": translated.test,
        "mean": translated.mean,
        "std": translated.std,
    }
    try:
        return Metadata.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise UserError(
            f"{path}: its metadata cannot be used ({validation_message(error, Metadata)}); correct "
            "its config, or save the state_dict without metadata and give --data NAME"
        ) from error
