"""Computes a part of a resized picture without the rest of it.

Bilinear interpolation is linear along each side, so a part is two matrix products with few
non-zero entries: first over the source's rows, then over its columns. A band of the output needs
only a window of the source, so the products are of small dense matrices.
Weights are those of torch's `interpolate` (half-pixel centres, no antialiasing, float32).

Suffixes: H W of the whole resized picture, h w of the source's window that a part covers.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

_ROWS, _COLUMNS = 16, 32
"""Output rows and columns per matrix product: wider bands multiply more zeros."""
_STRIP = 16
"""Bands of rows computed together: few calls, without the whole crop in float32."""
_ROUNDED_ROWS = 32
"""Rows rounded together: few enough to stay in the cache."""


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Band(NamedTuple):
    """Output pixels `made` along one side are `weights` (source, made) times `source`."""

    made: slice
    source: slice
    weights: Tensor


def bilinear_part(image: Image.Image | Tensor, size: tuple[int, int], part: Box) -> Tensor:
    """The rectangle `part` of the picture resized bilinearly to `size`.

    Args:
        image: RGB or uint8 3 h w.
        size: H, W.

    Returns:
        uint8 3 height width.
    """
    height, width = source_size(image)
    rows, first, last = _bands(height, size[0], part.top, part.height, _ROWS)
    columns, left, right = _bands(width, size[1], part.left, part.width, _COLUMNS)
    window_h3w = _window(image, Box(first, left, last - first, right - left))
    result = torch.empty(3, part.height, part.width, dtype=torch.uint8)
    strip_rows = min(_STRIP * _ROWS, part.height)
    buffer_h3w = torch.empty(strip_rows, 3, right - left)
    buffer_h3width = torch.empty(strip_rows, 3, part.width)
    for start in range(0, len(rows), _STRIP):
        strip = rows[start : start + _STRIP]
        begin, end = strip[0].made.start, strip[-1].made.stop
        for made, source, weights in strip:
            out = buffer_h3w[made.start - begin : made.stop - begin].flatten(1)
            torch.mm(weights.T, window_h3w[source].float().flatten(1), out=out)
        pixels = buffer_h3w[: end - begin].flatten(0, 1)
        resized = buffer_h3width[: end - begin].flatten(0, 1)
        for made, source, weights in columns:
            torch.mm(pixels[:, source], weights, out=resized[:, made])
        for piece in range(begin, end, _ROUNDED_ROWS):
            stop = min(piece + _ROUNDED_ROWS, end)
            rounded = buffer_h3width[piece - begin : stop - begin].round_()
            copy_whole(rounded.transpose(0, 1), result[:, piece:stop])
    return result


def nearest_part(label: Tensor, size: tuple[int, int], part: Box) -> Tensor:
    """The rectangle `part` of uint8 h w ids resized to `size` (H, W) by nearest neighbour."""
    rows = _nearest(label.shape[0], size[0], part.top, part.height)
    columns = _nearest(label.shape[1], size[1], part.left, part.width)
    # numpy takes columns three times as fast as torch does.
    return torch.from_numpy(label.index_select(0, rows).numpy().take(columns.numpy(), axis=1))


def copy_whole(pixels: Tensor, out: Tensor) -> None:
    """Copies float values in 0..255, truncated, into a uint8 tensor.

    Goes through int16, because torch's conversion from float to uint8 is not vectorised.
    """
    out.copy_(pixels.to(torch.int16))


def source_size(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height, width."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[-2], image.shape[-1]


def _window(image: Image.Image | Tensor, box: Box) -> Tensor:
    """The box of the picture as uint8 h 3 w."""
    top, left, height, width = box
    if isinstance(image, Image.Image):
        # Splitting by Pillow is faster than reading interleaved pixels by numpy.
        colors = image.crop((left, top, left + width, top + height)).split()
        window: npt.NDArray[np.uint8] = np.stack([np.asarray(color) for color in colors], axis=1)
        return torch.from_numpy(window)
    window_3hw = image[:, top : top + height, left : left + width].as_subclass(Tensor)
    return window_3hw.transpose(0, 1).contiguous()


def _bands(
    source: int, resized: int, first: int, length: int, band: int
) -> tuple[list[_Band], int, int]:
    """The matrix products along one side for pixels `first` to `first + length` of `resized`.

    Returns:
        The bands, with source indices relative to the window's start, and the start and end of
        that window in the source.
    """
    # In float32 for the same weights as torch's; numpy is faster than torch on arrays this small.
    centers = np.arange(first, first + length, dtype=np.float32) + np.float32(0.5)
    position = (centers * np.float32(source / resized) - np.float32(0.5)).clip(0, source - 1)
    lower = position.astype(np.int64)
    upper = np.minimum(lower + 1, source - 1)
    share = position - lower.astype(np.float32)
    start, end = int(lower[0]), int(upper[-1]) + 1
    made = np.arange(length)
    number, place = made // band, made % band
    begins = lower[::band]
    ends = upper[np.minimum(made[::band] + band - 1, length - 1)] + 1
    weights = np.zeros((len(begins), int((ends - begins).max()), band), dtype=np.float32)
    weights[number, lower - begins[number], place] = 1 - share
    weights[number, upper - begins[number], place] += share
    dense = torch.from_numpy(weights)
    return (
        [
            _Band(
                slice(index * band, min((index + 1) * band, length)),
                slice(begin - start, end_of_band - start),
                dense[index, : end_of_band - begin, : length - index * band],
            )
            for index, (begin, end_of_band) in enumerate(
                zip(begins.tolist(), ends.tolist(), strict=True)
            )
        ],
        start,
        end,
    )


def _nearest(source: int, resized: int, first: int, length: int) -> Tensor:
    """Indices of the nearest source pixels as in torch's `interpolate`: truncated coordinates."""
    positions = torch.arange(first, first + length, dtype=torch.float32)
    return positions.mul_(source / resized).long().clamp_(max=source - 1)
