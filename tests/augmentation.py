"""Random scale and crop in two plain steps, and samples as torchvision's transforms take them."""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from danet.data.transforms import fitted_size


def as_tensors(
    image: Image.Image, label: npt.NDArray[np.uint8]
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """RGB picture and H W ids -> uint8 3 H W and H W."""
    return tv_tensors.Image(TF.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(label))


def scaled_then_cropped(
    image: tv_tensors.Image,
    label: tv_tensors.Mask,
    base_size: tuple[int, int] | None,
    scale_range: tuple[float, float],
    size: tuple[int, int],
    class_cap: float,
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Resizes all, then cuts, up to 11 times; `RandomScaledCrop` must give the same by seed."""
    own_size = (image.shape[-1], image.shape[-2])
    low, high = scale_range
    factor = low + (high - low) * torch.rand(()).item()
    width, height = fitted_size(own_size, base_size or own_size, factor)
    image = TF.resize(image, [height, width], antialias=False)
    label = TF.resize(label, [height, width])
    crop_width, crop_height = min(size[0], width), min(size[1], height)
    for _ in range(11):
        top = int(torch.randint(height - crop_height + 1, ()))
        left = int(torch.randint(width - crop_width + 1, ()))
        cuts = [TF.crop(item, top, left, crop_height, crop_width) for item in (image, label)]
        ids = cuts[1].numpy()
        _, counts = np.unique(ids[ids != 255], return_counts=True)
        if class_cap >= 1 or (len(counts) > 1 and counts.max() < class_cap * counts.sum()):
            break
    return cuts[0], cuts[1]
