"""Colours of classes."""

from collections.abc import Sequence

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


def palette_bytes(palette: Sequence[Color]) -> bytes:
    """A palette as the 768 bytes of a PNG palette; unused ids, 255 among them, are black."""
    flat = [channel for color in palette for channel in color]
    return bytes(flat + [0] * (768 - len(flat)))
