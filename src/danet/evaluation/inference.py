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
        bounds = own_size if test.scale is None or test.ratios_of == "image" else test.scale
        size = fitted_size(own_size, bounds, ratio)
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

    Windows start every `stride` pixels; `window_border` says what becomes of the last ones.
    """
    height, width = image.shape[-2:]
    window_width, window_height = test.window
    if test.window_border == "shift":
        window_width, window_height = min(window_width, width), min(window_height, height)
    spans = [
        (rows, columns)
        for rows in _window_spans(height, window_height, test.stride[1], test.window_border)
        for columns in _window_spans(width, window_width, test.stride[0], test.window_border)
    ]
    black = normalize(image.new_zeros(3, 1, 1), model.metadata.mean, model.metadata.std)
    num_classes = len(model.metadata.classes)
    total = image.new_zeros(len(branches), num_classes, height, width)
    count = image.new_zeros(height, width)
    for first in range(0, len(spans), test.batch_size):
        batch = spans[first : first + test.batch_size]
        windows = black.repeat(len(batch), 1, window_height, window_width)
        for window, (rows, columns) in zip(windows, batch, strict=True):
            part = image[0, :, rows, columns]
            window[:, : part.shape[1], : part.shape[2]] = part
        logits = _logits(model, windows.contiguous(memory_format=torch.channels_last), branches)
        for index, (rows, columns) in enumerate(batch):
            inside = total[..., rows, columns]
            inside += logits[:, index, :, : inside.shape[-2], : inside.shape[-1]]
            count[rows, columns] += 1
    return total / count


def _window_spans(length: int, window: int, stride: int, border: str) -> list[slice]:
    """The part of the picture that each window covers along one axis."""
    spans = []
    for step in range(max(0, -(-(length - window) // stride)) + 1):
        start = step * stride
        if border == "shift":
            start = min(start, length - window)
        spans.append(slice(start, min(start + window, length)))
    return spans
