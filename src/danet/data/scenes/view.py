"""The camera, and the canvas that keeps picture and labels together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from danet.data.scenes.materials import Floats, Light, Material

NEAREST = 1.6
"""Near clipping distance in metres."""

Point = tuple[float, float, float]
"""x right, y up, z forward, in metres."""

SUPERSAMPLING = 2
"""Samples of a pixel each way."""
_TEXTURE_SHIFT, _DEPTH_SHIFT = 8, 16
GROUND_DEPTH = 0
"""Depth code of surfaces whose depth follows from the row."""
MAX_DEPTH = 255


@dataclass(frozen=True)
class View:
    """A pinhole camera over the street.

    Attributes:
        size: width, height of the picture in pixels.
        focal: focal length over the picture's width.
        horizon: row of the horizon over the picture's height.
        center: column of the vanishing point over the picture's width.
        height: of the camera over the ground, metres.
        x: of the camera, metres right of the road's middle.
        curve: the road's sideways shift at distance z is curve * z^2, metres.
    """

    size: tuple[int, int]
    focal: float
    horizon: float
    center: float
    height: float
    x: float
    curve: float

    def project(self, points: Iterable[Point]) -> list[float]:
        """World points -> pixel coordinates, as alternating columns and rows."""
        width, height = self.size
        corners = []
        for x, y, depth in points:
            z = max(depth, NEAREST)
            scale = self.focal * width / z
            corners.append(self.center * width + scale * (x - self.x + self.curve * z * z))
            corners.append(self.horizon * height + scale * (self.height - y))
        return corners

    def pixels(self, metres: float, distance: float) -> float:
        """The number of pixels that a length spans at a distance, both in metres."""
        return metres * self.focal * self.size[0] / max(distance, NEAREST)

    def ground(self) -> tuple[Floats, Floats]:
        """Where each pixel's ray meets the ground: metres to the right, H W, and ahead, H 1."""
        width, height = self.size
        rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
        columns = np.arange(width, dtype=np.float32)[None] + 0.5
        below_horizon = np.maximum(rows - self.horizon * height, 0.3)
        ahead = self.height * self.focal * width / below_horizon
        right = (columns - self.center * width) * (ahead / (self.focal * width))
        return right.astype(np.float32), ahead.astype(np.float32)


class Canvas:
    """Draws shapes onto the picture and, with the same corners, onto a map of codes.

    Both are drawn at twice the picture's size. Colours are means of four samples, so edges are
    smooth; the code is that of one of them, so every pixel has exactly one class, which is seen in
    it. What stands on the ground is drawn with the fog before it.
    """

    def __init__(self, view: View, light: Light) -> None:
        self.view = view
        self.light = light
        width, height = view.size
        enlarged = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        self._picture = Image.new("RGB", enlarged)
        self._codes = Image.new("I", enlarged)
        self._shadow = Image.new("L", view.size)
        self._draw = ImageDraw.Draw(self._picture)
        self._draw_code = ImageDraw.Draw(self._codes)
        self._draw_shadow = ImageDraw.Draw(self._shadow)

    def fill(self, colors: Floats, train_id: int, material: Material, depth: float) -> None:
        """Covers everything, with a colour for each row of samples.

        Args:
            colors: SUPERSAMPLING * H rows of RGB in 0..255.
            material: its texture counts, not its colour.
        """
        rows = Image.fromarray(np.rint(colors).astype(np.uint8)[:, None])
        self._picture.paste(rows.resize(self._picture.size, Image.Resampling.NEAREST))
        self._codes.paste(_code(train_id, material, depth), (0, 0, *self._codes.size))

    def polygon(
        self,
        points: Sequence[Point],
        train_id: int,
        material: Material,
        *,
        shade: float = 1.0,
        on_ground: bool = False,
    ) -> None:
        """A flat shape in the world.

        Args:
            shade: factor on the material's colour.
            on_ground: its depth follows from the row; else it is that of its nearest point.
        """
        depth = GROUND_DEPTH if on_ground else min(point[2] for point in points)
        self.flat(self.view.project(points), train_id, material, depth, shade)

    def flat(
        self,
        corners: Sequence[float],
        train_id: int,
        material: Material,
        depth: float,
        shade: float = 1.0,
    ) -> None:
        """Draws a shape given by pixel coordinates (alternating), at a depth in metres."""
        enlarged = _enlarged(corners)
        self._draw.polygon(enlarged, fill=self._fill(material, depth, shade))
        self._draw_code.polygon(enlarged, fill=_code(train_id, material, depth))

    def ellipse(
        self,
        center: Point,
        radius_x: float,
        radius_y: float,
        train_id: int,
        material: Material,
        *,
        shade: float = 1.0,
    ) -> None:
        """An upright ellipse that faces the camera, its radii in metres."""
        column, row = self.view.project([center])
        rx = self.view.pixels(radius_x, center[2])
        ry = self.view.pixels(radius_y, center[2])
        box = _enlarged((column - rx, row - ry, column + rx, row + ry))
        self._draw.ellipse(box, fill=self._fill(material, center[2], shade))
        self._draw_code.ellipse(box, fill=_code(train_id, material, center[2]))

    def line(
        self, points: Sequence[Point], width: float, train_id: int, material: Material
    ) -> None:
        """A line of a width in metres through points of about the same depth."""
        corners = _enlarged(self.view.project(points))
        depth = points[0][2]
        pixels = max(1, round(self.view.pixels(width, depth) * SUPERSAMPLING))
        color, code = self._fill(material, depth), _code(train_id, material, depth)
        self._draw.line(corners, fill=color, width=pixels, joint="curve")
        self._draw_code.line(corners, fill=code, width=pixels, joint="curve")

    def shadow(self, points: Sequence[Point], strength: float) -> None:
        """Darkens the ground below a shape by a share 0..1."""
        self._draw_shadow.polygon(self.view.project(points), fill=round(255 * strength))

    def _fill(self, material: Material, depth: float, shade: float = 1.0) -> tuple[int, int, int]:
        clarity = 1.0 if depth == GROUND_DEPTH else float(self.light.clarity(depth))
        red, green, blue = (
            max(0, min(255, round(channel * shade * clarity + haze * (1 - clarity))))
            for channel, haze in zip(material.color, self.light.sky_low, strict=True)
        )
        return red, green, blue

    def finished(self) -> tuple[Floats, npt.NDArray[np.int32], Floats]:
        """Colours H W 3 in 0..255, codes H W, and shadow H W in 0..1."""
        colors = np.asarray(self._picture.reduce(SUPERSAMPLING), dtype=np.float32)
        samples = np.asarray(self._codes, dtype=np.int32)
        codes = samples[::SUPERSAMPLING, ::SUPERSAMPLING]
        shadow = np.asarray(self._shadow, dtype=np.float32) / np.float32(255)
        return colors, codes, shadow


def split_codes(
    codes: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Train ids, texture indices and depths (metres; 0 on the ground) of H W codes."""
    train_ids = (codes & 0xFF).astype(np.uint8)
    return train_ids, codes >> _TEXTURE_SHIFT & 0xFF, codes >> _DEPTH_SHIFT


def _enlarged(corners: Sequence[float]) -> list[float]:
    return [coordinate * SUPERSAMPLING for coordinate in corners]


def _code(train_id: int, material: Material, depth: float) -> int:
    metres = min(round(depth), MAX_DEPTH)
    return train_id | material.texture << _TEXTURE_SHIFT | metres << _DEPTH_SHIFT
