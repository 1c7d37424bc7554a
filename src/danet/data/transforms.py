"""The published augmentation, as torchvision v2 transforms.

Every transform draws from torch's global random generator, which the loader seeds per sample.
The order and the numbers are mmsegmentation's: random scale, class-capped crop, flip, photometric
distortion, normalisation, padding of the image with zeros (the mean) and of the label with 255.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from danet.config import DataConfig, Size
from danet.data.spec import IGNORE_INDEX

CROP_TRIES = 10
_PIECE = 1 << 15


def as_tensors(
    image: Image.Image, label: npt.NDArray[np.uint8]
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """RGB picture and H W ids -> uint8 3 H W and H W."""
    return (
        tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1)),
        tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(label))),
    )


def normalize(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """RGB 3 H W in 0..255, any dtype -> float32 with mean and deviation taken out."""
    normalized: Tensor = TF.normalize(image.float(), list(mean), list(std))
    return normalized


def fitted_size(size: Size, bounds: Size, factor: float = 1.0) -> Size:
    """The size, with the aspect kept, that fits `factor` times the bounds.

    The longer side fits the larger bound and the shorter side the smaller one, whichever is
    tighter (mmsegmentation's keep_ratio rule).

    Args:
        size: width, height of the picture.
        bounds: two sides in any order, scaled by `factor` and cut to whole pixels first.
    """
    low, high = sorted(int(bound * factor) for bound in bounds)
    scale = min(high / max(size), low / min(size))
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return width, height


class RandomScale(v2.Transform):
    """Fits the picture into the base size times a factor drawn uniformly from `scale_range`.

    Images are resized bilinearly without antialiasing (as OpenCV does), labels by the nearest id.
    """

    def __init__(self, base_size: Size | None, scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.base_size = base_size
        self.scale_range = scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        low, high = self.scale_range
        factor = low + (high - low) * torch.rand(()).item()
        width, height = fitted_size((width, height), self.base_size or (width, height), factor)
        return {"size": [height, width]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(TF.resize, inpt, params["size"], antialias=False)


class ClassCappedCrop(v2.Transform):
    """A random crop, drawn again up to 10 times while one class holds too much of it.

    A crop is accepted when it has at least two classes and none covers `class_cap` or more of
    its labelled pixels; the last draw is taken as it is. Pictures smaller than the crop are
    cut only along their longer side.

    Args:
        size: width, height.
    """

    def __init__(self, size: Size, class_cap: float) -> None:
        super().__init__()
        self.size = size
        self.class_cap = class_cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        label = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        box = self._draw(label)
        for _ in range(CROP_TRIES):
            if self.class_cap >= 1 or self._is_varied(label, **box):
                break
            box = self._draw(label)
        return box

    def _draw(self, label: Tensor) -> dict[str, int]:
        height, width = label.shape[-2:]
        crop_width, crop_height = min(self.size[0], width), min(self.size[1], height)
        return {
            "top": int(torch.randint(height - crop_height + 1, ())),
            "left": int(torch.randint(width - crop_width + 1, ())),
            "height": crop_height,
            "width": crop_width,
        }

    def _is_varied(self, label: Tensor, top: int, left: int, height: int, width: int) -> bool:
        crop = label[..., top : top + height, left : left + width].as_subclass(Tensor)
        counts = torch.bincount(crop.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        several = int((counts > 0).sum()) > 1
        return several and bool(counts.max() < self.class_cap * counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(TF.crop, inpt, **params)


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
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = inpt.as_subclass(Tensor).flatten(1)
        # In pieces that stay in the cache, for every step passes over all of them.
        parts = [_distort(part.float(), params) for part in pixels.split(_PIECE, dim=1)]
        return tv_tensors.Image(torch.cat(parts, 1).view(inpt.shape))


def _distort(rgb: Tensor, params: dict[str, Any]) -> Tensor:
    """Float 3 P of whole values, changed in place -> uint8 3 P."""
    if params["brightness"] is not None:
        _round(rgb.add_(params["brightness"]))
    if params["contrast"] is not None and params["contrast_first"]:
        _round(rgb.mul_(params["contrast"]))
    if params["saturation"] is not None:
        _round(_scale_saturation(rgb, params["saturation"]))
    if params["hue"] is not None:
        _round(_turn_hue(rgb, params["hue"]))
    if params["contrast"] is not None and not params["contrast_first"]:
        _round(rgb.mul_(params["contrast"]))
    return rgb.to(torch.uint8)


def _round(pixels: Tensor) -> None:
    """Whole values in 0..255, which the next step starts from; in place."""
    pixels.clamp_(0, 255).floor_()


def _scale_saturation(rgb: Tensor, factor: float) -> Tensor:
    """Scales HSV's saturation, at most to 1, keeping hue and value: moves RGB along V - RGB."""
    value = rgb.amax(0)
    chroma = value - rgb.amin(0)
    factors = (value / chroma.clamp_(min=1e-6)).clamp_(max=factor)
    return torch.sub(value, rgb.sub_(value).neg_().mul_(factors), out=rgb)


def _turn_hue(rgb: Tensor, turn: float) -> Tensor:
    """Adds to HSV's hue (1 is a whole turn), keeping saturation and value; whole values 0..255.

    The hexagon model: with the hue in sixths of a turn, each channel goes from the least to the
    largest of the three as a trapezoid of the hue.
    """
    red, green, blue = rgb
    value, least = rgb.amax(0), rgb.amin(0)
    chroma = value - least
    of_red = green - blue
    of_green = (blue - red).add_(chroma, alpha=2)
    of_blue = (red - green).add_(chroma, alpha=4)
    sixths = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))
    sixths.div_(chroma.clamp(min=1)).add_(6 * turn)
    sixths.sub_(torch.floor(sixths / 6), alpha=6)
    for channel, center, sign, offset in (
        (red, 3, 1, -1),
        (green, 2, -1, 2),
        (blue, 4, -1, 2),
    ):
        share = (sixths - center).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(least, chroma, share, out=channel)
    return rgb


