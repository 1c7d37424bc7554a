"""Continuous parts of a street: ground, building rows, fences, hedges, and its far end."""

from dataclasses import dataclass

import numpy as np

from danet.data.scenes import materials as m
from danet.data.scenes.classes import BUILDING, FENCE, PAVEMENT, ROAD, TREE
from danet.data.scenes.materials import Material
from danet.data.scenes.view import NEAREST, Canvas, Point

FAR = 140.0
"""Distance of the end of the street, in metres."""
_WINDOW_DISTANCE = 70.0
_WHITE = Material((222, 222, 216))


@dataclass(frozen=True)
class Street:
    """The cross-section of a street, metres from the middle of the road.

    Attributes:
        road: half the width of the road.
        walls: where the building rows stand, left (negative) and right.
    """

    road: float
    walls: tuple[float, float]
    road_material: Material
    pavement_material: Material

    def kerb(self, side: int) -> float:
        return side * self.road

    def wall(self, side: int) -> float:
        return self.walls[side > 0]


def draw_street(rng: np.random.Generator) -> Street:
    """Draws random widths and materials."""
    road = rng.uniform(3.2, 6.5)
    return Street(
        road=road,
        walls=(-road - rng.uniform(2.0, 6.0), road + rng.uniform(2.0, 6.0)),
        road_material=varied(rng, m.ROADS[rng.integers(len(m.ROADS))]),
        pavement_material=varied(rng, m.PAVEMENTS[rng.integers(len(m.PAVEMENTS))]),
    )


def varied(rng: np.random.Generator, material: Material, spread: float = 0.16) -> Material:
    """A random variation of the material: slightly lighter or darker, with shifted hue."""
    factor = rng.uniform(1 - spread, 1 + spread)
    red, green, blue = material.color
    shift = rng.uniform(-0.03, 0.03, 3)
    color = (
        float(red * factor * (1 + shift[0])),
        float(green * factor * (1 + shift[1])),
        float(blue * factor * (1 + shift[2])),
    )
    return Material(color, material.texture)


def _strip(left: float, right: float, near: float = NEAREST, far: float = FAR) -> list[Point]:
    """A strip of ground between two lines along the street, bent with it."""
    depths = np.geomspace(near, far, 12)
    return [(left, 0.0, z) for z in depths] + [(right, 0.0, z) for z in depths[::-1]]


def draw_ground(rng: np.random.Generator, canvas: Canvas, street: Street) -> None:
    """Pavements, road, kerbs, markings, patches and crossings."""
    pavement, road = street.pavement_material, street.road_material
    canvas.polygon(_strip(-60, 60), PAVEMENT, pavement, on_ground=True)
    for side in (-1, 1):
        if rng.random() < 0.15:
            kerb, wall = street.kerb(side), street.wall(side)
            verge = kerb + 0.35 * (wall - kerb)
            canvas.polygon(_strip(kerb, verge), TREE, varied(rng, m.GRASS), on_ground=True)
    canvas.polygon(_strip(-street.road, street.road), ROAD, road, on_ground=True)
    if rng.random() < 0.3:
        z = rng.uniform(14, 45)
        width = rng.uniform(3, 6)
        for side in (-1, 1) if rng.random() < 0.5 else (int(rng.choice((-1, 1))),):
            far_end = 60.0 * side
            corners = [
                (street.kerb(side), 0.0, z),
                (far_end, 0.0, z),
                (far_end, 0.0, z + width),
                (street.kerb(side), 0.0, z + width),
            ]
            canvas.polygon(corners, ROAD, road, on_ground=True)
    for _ in range(rng.integers(0, 4)):
        x, z = rng.uniform(-street.road, street.road * 0.6), rng.uniform(3, 25)
        w, length = rng.uniform(0.5, 2.0), rng.uniform(0.6, 4)
        right = min(x + w, street.road)
        patch = [(x, 0.0, z), (right, 0.0, z), (right, 0.0, z + length), (x, 0.0, z + length)]
        canvas.polygon(patch, ROAD, road, shade=rng.uniform(0.75, 1.15), on_ground=True)
    for side in (-1, 1):
        kerb = street.kerb(side)
        canvas.polygon(_strip(kerb - 0.25 * side, kerb), ROAD, road, shade=0.6, on_ground=True)
        stone = varied(rng, m.CONCRETE)
        edge = _strip(kerb, kerb + 0.3 * side)
        canvas.polygon(edge, PAVEMENT, stone, shade=1.25, on_ground=True)
        if rng.random() < 0.3:
            line = kerb - 0.5 * side
            yellow = Material((196, 168, 60)) if rng.random() < 0.5 else _WHITE
            canvas.polygon(_strip(line, line + 0.13), ROAD, yellow, on_ground=True)
    _draw_markings(rng, canvas, street)


def _draw_markings(rng: np.random.Generator, canvas: Canvas, street: Street) -> None:
    if rng.random() < 0.7:
        dash, gap = rng.uniform(1.5, 3), rng.uniform(2, 5)
        z = NEAREST + rng.uniform(0, 4)
        while z < 60:
            canvas.polygon(
                [(-0.08, 0, z), (0.08, 0, z), (0.08, 0, z + dash), (-0.08, 0, z + dash)],
                ROAD,
                _WHITE,
                on_ground=True,
            )
            z += dash + gap
    if rng.random() < 0.2:
        z = rng.uniform(8, 25)
        for x in np.arange(-street.road + 0.3, street.road - 0.6, 1.0):
            bar = [(x, 0, z), (x + 0.5, 0, z), (x + 0.5, 0, z + 3), (x, 0, z + 3)]
            canvas.polygon(bar, ROAD, _WHITE, on_ground=True)


