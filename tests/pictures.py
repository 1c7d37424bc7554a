"""Pictures to segment."""

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 50, 37


def noise(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    """The same at every call."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)
