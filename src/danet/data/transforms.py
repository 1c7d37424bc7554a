"""The published augmentation, as torchvision v2 transforms.

Every transform draws from torch's global random generator, which the loader seeds per sample.
The order and the numbers are mmsegmentation's: random scale, class-capped crop, flip, photometric
distortion, normalisation, padding of the image with zeros (the mean) and of the label with 255.
`RandomScaledCrop` does scale and crop in one step.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from danet.config import DataConfig, Size
from danet.data.photometric import PhotometricDistortion
from danet.data.resize import Box, bilinear_part, nearest_part
from danet.data.spec import IGNORE_INDEX

CROP_TRIES = 10
_PIECE_ROWS = 32
_BLUR_SIDE = 7


def normalize(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """RGB 3 H W in 0..255, any dtype -> float32, minus the mean and divided by the deviation."""
    normalized: Tensor = TF.normalize(image.float(), list(mean), list(std))
    return normalized


def fitted_size(size: Size, bounds: Size, factor: float = 1.0) -> Size:
    """The largest size of the same aspect ratio that fits `factor` times the bounds.

    The longer side must fit the larger bound, the shorter side the smaller one (mmsegmentation's
    keep_ratio rule).

    Args:
        size: width, height of the picture.
        bounds: two sides in any order; times `factor`, they are truncated to whole pixels.
    """
    low, high = sorted(int(bound * factor) for bound in bounds)
    scale = min(high / max(size), low / min(size))
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return width, height


class RandomScaledCrop(v2.Transform):
    """A random crop of the picture at a random size, of which only the crop's pixels are made.

    The picture is fitted into the base size times a factor drawn uniformly from `scale_range`.
    A crop of it is accepted when it has at least two classes and none covers `class_cap` or more
    of its labelled pixels; it is drawn again up to 10 times, and the last draw is taken as it is.
    Scaled pictures smaller than the crop are cut only along their longer side.

    Images are resized bilinearly without antialiasing (as OpenCV does), labels by the nearest id.
    Images are Pillow's or uint8 3 H W, labels `tv_tensors.Mask` of uint8 H W.

    Args:
        base_size: the picture's own size where None.
        size: width, height of the crop.
    """

    def __init__(
        self,
        base_size: Size | None,
        scale_range: tuple[float, float],
        size: Size,
        class_cap: float,
    ) -> None:
        super().__init__()
        self.base_size = base_size
        self.scale_range = scale_range
        self.size = size
        self.class_cap = class_cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        scaled = self._draw_scaled(*v2.query_size(flat_inputs))
        box, label = self._draw_crop(mask.as_subclass(Tensor), scaled)
        return {"scaled": scaled, "box": box, "label": label}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(params["label"])
        return tv_tensors.Image(bilinear_part(inpt, params["scaled"], params["box"]))

    def _draw_scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height, width of the scaled picture."""
        low, high = self.scale_range
        factor = low + (high - low) * torch.rand(()).item()
        width, height = fitted_size((width, height), self.base_size or (width, height), factor)
        return height, width

    def _draw_crop(self, label: Tensor, scaled: tuple[int, int]) -> tuple[Box, Tensor]:
        """An accepted crop of the scaled picture, and its part of the labels."""
        box = self._draw_box(scaled)
        crop = nearest_part(label, scaled, box)
        for _ in range(CROP_TRIES):
            if self.class_cap >= 1 or _is_varied(crop, self.class_cap):
                break
            box = self._draw_box(scaled)
            crop = nearest_part(label, scaled, box)
        return box, crop

    def _draw_box(self, scaled: tuple[int, int]) -> Box:
        height, width = scaled
        crop_width, crop_height = min(self.size[0], width), min(self.size[1], height)
        return Box(
            top=int(torch.randint(height - crop_height + 1, ())),
            left=int(torch.randint(width - crop_width + 1, ())),
            height=crop_height,
            width=crop_width,
        )


