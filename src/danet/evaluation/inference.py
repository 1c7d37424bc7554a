"""Inference on whole pictures: one or several scales, flipping, sliding windows.

The steps and their order are mmsegmentation's (`EncoderDecoder.inference`, `SegTTAModel`).

Shapes: P pictures, R branches, K classes, V views, H W the picture, h w the features.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from danet.config import Size, TestConfig
from danet.data.transforms import fitted_size, normalize
from danet.evaluation.strips import (
    LogitRows,
    Mirrored,
    Overlapped,
    Resized,
    Stored,
    average_probabilities,
    most_likely_classes,
    require_finite,
)
from danet.heads import Branch
from danet.model import DANet


def pixels_of(picture: Image.Image) -> Tensor:
    """RGB -> uint8 3 H W on the CPU, whichever torch's default device is."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def predict_classes(
    model: DANet, image: Tensor, test: TestConfig, branches: Sequence[Branch] = ("fused",)
) -> Tensor:
    """Predicts the most likely class of every pixel.

    Args:
        image: uint8 RGB 3 H W on the model's device.

    Returns:
        R H W uint8, one label map per branch.
    """
    return most_likely_classes(views(model, image.unsqueeze(0), test, branches)[0])


@torch.no_grad()
def predict_probabilities(model: DANet, image: Tensor, test: TestConfig) -> Tensor:
    """Softmax scores K H W in 0..1, averaged over the scales and flips of `test`.

    Args:
        image: uint8 RGB 3 H W on the model's device.
    """
    return average_probabilities(views(model, image.unsqueeze(0), test)[0])[0]


def view_sizes(width: int, height: int, test: TestConfig) -> list[Size]:
    """The (width, height) in pixels that a picture is resized to, for each ratio of `test`."""
    own_size = (width, height)
    bounds = own_size if test.scale is None or test.ratios_of == "image" else test.scale
    return [fitted_size(own_size, bounds, ratio) for ratio in test.ratios]


def views(
    model: DANet, images: Tensor, test: TestConfig, branches: Sequence[Branch] = ("fused",)
) -> list[list[LogitRows]]:
    """Logits of every scale and flip, at the pictures' own size.

    Args:
        images: uint8 RGB P 3 H W on the model's device; the network takes them as one batch.

    Returns:
        A list of views for each picture.

    Raises:
        LogitsNotFinite: the weights are damaged, or the precision is too low for them.
    """
    metadata = model.metadata
    # Torch's resize of contiguous uint8 pictures to a single pixel fails with an internal assert.
    images = images.contiguous(memory_format=torch.channels_last)
    own_height, own_width = images.shape[-2:]
    align_corners = model.config.align_corners
    found: list[list[LogitRows]] = [[] for _ in images]
    for width, height in view_sizes(own_width, own_height, test):
        resized = TF.resize(images, [height, width], antialias=False)
        pixels = normalize(resized, metadata.mean, metadata.std)
        inputs = torch.cat([pixels, pixels.flip(-1)]) if test.flip else pixels
        segment = _slide if test.mode == "slide" else _whole
        for index, segmented in enumerate(segment(model, inputs, test, branches)):
            mirrored, picture = divmod(index, len(images))
            view = Mirrored(segmented) if mirrored else segmented
            if (width, height) != (own_width, own_height):
                view = Resized(view, (own_height, own_width), align_corners)
            found[picture].append(view)
    return found


def _whole(
    model: DANet, inputs: Tensor, _: TestConfig, branches: Sequence[Branch]
) -> Iterator[LogitRows]:
    """Logits of each of the V images, V 3 height width, at their size."""
    for logits in _feature_logits(model, inputs, branches):
        yield Resized(Stored(logits), inputs.shape[-2:], model.config.align_corners)


def _feature_logits(model: DANet, images: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
    """B 3 height width -> B finite float32 logits R K h w, for each image."""
    images = images.contiguous(memory_format=torch.channels_last)
    if tuple(branches) == ("fused",):
        logits = [model.fused_logits(images)]
    else:
        output = model(images)
        logits = [getattr(output, branch) for branch in branches]
    # Contiguous, because interpolation would otherwise copy its output at the picture's size.
    found = torch.stack(logits, 1).float().contiguous()
    require_finite(found)
    return list(found)


def _slide(
    model: DANet, inputs: Tensor, test: TestConfig, branches: Sequence[Branch]
) -> Iterator[LogitRows]:
    """Logits of each of the V images, V 3 height width, averaged where windows overlap.

    Windows start every `stride` pixels; `window_border` tells how those at the border are placed.
    """
    height, width = inputs.shape[-2:]
    window_width, window_height = test.window
    if test.window_border == "shift":
        window_width, window_height = min(window_width, width), min(window_height, height)
    window_size = (window_height, window_width)
    spans = [
        (view, rows, columns)
        for view in range(len(inputs))
        for rows in _window_spans(height, window_height, test.stride[1], test.window_border)
        for columns in _window_spans(width, window_width, test.stride[0], test.window_border)
    ]
    black = normalize(inputs.new_zeros(3, 1, 1), model.metadata.mean, model.metadata.std)
    windows: list[list[tuple[slice, slice, LogitRows]]] = [[] for _ in inputs]
    for first in range(0, len(spans), test.batch_size):
        batch = spans[first : first + test.batch_size]
        pictures = black.repeat(len(batch), 1, window_height, window_width)
        for picture, (view, rows, columns) in zip(pictures, batch, strict=True):
            part = inputs[view, :, rows, columns]
            picture[:, : part.shape[1], : part.shape[2]] = part
        for logits, (view, rows, columns) in zip(
            _feature_logits(model, pictures, branches), batch, strict=True
        ):
            resized = Resized(Stored(logits), window_size, model.config.align_corners)
            windows[view].append((rows, columns, resized))
    for of_view in windows:
        yield Overlapped((height, width), of_view)


def _window_spans(length: int, window: int, stride: int, border: str) -> list[slice]:
    """The pixels that each window covers along one axis."""
    spans = []
    for step in range(max(0, -(-(length - window) // stride)) + 1):
        start = step * stride
        if border == "shift":
            start = min(start, length - window)
        spans.append(slice(start, min(start + window, length)))
    return spans
