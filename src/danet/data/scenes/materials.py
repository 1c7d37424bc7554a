"""Materials of surfaces, and lighting.

Several classes draw from one pool of materials: a grey of a given grain may be road, pavement,
wall or overcast sky, so that only its surroundings tell which.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rgb = tuple[float, float, float]

TEXTURE_SIZE = 512
SMOOTH, FINE, COARSE, LEAVES, BRICK, CLOUDS = range(6)
"""Indices of the textures."""


@dataclass(frozen=True)
class Material:
    """A colour (RGB 0..255) and the texture that varies its brightness."""

    color: Rgb
    texture: int = SMOOTH


ASPHALT = Material((92, 92, 96), FINE)
PALE_ASPHALT = Material((132, 131, 130), FINE)
CONCRETE = Material((158, 156, 150), COARSE)
PAVING = Material((150, 142, 132), BRICK)
COBBLES = Material((112, 106, 102), LEAVES)
RED_BRICK = Material((142, 84, 68), BRICK)
YELLOW_BRICK = Material((176, 152, 112), BRICK)
SANDSTONE = Material((190, 172, 138), COARSE)
PLASTER = Material((204, 198, 186), SMOOTH)
DARK_STONE = Material((98, 94, 90), COARSE)
GLASS = Material((122, 140, 158), CLOUDS)
GRASS = Material((92, 118, 60), LEAVES)

ROADS = (ASPHALT, ASPHALT, PALE_ASPHALT, CONCRETE, COBBLES)
PAVEMENTS = (PAVING, PAVING, CONCRETE, PALE_ASPHALT, COBBLES, SANDSTONE)
WALLS = (
    RED_BRICK,
    YELLOW_BRICK,
    SANDSTONE,
    PLASTER,
    CONCRETE,
    PALE_ASPHALT,
    DARK_STONE,
    GLASS,
)


@dataclass(frozen=True)
class Light:
    """The light and weather of a scene.

    Attributes:
        sun: strength of direct light and of the shadows it casts, 0..1.
        sun_side: -1 from the left, 1 from the right.
        tint: factor on RGB of everything.
        exposure: factor on brightness.
        sky_top, sky_low: RGB 0..255 of the sky overhead and at the horizon.
        clouds: contrast of the clouds, 0..1.
        visibility: metres after which fog has taken 63 % of the contrast.
    """

    sun: float
    sun_side: int
    tint: Rgb
    exposure: float
    sky_top: Rgb
    sky_low: Rgb
    clouds: float
    visibility: float

    def clarity(self, distance: Floats | float) -> Floats:
        """The share of light that fog lets through over a distance in metres."""
        clarity: Floats = np.exp(-np.float32(1 / self.visibility) * distance)
        return clarity


def draw_light(rng: np.random.Generator) -> Light:
    """A time of day and weather: clear, overcast, low sun, fog or dusk."""
    kind = rng.choice(5, p=(0.34, 0.32, 0.14, 0.1, 0.1))
    side = int(rng.choice((-1, 1)))
    vary = rng.uniform(0.92, 1.08, 3)
    warm = (1.0 * vary[0], 1.0 * vary[1], 1.0 * vary[2])
    if kind == 0:
        sky = (rng.uniform(80, 130), rng.uniform(130, 175), rng.uniform(195, 240))
        low = (rng.uniform(180, 220), rng.uniform(200, 225), rng.uniform(225, 245))
        return Light(rng.uniform(0.5, 0.9), side, warm, rng.uniform(0.9, 1.15), sky, low, 0.5, 600)
    if kind == 1:
        grey = rng.uniform(130, 235)
        sky = (grey, grey * 1.01, grey * 1.03)
        low = (grey * 1.05, grey * 1.05, grey * 1.05)
        return Light(0.1, side, warm, rng.uniform(0.75, 1.0), sky, low, rng.uniform(0, 0.3), 350)
    if kind == 2:
        tint = (1.12, 0.98, 0.82)
        sky = (rng.uniform(120, 170), rng.uniform(140, 170), rng.uniform(170, 210))
        low = (rng.uniform(230, 250), rng.uniform(190, 215), rng.uniform(140, 180))
        return Light(0.9, side, tint, rng.uniform(0.75, 1.0), sky, low, 0.4, 400)
    if kind == 3:
        grey = rng.uniform(165, 215)
        sky = (grey, grey, grey * 1.01)
        return Light(0.0, side, warm, rng.uniform(0.85, 1.0), sky, sky, 0.0, rng.uniform(45, 110))
    tint = (0.82, 0.88, 1.08)
    sky = (rng.uniform(40, 80), rng.uniform(50, 90), rng.uniform(80, 130))
    low = (rng.uniform(110, 180), rng.uniform(90, 130), rng.uniform(90, 130))
    return Light(0.0, side, tint, rng.uniform(0.5, 0.68), sky, low, 0.3, 300)


def _noise(rng: np.random.Generator, cells: int) -> Floats:
    """Periodic smooth noise of zero mean and unit deviation with `cells` cells along each side."""
    spectrum = np.fft.rfft2(rng.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE)))
    rows = np.fft.fftfreq(TEXTURE_SIZE)[:, None] * TEXTURE_SIZE
    columns = np.fft.rfftfreq(TEXTURE_SIZE)[None] * TEXTURE_SIZE
    spectrum *= np.exp(-(rows**2 + columns**2) / (2 * cells**2))
    noise = np.fft.irfft2(spectrum, s=(TEXTURE_SIZE, TEXTURE_SIZE))
    normalized: Floats = ((noise - noise.mean()) / noise.std()).astype(np.float32)
    return normalized


def _bricks(rng: np.random.Generator) -> Floats:
    row, column = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE]
    course = row // 4
    shifted = column + 4 * (course % 2)
    tone = rng.standard_normal((TEXTURE_SIZE // 4, TEXTURE_SIZE // 8 + 1))[course, shifted // 8]
    joint = (row % 4 == 0) | (shifted % 8 == 0)
    return np.where(joint, -1.2, 0.7 * tone).astype(np.float32)


@cache
def textures() -> Floats:
    """All textures as relative brightness, T S S, zero mean; the same in every process."""
    rng = np.random.default_rng(20190616)
    smooth, middle, fine = (_noise(rng, cells) for cells in (6, 40, 150))
    stack = (
        0.02 * smooth + 0.01 * fine,
        0.03 * smooth + 0.07 * fine,
        0.05 * smooth + 0.06 * middle,
        0.10 * middle + 0.12 * fine,
        0.02 * smooth + 0.08 * _bricks(rng),
        0.10 * smooth + 0.02 * middle,
    )
    return np.stack(stack).astype(np.float32)