class RandomGamma(v2.Transform):
    """Raises images to a power whose logarithm is uniform between those of 1/2 and 2."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"gamma": 2 ** (2 * torch.rand(()).item() - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return self._call_kernel(TF.adjust_gamma, inpt, **params)


def degradation(probability: float) -> v2.Transform:
    """Gamma, greyscale and blur, each with this probability, on images only."""
    if probability == 0:
        return v2.Identity()
    return v2.Compose(
        [
            v2.RandomApply([RandomGamma()], probability),
            v2.RandomGrayscale(probability),
            v2.RandomApply([v2.GaussianBlur(7, (0.1, 1.5))], probability),
        ]
    )


class NormalizeAndPad(v2.Transform):
    """Normalises the image, then pads right and below to `size` (width, height)."""

    def __init__(self, size: Size, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.size = size
        self.mean = mean
        self.std = std

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        padding = [0, 0, max(self.size[0] - width, 0), max(self.size[1] - height, 0)]
        if isinstance(inpt, tv_tensors.Mask):
            return TF.pad(inpt, padding, fill=IGNORE_INDEX)
        return TF.pad(normalize(inpt, self.mean, self.std), padding, fill=0)


def training_transform(config: DataConfig) -> v2.Compose:
    """(uint8 image, uint8 label) -> (float32 3 h w, uint8 h w) of the crop's size."""
    return v2.Compose(
        [
            RandomScale(config.base_size, config.scale_range),
            ClassCappedCrop(config.crop_size, config.class_cap),
            v2.RandomHorizontalFlip(config.flip),
            PhotometricDistortion() if config.photometric_distortion else v2.Identity(),
            degradation(config.degradation),
            NormalizeAndPad(config.crop_size, config.mean, config.std),
        ]
    )