def _is_varied(label: Tensor, class_cap: float) -> bool:
    """Whether there are two classes and none covers `class_cap` of the labelled pixels."""
    counts = torch.bincount(label.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    several = int((counts > 0).sum()) > 1
    return several and bool(counts.max() < class_cap * counts.sum())


class RandomGamma(v2.Transform):
    """Gamma correction of images with a log-uniform exponent in 1/2..2."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"gamma": 2 ** (2 * torch.rand(()).item() - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return self._call_kernel(TF.adjust_gamma, inpt, **params)


class RandomWhiteBalance(v2.Transform):
    """Multiplies each colour channel by its own log-uniform factor in 3/4..4/3."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"gains": (4 / 3) ** (2 * torch.rand(3, 1, 1) - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        scaled = (inpt.as_subclass(Tensor) * params["gains"]).round_().clamp_(max=255)
        return tv_tensors.Image(scaled.to(inpt.dtype))


class RandomNoise(v2.Transform):
    """Adds Gaussian sensor noise with a standard deviation uniform in 0..16 levels.

    The grain size is uniform in 1..2.5 pixels, as in pictures enlarged after they were taken.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        level, grain = torch.rand(2).tolist()
        return {"deviation": 16 * level, "grain": 1 + 1.5 * grain}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        height, width = inpt.shape[-2:]
        grains = [math.ceil(side / params["grain"]) for side in (height, width)]
        noise = torch.randn(1, inpt.shape[-3], *grains).mul_(params["deviation"])
        noise = F.interpolate(noise, size=(height, width), mode="bilinear").squeeze(0)
        noisy = noise.add_(inpt.as_subclass(Tensor)).round_().clamp_(0, 255)
        return tv_tensors.Image(noisy.to(inpt.dtype))


class _Blur(v2.GaussianBlur):
    """Leaves images alone that are too small to be mirrored at their edges."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if min(inpt.shape[-2:]) <= _BLUR_SIDE // 2:
            return inpt
        return super().transform(inpt, params)


def degradation(probability: float) -> v2.Transform:
    """Gamma, white balance, greyscale and blur of images, each with this probability."""
    if probability == 0:
        return v2.Identity()
    return v2.Compose(
        [
            v2.RandomApply([RandomGamma()], probability),
            v2.RandomApply([RandomWhiteBalance()], probability),
            v2.RandomGrayscale(probability),
            v2.RandomApply([_Blur(_BLUR_SIDE, (0.1, 1.5))], probability),
        ]
    )


def paste_classes(
    image: Tensor, label: Tensor, other_image: Tensor, other_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Pastes a random half (rounded down) of the other crop's classes onto this crop.

    ClassMix (Olsson et al., arXiv 2007.07936) with true labels instead of predicted ones.
    Ignored pixels are never pasted.

    Args:
        image, other_image: C H W.
        label, other_label: uint8 H W.
    """
    classes = torch.unique(other_label)
    classes = classes[classes != IGNORE_INDEX]
    chosen = classes[torch.randperm(len(classes))[: len(classes) // 2]]
    pasted = torch.isin(other_label, chosen)
    return torch.where(pasted, other_image, image), torch.where(pasted, other_label, label)


class NormalizeAndPad(v2.Transform):
    """Normalises the image, then pads image and label right and below to `size` (width, height)."""

    def __init__(self, size: Size, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.size = size
        self.mean = mean
        self.std = std

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        if isinstance(inpt, tv_tensors.Mask):
            padding = [0, 0, max(self.size[0] - width, 0), max(self.size[1] - height, 0)]
            return TF.pad(inpt, padding, fill=IGNORE_INDEX)
        padded = inpt.new_empty(
            (3, max(self.size[1], height), max(self.size[0], width)), dtype=torch.float32
        ).as_subclass(Tensor)
        padded[:, height:] = 0
        padded[:, :, width:] = 0
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        for rows, out in zip(
            inpt.as_subclass(Tensor).split(_PIECE_ROWS, dim=1),
            padded[:, :height, :width].split(_PIECE_ROWS, dim=1),
            strict=True,
        ):
            torch.div(rows.float().sub_(mean), std, out=out)
        return tv_tensors.Image(padded)


def training_transform(config: DataConfig) -> v2.Compose:
    """(RGB picture or uint8 image, uint8 label) -> (float32 3 h w, uint8 h w), the crop's size."""
    return v2.Compose(
        [
            RandomScaledCrop(
                config.base_size, config.scale_range, config.crop_size, config.class_cap
            ),
            v2.RandomHorizontalFlip(config.flip),
            PhotometricDistortion() if config.photometric_distortion else v2.Identity(),
            degradation(config.degradation),
            v2.RandomApply([RandomNoise()], config.noise) if config.noise else v2.Identity(),
            NormalizeAndPad(config.crop_size, config.mean, config.std),
        ]
    )
