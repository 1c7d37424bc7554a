"""Photometric distortion with the published ranges and probabilities."""

import math
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from danet.data.resize import copy_whole

_PIECE = 1 << 15
"""Pixels processed together: few enough to stay in the cache across all steps."""


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each with probability 1/2, on images only.

    As mmsegmentation draws them: brightness adds up to 32, contrast multiplies by 0.5..1.5 before
    or after the colours, saturation multiplies HSV's S by 0.5..1.5, hue turns by up to 36 degrees.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        draws = torch.rand(9).tolist()

        def uniform(chance: float, draw: float, low: float, high: float) -> float | None:
            return low + (high - low) * draw if chance < 0.5 else None

        return {
            "brightness": uniform(draws[0], draws[1], -32.0, 32.0),
            "contrast": uniform(draws[2], draws[3], 0.5, 1.5),
            "saturation": uniform(draws[4], draws[5], 0.5, 1.5),
            "hue": uniform(draws[6], draws[7], -0.1, 0.1),
            "contrast_first": draws[8] < 0.5,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        names = ("brightness", "contrast", "saturation", "hue")
        if not isinstance(inpt, tv_tensors.Image) or all(params[name] is None for name in names):
            return inpt
        pixels = inpt.as_subclass(Tensor).flatten(1)
        distorted = torch.empty(pixels.shape, dtype=torch.uint8)
        for start in range(0, pixels.shape[1], _PIECE):
            part = slice(start, start + _PIECE)
            copy_whole(_distort(pixels[:, part].float(), params), distorted[:, part])
        return tv_tensors.Image(distorted.view(inpt.shape))


def _distort(rgb: Tensor, params: dict[str, Any]) -> Tensor:
    """Distorts float 3 P pixels (whole values, 0..255) in place; each step yields whole values."""
    if params["brightness"] is not None:
        # Whole values: the sum's whole part is the sum with the addend's.
        rgb.add_(math.floor(params["brightness"])).clamp_(0, 255)
    if params["contrast"] is not None and params["contrast_first"]:
        _scale_contrast(rgb, params["contrast"])
    if params["saturation"] is not None:
        _scale_saturation(rgb, params["saturation"])
    if params["hue"] is not None:
        _turn_hue(rgb, params["hue"])
    if params["contrast"] is not None and not params["contrast_first"]:
        _scale_contrast(rgb, params["contrast"])
    return rgb


def _scale_contrast(rgb: Tensor, factor: float) -> None:
    rgb.mul_(factor).clamp_(max=255).floor_()


def _scale_saturation(rgb: Tensor, factor: float) -> None:
    """Scales HSV saturation, clamped to 1, at constant hue and value: moves RGB along V - RGB."""
    least, value = _extremes(rgb)
    chroma = torch.sub(value, least, out=least)
    factors = torch.div(value, chroma.clamp_(min=1e-6), out=chroma).clamp_(max=factor)
    torch.sub(value, rgb, out=rgb)
    torch.addcmul(value, rgb, factors, value=-1, out=rgb)
    # Rounding can put the minimum of a fully saturated colour below 0. (trunc_ is not vectorised.)
    rgb.clamp_(min=0).floor_()


def _turn_hue(rgb: Tensor, turn: float) -> None:
    """Adds `turn` (1 is a full circle) to the HSV hue at constant saturation and value.

    The hexagon model: with the hue in sixths of a turn, each channel goes from the least to the
    largest of the three as a trapezoid of the hue. Here the hue is 0 at cyan, the opposite of red,
    positive towards blue and at most 3. With red's share r of the chroma above the least and blue's
    lead d over green, both in chromas, it is d + sign(d) (3 r - 2 min(r, |d|)) in every sixth, for
    r is 0, or 1, or d is -1 or 1. (Telling the sixths apart by `torch.where` takes far longer.)
    """
    least, value = _extremes(rgb)
    chroma = value - least
    lead = rgb[2] - rgb[1]
    side = lead.add(0.5).sign_()  # leads are whole, and either sign is right for none
    share, size = rgb[0] - least, lead.abs_()
    hue = torch.minimum(share, size).mul_(-2).add_(share, alpha=3).add_(size).mul_(side)
    hue.div_(torch.clamp(chroma, min=1, out=share)).add_(6 * turn)
    hue.sub_(torch.mul(hue, 1 / 6, out=share).round_(), alpha=6)
    # Red is largest 2 sixths and more away from cyan; green and blue up to 1 sixth away from
    # the hues one sixth before and after it.
    distance = torch.abs(hue, out=side).clamp_(1, 2)
    torch.addcmul(least.sub_(chroma), chroma, distance, out=rgb[0])
    distances = torch.sub(hue, _GREEN_AND_BLUE, out=rgb[1:]).abs_().clamp_(1, 2)
    torch.addcmul(value.add_(chroma), chroma, distances, value=-1, out=rgb[1:])
    rgb.floor_()


_GREEN_AND_BLUE = torch.tensor([[-1.0], [1.0]])


def _extremes(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum over the three channels, each P."""
    red, green, blue = rgb
    least, largest = torch.minimum(red, green), torch.maximum(red, green)
    return torch.minimum(least, blue, out=least), torch.maximum(largest, blue, out=largest)
