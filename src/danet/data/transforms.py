"""The published augmentation, as torchvision v2 transforms.

Every transform draws from torch's global random generator, which the loader seeds per sample.
The order and the numbers are mmsegmentation's: random scale, class-capped crop, flip, photometric
distortion, normalisation, padding of the image with zeros (the mean) and of the label with 255.
Of the scaled picture only the crop is made (`ScaledCrop`).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from danet.config import DataConfig, Size
from danet.data.colour import PhotometricDistortion
from danet.data.resize import Box, bilinear_part, nearest_part
from danet.data.spec import IGNORE_INDEX

CROP_TRIES = 10
_PIECE_ROWS = 32


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
        label = next(i for i in flat_inputs if isinstance(i, tv_tensors.Mask | ScaledLabel))
        box = self._draw(label)
        for _ in range(CROP_TRIES):
            if self.class_cap >= 1 or self._is_varied(label, **box):
                break
            box = self._draw(label)
        return box

    def _draw(self, label: "Tensor | ScaledLabel") -> dict[str, int]:
        height, width = label.shape[-2:]
        crop_width, crop_height = min(self.size[0], width), min(self.size[1], height)
        return {
            "top": int(torch.randint(height - crop_height + 1, ())),
            "left": int(torch.randint(width - crop_width + 1, ())),
            "height": crop_height,
            "width": crop_width,
        }

    def _is_varied(
        self, label: "Tensor | ScaledLabel", top: int, left: int, height: int, width: int
    ) -> bool:
        crop = label[..., top : top + height, left : left + width].as_subclass(Tensor)
        counts = torch.bincount(crop.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        several = int((counts > 0).sum()) > 1
        return several and bool(counts.max() < self.class_cap * counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(TF.crop, inpt, **params)


class ScaledLabel:
    """A label map as it would be at another size, made only where a slice asks for it.

    Args:
        size: height, width.
    """

    def __init__(self, label: Tensor, size: tuple[int, int]) -> None:
        self.label = label.as_subclass(Tensor)
        self.shape = torch.Size(size)
        self.last: tuple[Box, Tensor] | None = None
        """The part that was made last, for the crop that is accepted is wanted again."""

    def __getitem__(self, index: tuple[Any, slice, slice]) -> Tensor:
        _, rows, columns = index
        part = Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        return self.part(part)

    def part(self, part: Box) -> Tensor:
        if self.last is None or self.last[0] != part:
            size = (self.shape[0], self.shape[1])
            self.last = (part, nearest_part(self.label, size, part))
        return self.last[1]


class ScaledCrop(v2.Transform):
    """`scale`, then `crop`, with the same draws and result, but makes only the crop's pixels.

    Images may be Pillow's, of which then only the crop is read, or uint8 3 H W.
    """

    def __init__(self, scale: RandomScale, crop: ClassCappedCrop) -> None:
        super().__init__()
        self.scale = scale
        self.crop = crop

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        label = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        height, width = self.scale.make_params(flat_inputs)["size"]
        scaled = ScaledLabel(label, (height, width))
        return {"label": scaled, "part": Box(**self.crop.make_params([scaled]))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        scaled, part = params["label"], params["part"]
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(scaled.part(part))
        return tv_tensors.Image(bilinear_part(inpt, (scaled.shape[0], scaled.shape[1]), part))


class RandomGamma(v2.Transform):
    """Raises images to a power whose logarithm is uniform between those of 1/2 and 2."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"gamma": 2 ** (2 * torch.rand(()).item() - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return self._call_kernel(TF.adjust_gamma, inpt, **params)


class RandomWhiteBalance(v2.Transform):
    """Multiplies each colour by a factor, its logarithm uniform between those of 3/4 and 4/3."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"gains": (4 / 3) ** (2 * torch.rand(3, 1, 1) - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        scaled = (inpt.as_subclass(Tensor) * params["gains"]).round_().clamp_(max=255)
        return tv_tensors.Image(scaled.to(inpt.dtype))


class RandomNoise(v2.Transform):
    """Adds a sensor's noise: normal, of a standard deviation uniform in 0..16 levels, its grain
    uniform in 1..2.5 pixels, for a picture may have been enlarged since."""

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


def degradation(probability: float) -> v2.Transform:
    """Gamma, white balance, greyscale and blur, each with this probability, on images only."""
    if probability == 0:
        return v2.Identity()
    return v2.Compose(
        [
            v2.RandomApply([RandomGamma()], probability),
            v2.RandomApply([RandomWhiteBalance()], probability),
            v2.RandomGrayscale(probability),
            v2.RandomApply([v2.GaussianBlur(7, (0.1, 1.5))], probability),
        ]
    )


def paste_classes(
    image: Tensor, label: Tensor, other_image: Tensor, other_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Half of the other crop's classes, drawn at random and rounded down, over this crop.

    ClassMix (Olsson et al., arXiv 2007.07936), but with true labels in place of predicted ones.
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
    """Normalises the image, then pads right and below to `size` (width, height)."""

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
    scale = RandomScale(config.base_size, config.scale_range)
    crop = ClassCappedCrop(config.crop_size, config.class_cap)
    return v2.Compose(
        [
            ScaledCrop(scale, crop),
            v2.RandomHorizontalFlip(config.flip),
            PhotometricDistortion() if config.photometric_distortion else v2.Identity(),
            degradation(config.degradation),
            v2.RandomApply([RandomNoise()], config.noise) if config.noise else v2.Identity(),
            NormalizeAndPad(config.crop_size, config.mean, config.std),
        ]
    )
