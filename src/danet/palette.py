"""Colours of classes, and pictures drawn in them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Color = tuple[int, int, int]
"""RGB, each 0..255."""


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """Distinct colours for ids 0..K-1: the bit-interleaved colour map of PASCAL VOC's devkit."""

    def color(index: int) -> Color:
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        return channels[0], channels[1], channels[2]

    return tuple(color(index) for index in range(num_classes))


def hex_color(color: Color) -> str:
    """The colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def colored(classes: npt.NDArray[np.uint8], palette: Sequence[Color]) -> Image.Image:
    """H W class ids -> a palette image of them; ids outside of the palette are black."""
    image = Image.fromarray(classes)
    flat = [channel for color in palette for channel in color]
    image.putpalette(bytes(flat + [0] * (768 - len(flat))))
    return image


def highlighted(
    image: Image.Image,
    mask: npt.NDArray[np.bool_],
    color: Color,
    *,
    gain: float = 1.0,
    offset: float = 0.0,
    dimmed: npt.NDArray[np.bool_] | None = None,
) -> Image.Image:
    """The picture in grey with the pixels of a mask in one colour, RGB.

    Args:
        mask: H W.
        gain, offset: grey levels 0..255 are multiplied and shifted by these, to 0..255 again.
        dimmed: H W, pixels that are darkened to 30 % of that.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float32) * gain + offset
    if dimmed is not None:
        grey[dimmed] *= 0.3
    pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    pixels[mask] = color
    return Image.fromarray(pixels)
