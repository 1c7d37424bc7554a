"""Segmenting whole pictures: at one or several scales, mirrored, whole or in sliding windows.

The steps and their order are mmsegmentation's (`EncoderDecoder.inference`, `SegTTAModel`).

Shapes: R branches, K classes, H W the picture, h w the picture at a test scale.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from danet.config import Size, TestConfig
from danet.data.transforms import fitted_size, normalize
from danet.model import DANet

Branch = Literal["fused", "position", "channel"]


def predict_classes(
    model: DANet, image: Tensor, test: TestConfig, branches: Sequence[Branch] = ("fused",)
) -> Tensor:
    """The most likely class of every pixel.

    Args:
        image: uint8 RGB 3 H W on the model's device.

    Returns:
        R H W int64, one label map per branch.
    """
    views = list(_views(image, test))
    if len(views) == 1:
        logits = _view_logits(model, image, *views[0], test, branches)
        return logits.argmax(1)
    return predict_probabilities(model, image, test, branches).argmax(1)


def predict_probabilities(
    model: DANet, image: Tensor, test: TestConfig, branches: Sequence[Branch] = ("fused",)
) -> Tensor:
    """Softmax scores R K H W in 0..1, averaged over the scales and flips of `test`."""
    total: Tensor | None = None
    views = list(_views(image, test))
    for size, mirrored in views:
        logits = _view_logits(model, image, size, mirrored, test, branches)
        scores = logits.softmax(1)
        total = scores if total is None else total.add_(scores)
    assert total is not None
    return total.div_(len(views))


def _views(image: Tensor, test: TestConfig) -> Iterator[tuple[Size, bool]]:
    """The (width, height) and mirroring of every pass over the picture."""
    own_size = (image.shape[2], image.shape[1])
    for ratio in test.ratios:
        size = fitted_size(own_size, test.scale or own_size, ratio)
        for mirrored in (False, True) if test.flip else (False,):
            yield size, mirrored


def _view_logits(
    model: DANet,
    image: Tensor,
    size: Size,
    mirrored: bool,
    test: TestConfig,
    branches: Sequence[Branch],
) -> Tensor:
    """Float32 logits R K H W of one pass, at the picture's own size."""
    metadata = model.metadata
    width, height = size
    resized = TF.resize(image, [height, width], antialias=False)
    pixels = normalize(resized, metadata.mean, metadata.std)
    if mirrored:
        pixels = pixels.flip(-1)
    network_input = pixels[None].contiguous(memory_format=torch.channels_last)
    if test.mode == "slide":
        logits = _slide(model, network_input, test, branches)
    else:
        logits = _logits(model, network_input, branches)[:, 0]
    if mirrored:
        logits = logits.flip(-1)
    own_height, own_width = image.shape[-2:]
    if size == (own_width, own_height):
        return logits
    return model.upsample(logits, (own_height, own_width))


def _logits(model: DANet, images: Tensor, branches: Sequence[Branch]) -> Tensor:
    """B 3 h w -> float32 logits R B K h w."""
    if tuple(branches) == ("fused",):
        features = [model.head.fused_logits(model.backbone(images).c4)]
    else:
        output = model(images)
        features = [getattr(output, branch) for branch in branches]
    return torch.stack([model.upsample(logits.float(), images.shape[-2:]) for logits in features])


def _slide(model: DANet, image: Tensor, test: TestConfig, branches: Sequence[Branch]) -> Tensor:
    """1 3 h w -> logits R K h w, averaged where windows overlap.

    Windows start every `stride` pixels; the last ones are shifted back to end at the border.
    """
    height, width = image.shape[-2:]
    window_width, window_height = min(test.window[0], width), min(test.window[1], height)
    corners = [
        (top, left)
        for top in _window_starts(height, window_height, test.stride[1])
        for left in _window_starts(width, window_width, test.stride[0])
    ]
    num_classes = len(model.metadata.classes)
    total = image.new_zeros(len(branches), num_classes, height, width)
    count = image.new_zeros(height, width)
    for first in range(0, len(corners), test.batch_size):
        batch = corners[first : first + test.batch_size]
        windows = torch.cat(
            [
                image[..., top : top + window_height, left : left + window_width]
                for top, left in batch
            ]
        )
        logits = _logits(model, windows, branches)
        for index, (top, left) in enumerate(batch):
            area = (slice(top, top + window_height), slice(left, left + window_width))
            total[..., *area] += logits[:, index]
            count[area] += 1
    return total / count


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    steps = max(0, -(-(length - window) // stride))
    return [min(step * stride, length - window) for step in range(steps + 1)]
