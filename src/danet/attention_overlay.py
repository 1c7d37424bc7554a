"""Attention drawn over a picture, pixel by pixel."""

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw

from danet.inspection import FloatMap, Point

HEAT = "cividis"
"""matplotlib's colours for attention, which look alike to everybody."""
HEAT_OPACITY = 0.75
DISAGREEMENT_COLOR = (213, 94, 0)
"""RGB, where the branches are not of one opinion."""
SMALLEST_TIMES_EVEN = 1e-3
"""Shares below this, against an even spread over all positions, are drawn alike."""


def attention_overlay(image: Image.Image, shares: FloatMap, point: Point | None) -> Image.Image:
    """Attention over the grey picture, as in the figure, at the picture's size.

    Args:
        shares: h w, summing to 1.
        point: column and row of the pixel to mark, if any.
    """
    heat = log_times_even(shares)
    low, high = np.log10(SMALLEST_TIMES_EVEN), max(float(heat.max()), 1.0)
    levels = Image.fromarray(((heat - low) / (high - low)).astype(np.float32))
    spread = np.asarray(levels.resize(image.size, Image.Resampling.BILINEAR))
    index = (spread.clip(0, 1) * 255).astype(np.uint8)
    table = (mpl.colormaps[HEAT](np.arange(256))[:, :3] * 255).astype(np.uint8)
    drawn = image.convert("L").convert("RGB")
    # Where there is little attention the picture shines through.
    opacity = Image.fromarray((255 * HEAT_OPACITY * (0.4 + 0.6 * index / 255)).astype(np.uint8))
    drawn.paste(Image.fromarray(table[index]), mask=opacity)
    if point is not None:
        _draw_cross(drawn, *point)
    return drawn


def _draw_cross(image: Image.Image, column: int, row: int) -> None:
    arm = max(6, min(image.size) // 50)
    drawing = ImageDraw.Draw(image)
    for color, width in (("white", max(3, arm // 3)), ("black", max(1, arm // 8))):
        drawing.line((column - arm, row, column + arm, row), fill=color, width=width)
        drawing.line((column, row - arm, column, row + arm), fill=color, width=width)


def log_times_even(shares: FloatMap) -> FloatMap:
    """log10 of how many times as much as an even share: trained attention spans many decades."""
    times: FloatMap = np.log10((shares * shares.size).clip(min=SMALLEST_TIMES_EVEN))
    return times