def draw_block(
    rng: np.random.Generator, canvas: Canvas, wall: float, near: float, far: float, lit: float
) -> None:
    """A building with its facade on the plane x = wall, and the gable that faces the camera.

    Args:
        lit: shade of the facade; the gable gets the light from ahead.
    """
    material = varied(rng, m.WALLS[rng.integers(len(m.WALLS))])
    height = rng.uniform(4.5, 16)
    outwards = np.sign(wall)
    back = wall + outwards * rng.uniform(8, 14)
    gable = [(wall, 0, near), (back, 0, near), (back, height, near), (wall, height, near)]
    if rng.random() < 0.45:
        ridge = ((wall + back) / 2, height + rng.uniform(1.5, 3.5), near)
        roof = Material((104, 72, 62) if rng.random() < 0.5 else (82, 84, 90), m.BRICK)
        slope = [
            (wall, height, near),
            ridge,
            (ridge[0], ridge[1], far),
            (wall, height, far),
        ]
        canvas.polygon(slope, BUILDING, roof, shade=lit)
        gable.insert(3, ridge)
    canvas.polygon(gable, BUILDING, material, shade=0.85)
    facade = [(wall, 0, near), (wall, 0, far), (wall, height, far), (wall, height, near)]
    canvas.polygon(facade, BUILDING, material, shade=lit)
    if near < _WINDOW_DISTANCE:
        _draw_windows(rng, canvas, wall, near, far, height, lit)


def _draw_windows(
    rng: np.random.Generator,
    canvas: Canvas,
    wall: float,
    near: float,
    far: float,
    height: float,
    lit: float,
) -> None:
    storey = rng.uniform(2.8, 3.6)
    pitch = rng.uniform(2.0, 3.6) if near < 30 else rng.uniform(4, 6)
    window_height, window_width = storey * rng.uniform(0.4, 0.62), pitch * rng.uniform(0.35, 0.65)
    frame = Material((214, 210, 202)) if rng.random() < 0.6 else Material((70, 66, 62))
    pane = Material((58, 66, 76) if rng.random() < 0.7 else (150, 166, 180))
    shop = rng.random() < 0.4
    sign = Material(tuple(float(c) for c in rng.uniform(40, 220, 3)))  # type: ignore[arg-type]
    for z in np.arange(near + 0.6, far - window_width, pitch):
        for floor in range(int(height // storey)):
            bottom = floor * storey + 0.9
            top, end = bottom + window_height, z + window_width
            if floor == 0 and shop:
                bottom, top, end = 0.4, 2.4, z + pitch * 0.88
                board = _upright(wall, z, end, 2.45, 2.95)
                canvas.polygon(board, BUILDING, sign, shade=lit)
            if near < 30:
                outer = _upright(wall, z - 0.12, end + 0.12, bottom - 0.12, top + 0.12)
                canvas.polygon(outer, BUILDING, frame, shade=lit)
            shade = lit * rng.uniform(0.75, 1.25)
            canvas.polygon(_upright(wall, z, end, bottom, top), BUILDING, pane, shade=shade)


def _upright(x: float, near: float, far: float, bottom: float, top: float) -> list[Point]:
    return [(x, bottom, near), (x, bottom, far), (x, top, far), (x, top, near)]


def draw_end(rng: np.random.Generator, canvas: Canvas) -> None:
    """The far end of the street: buildings, trees, both, or open sky over a low skyline."""
    x = -70.0
    tall = rng.random() < 0.6
    while x < 70:
        width = rng.uniform(6, 18)
        if rng.random() < 0.6:
            height = rng.uniform(5, 16) if tall else rng.uniform(2.5, 6)
            wall = varied(rng, m.WALLS[rng.integers(len(m.WALLS))])
            corners = [(x, 0, FAR), (x + width, 0, FAR), (x + width, height, FAR), (x, height, FAR)]
            canvas.polygon(corners, BUILDING, wall, shade=rng.uniform(0.75, 1.0))
        else:
            crown = Material((74, 92, 52), m.LEAVES)
            radius = rng.uniform(4, 8)
            canvas.ellipse((x + width / 2, radius * 0.6, FAR), width / 2, radius, TREE, crown)
        x += width * rng.uniform(0.7, 1.0)


def draw_fence(rng: np.random.Generator, canvas: Canvas, x: float, near: float, far: float) -> None:
    """A fence along the street: boards, railings, or bars on a low wall."""
    height = rng.uniform(1.0, 2.0)
    tone = (
        Material((112, 88, 64), m.COARSE),
        Material((64, 66, 70), m.SMOOTH),
        Material((70, 96, 66), m.COARSE),
        Material((176, 176, 174), m.SMOOTH),
    )[rng.integers(4)]
    canvas.polygon(_upright(x, near, far, 0, height), FENCE, varied(rng, tone))
    spacing = rng.uniform(0.3, 0.6) * (1 if near < 12 else 3)
    dark = rng.uniform(0.45, 0.75)
    for z in np.arange(near, far - spacing * 0.5, spacing):
        gap = _upright(x, z, z + spacing * 0.45, 0.12, height - 0.12)
        canvas.polygon(gap, FENCE, tone, shade=dark)


def draw_hedge(rng: np.random.Generator, canvas: Canvas, x: float, near: float, far: float) -> None:
    """A hedge along the street."""
    leaves = varied(rng, Material((72, 96, 50), m.LEAVES))
    height = rng.uniform(0.9, 2.2)
    canvas.polygon(_upright(x, near, far, 0, height), TREE, leaves)
    for z in np.arange(far, near, -0.8):
        bump = rng.uniform(0.3, 0.6)
        canvas.ellipse((x, height, z), bump, bump * 0.7, TREE, leaves, shade=rng.uniform(0.85, 1.2))
