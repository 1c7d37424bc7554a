"""The common form that foreign checkpoints are translated to, and the ResNet keys they share."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from danet.errors import UserError
from danet.model_folder import Palette
from danet.palette import Color

BODY = "backbone.body."
_DEPTHS = {6: 50, 23: 101, 36: 152}
"""ResNets by the number of blocks in their third stage."""
_PALETTE = TypeAdapter(Palette)


class Translated(NamedTuple):
    """A foreign checkpoint in this project's terms.

    Attributes:
        state: weights under this project's names, as far as the layout knows them.
        unknown: names that the layout does not know.
        backbone: timm's name of it.
        test: values of `TestConfig`'s keys, as the checkpoint has them and not yet checked.
        classes, palette, mean, std: None where the checkpoint does not say.
        notes: what is done otherwise here.
    """

    state: dict[str, Tensor]
    unknown: list[str]
    backbone: str
    output_stride: int
    multi_grid: tuple[int, ...] | None
    align_corners: bool
    test: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    palette: tuple[Color, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def renamed(
    state: Mapping[str, Tensor], prefixes: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Replaces each name's first fitting prefix, and lists the names that none fits."""
    known, unknown = {}, []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
            continue
        new = prefixes[prefix] + name.removeprefix(prefix)
        # They keep it as one number or as a list of one; what is neither does not fit later on.
        is_residual = new.endswith("residual_weight") and tensor.numel() == 1
        known[new] = tensor.reshape(1) if is_residual else tensor
    return known, unknown


def resnet_name(state: Mapping[str, Tensor]) -> str:
    """timm's name of the ResNet whose weights are in a translated state.

    The depth follows from the blocks of the third stage, the variant from the stem and the
    downsampling: `c` 32-32-64, `s` 64-64-128, `d` 32-32-64 with averaging, none 7x7.

    Raises:
        UserError: no ResNet of a known depth and stem.
    """
    found = (re.match(rf"{re.escape(BODY)}layer3\.(\d+)\.", name) for name in state)
    blocks = {int(match[1]) for match in found if match}
    depth = _DEPTHS.get(len(blocks))
    if depth is None:
        raise UserError(
            f"checkpoint: its backbone has {len(blocks)} blocks in the third stage; "
            "ResNet-50, 101 and 152 can be converted"
        )
    if f"{BODY}conv1.weight" in state:
        return f"resnet{depth}"
    stem = state.get(f"{BODY}conv1.0.weight")
    width = 0 if stem is None or stem.dim() == 0 else stem.shape[0]
    averages = f"{BODY}layer2.0.downsample.2.weight" in state
    variant = {32: "d" if averages else "c", 64: "s"}.get(width)
    if variant is None:
        raise UserError(f"checkpoint: a ResNet stem of {width} channels is unknown")
    return f"resnet{depth}{variant}"


def names_and_colors(
    names: Any, colors: Any
) -> tuple[tuple[str, ...] | None, tuple[Color, ...] | None]:
    """Class names and RGB palette, each None if it is not what it should be."""
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        return None, None
    # Lone surrogates, which a pickle can hold but no text file, become question marks.
    classes = tuple(name.encode("utf-8", "replace").decode() for name in names)
    try:
        palette = _PALETTE.validate_python(colors)
    except ValidationError:
        return classes, None
    return classes, palette if len(palette) == len(classes) else None
