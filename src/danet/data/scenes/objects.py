"""Objects on the street: vehicles, people, bicycles, poles, signs, trees, and clutter."""

import numpy as np

from danet.data.scenes import materials as m
from danet.data.scenes.classes import BICYCLIST, CAR, PEDESTRIAN, POLE, SIGN, TREE, VOID
from danet.data.scenes.materials import Material, Rgb
from danet.data.scenes.street import varied
from danet.data.scenes.view import Canvas, Point

_TYRE = Material((30, 30, 32))
_PANE = Material((52, 60, 70))
_LAMP = Material((196, 44, 36))
_STEEL = Material((112, 116, 118))
_PAINTS: tuple[Rgb, ...] = (
    (36, 38, 42),
    (196, 198, 200),
    (150, 152, 156),
    (104, 108, 112),
    (150, 34, 34),
    (40, 62, 120),
    (52, 84, 62),
    (214, 212, 204),
    (176, 150, 60),
)
_SKINS: tuple[Rgb, ...] = ((222, 184, 156), (188, 140, 108), (120, 84, 62), (84, 58, 44))


def _box(
    canvas: Canvas,
    material: Material,
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    taper: float = 0.0,
) -> None:
    """The faces of a box that the camera can see; the top is drawn in by `taper` metres."""
    (left, right), (bottom, top), (near, far) = x, y, z
    side = left if canvas.view.x < left else right
    inset = taper if side == left else -taper
    if canvas.view.height > top:
        roof = [
            (left + taper, top, near + taper),
            (right - taper, top, near + taper),
            (right - taper, top, far - taper),
            (left + taper, top, far - taper),
        ]
        canvas.polygon(roof, CAR, material, shade=1.15)
    if not left <= canvas.view.x <= right:
        face = [
            (side, bottom, near),
            (side, bottom, far),
            (side + inset, top, far - taper),
            (side + inset, top, near + taper),
        ]
        canvas.polygon(face, CAR, material, shade=0.88)
    back = [
        (left, bottom, near),
        (right, bottom, near),
        (right - taper, top, near + taper),
        (left + taper, top, near + taper),
    ]
    canvas.polygon(back, CAR, material)


def draw_vehicle(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A car, van or truck along the street, its nearer end at z."""
    paint = Material(_PAINTS[rng.integers(len(_PAINTS))])
    kind = rng.choice(3, p=(0.76, 0.16, 0.08))
    width = (1.75, 1.95, 2.4)[kind] * rng.uniform(0.95, 1.05)
    length = (4.2, 4.9, 7.5)[kind] * rng.uniform(0.9, 1.1)
    height = (1.45, 2.1, 3.1)[kind] * rng.uniform(0.95, 1.05)
    left, right, far = x - width / 2, x + width / 2, z + length
    ground = [
        (left - 0.2, 0.0, z - 0.3),
        (right + 0.2, 0.0, z - 0.3),
        (right + 0.2, 0.0, far),
        (left - 0.2, 0.0, far),
    ]
    canvas.shadow(ground, 0.55)
    for wheel_z in (far - 0.9, z + 0.8):
        for wheel_x in (left + 0.12, right - 0.12):
            canvas.ellipse((wheel_x, 0.31, wheel_z), 0.2, 0.31, CAR, _TYRE)
    belt = 0.92 if kind == 0 else height * 0.5
    _box(canvas, paint, (left, right), (0.24, belt), (z, far), 0.05)
    cabin = (z + (0.35 if kind == 0 else 0.02), far - (1.2 if kind == 0 else 0.5))
    _box(canvas, paint, (left + 0.05, right - 0.05), (belt, height), cabin, 0.18)
    side = left + 0.1 if canvas.view.x < left else right - 0.1
    if not left <= canvas.view.x <= right:
        pane = [
            (side, belt + 0.04, cabin[0] + 0.2),
            (side, belt + 0.04, cabin[1] - 0.1),
            (side, height - 0.12, cabin[1] - 0.4),
            (side, height - 0.12, cabin[0] + 0.4),
        ]
        canvas.polygon(pane, CAR, _PANE)
        inner = 0.05 if side > x else -0.05
        for wheel_z in (far - 0.9, z + 0.8):
            center = (side + inner, 0.31, wheel_z)
            canvas.ellipse(center, 0.24, 0.31, CAR, _TYRE)
            canvas.ellipse(center, 0.12, 0.16, CAR, _STEEL)
    pane = [
        (left + 0.25, belt + 0.05, cabin[0] + 0.03),
        (right - 0.25, belt + 0.05, cabin[0] + 0.03),
        (right - 0.35, height - 0.12, cabin[0] + 0.1),
        (left + 0.35, height - 0.12, cabin[0] + 0.1),
    ]
    canvas.polygon(pane, CAR, _PANE if kind < 2 else paint)
    oncoming = rng.random() < 0.4
    lamp = Material((244, 240, 214)) if oncoming else _LAMP
    for lamp_x in (left + 0.2, right - 0.2):
        canvas.ellipse((lamp_x, 0.7, z), 0.16, 0.1, CAR, lamp)
    plate = [(x - 0.26, 0.42, z), (x + 0.26, 0.42, z), (x + 0.26, 0.54, z), (x - 0.26, 0.54, z)]
    canvas.polygon(plate, CAR, Material((220, 214, 170)))


def _limb(
    canvas: Canvas, train_id: int, material: Material, start: Point, end: Point, width: float
) -> None:
    canvas.line([start, end], width, train_id, material)


def _clothes(rng: np.random.Generator) -> Material:
    color = rng.uniform(25, 215, 3) * rng.uniform(0.5, 1.0)
    return Material((float(color[0]), float(color[1]), float(color[2])))


def draw_pedestrian(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A person standing or walking."""
    tall = rng.uniform(0.82, 1.08) if rng.random() < 0.85 else rng.uniform(0.6, 0.75)
    trousers, jacket = _clothes(rng), _clothes(rng)
    skin = Material(_SKINS[rng.integers(len(_SKINS))])
    stride = rng.uniform(0, 0.28)
    hip, shoulder = 0.88 * tall, 1.45 * tall
    canvas.shadow(
        [(x - 0.3, 0, z), (x + 0.3, 0, z), (x + 0.3, 0, z + 0.5), (x - 0.3, 0, z + 0.5)], 0.4
    )
    for direction in (-1, 1):
        foot = (x + direction * (0.07 + stride), 0.0, z)
        _limb(canvas, PEDESTRIAN, trousers, (x + direction * 0.08, hip, z), foot, 0.2 * tall)
    body = [
        (x - 0.2 * tall, hip - 0.1, z),
        (x + 0.2 * tall, hip - 0.1, z),
        (x + 0.24 * tall, shoulder, z),
        (x - 0.24 * tall, shoulder, z),
    ]
    canvas.polygon(body, PEDESTRIAN, jacket)
    for direction in (-1, 1):
        hand = (x + direction * (0.27 + stride * 0.5), hip - 0.05, z)
        arm = (x + direction * 0.24 * tall, shoulder - 0.06, z)
        _limb(canvas, PEDESTRIAN, jacket, arm, hand, 0.13 * tall)
    if rng.random() < 0.25:
        canvas.ellipse((x + 0.34, hip, z), 0.14, 0.2, PEDESTRIAN, _clothes(rng))
    canvas.ellipse((x, 1.6 * tall, z), 0.115 * tall, 0.15 * tall, PEDESTRIAN, skin)
    hair = Material((52, 40, 32) if rng.random() < 0.7 else (170, 150, 110))
    canvas.ellipse((x, 1.68 * tall, z), 0.12 * tall, 0.09 * tall, PEDESTRIAN, hair)


def draw_bicyclist(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A rider on a bicycle, from the side or from behind; both are one class."""
    frame, jacket, trousers = _clothes(rng), _clothes(rng), _clothes(rng)
    skin = Material(_SKINS[rng.integers(len(_SKINS))])
    facing = float(rng.choice((-1, 1)))
    spread = facing * (0.52 if rng.random() < 0.55 else 0.12)
    radius = 0.34
    canvas.shadow(
        [(x - 0.6, 0, z), (x + 0.6, 0, z), (x + 0.6, 0, z + 0.4), (x - 0.6, 0, z + 0.4)], 0.35
    )
    for wheel_x in (x - spread, x + spread):
        width = radius if abs(spread) > 0.3 else 0.07
        angles = np.linspace(0, 2 * np.pi, 15)
        rim = [(wheel_x + width * np.cos(a), radius + radius * np.sin(a), z) for a in angles]
        canvas.line(rim, 0.07, BICYCLIST, _TYRE)
    saddle: Point = (x - 0.3 * spread, 0.95, z)
    bar: Point = (x + 0.85 * spread, 1.0, z)
    crank: Point = (x, 0.33, z)
    for start, end in (
        ((x - spread, radius, z), saddle),
        (saddle, crank),
        (crank, bar),
        (bar, (x + spread, radius, z)),
        (saddle, bar),
    ):
        _limb(canvas, BICYCLIST, frame, start, end, 0.07)
    shoulder: Point = (x + 0.35 * spread, 1.5, z)
    _limb(canvas, BICYCLIST, trousers, saddle, (x + 0.1, 0.38, z), 0.18)
    _limb(canvas, BICYCLIST, trousers, saddle, (x - 0.06, 0.6, z), 0.18)
    _limb(canvas, BICYCLIST, jacket, saddle, shoulder, 0.38)
    _limb(canvas, BICYCLIST, jacket, shoulder, bar, 0.12)
    head: Point = (shoulder[0] + 0.1 * spread, 1.74, z)
    canvas.ellipse(head, 0.12, 0.15, BICYCLIST, skin)
    helmet = Material((190, 60, 50) if rng.random() < 0.4 else (50, 44, 40))
    canvas.ellipse((head[0], 1.81, z), 0.13, 0.09, BICYCLIST, helmet)


def _post(
    canvas: Canvas, x: float, z: float, width: float, height: float, material: Material
) -> None:
    half = width / 2
    corners = [(x - half, 0, z), (x + half, 0, z), (x + half, height, z), (x - half, height, z)]
    canvas.polygon(corners, POLE, material)


def draw_lamp_post(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A lamp post or a wooden mast with an arm over the road."""
    tone = Material((92, 96, 98)) if rng.random() < 0.7 else Material((104, 84, 66), m.COARSE)
    height = rng.uniform(5.5, 8.5)
    _post(canvas, x, z, rng.uniform(0.24, 0.36), height, varied(rng, tone))
    reach = -np.sign(x) * rng.uniform(0.8, 1.8)
    canvas.line([(x, height, z), (x + reach, height + 0.3, z)], 0.14, POLE, tone)
    canvas.ellipse((x + reach, height + 0.25, z), 0.4, 0.12, POLE, Material((214, 210, 190)))


def draw_bollard(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A short post at the kerb."""
    tone = Material((60, 60, 64)) if rng.random() < 0.6 else Material((176, 172, 166))
    _post(canvas, x, z, 0.2, rng.uniform(0.8, 1.1), tone)


def draw_sign(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A traffic sign or traffic lights on their pole."""
    height = rng.uniform(2.4, 3.2)
    _post(canvas, x, z, 0.2, height, varied(rng, _STEEL))
    kind = rng.integers(4)
    red, white, blue = Material((190, 36, 34)), Material((228, 226, 220)), Material((40, 84, 160))
    size = rng.uniform(0.42, 0.7)
    if kind == 0:
        canvas.ellipse((x, height, z), size, size, SIGN, red)
        canvas.ellipse((x, height, z), size * 0.7, size * 0.7, SIGN, white)
    elif kind == 1:
        for scale, material in ((1.15, red), (0.7, white)):
            span = size * scale
            triangle = [
                (x - span, height - span * 0.6, z),
                (x + span, height - span * 0.6, z),
                (x, height + span, z),
            ]
            canvas.polygon(triangle, SIGN, material)
    elif kind == 2:
        wide = size * rng.uniform(0.9, 2.0)
        board = [
            (x - wide, height - size, z),
            (x + wide, height - size, z),
            (x + wide, height + size, z),
            (x - wide, height + size, z),
        ]
        canvas.polygon(board, SIGN, blue if rng.random() < 0.6 else Material((40, 110, 74)))
        bar = [(px * 0.7 + x * 0.3, py * 0.3 + height * 0.7, z) for px, py, _ in board]
        canvas.polygon(bar, SIGN, white)
    else:
        box = [
            (x - 0.32, height - 0.7, z),
            (x + 0.32, height - 0.7, z),
            (x + 0.32, height + 0.65, z),
            (x - 0.32, height + 0.65, z),
        ]
        canvas.polygon(box, SIGN, Material((34, 36, 38)))
        lit = rng.integers(3)
        colors: tuple[Rgb, ...] = ((240, 60, 50), (240, 180, 60), (70, 220, 130))
        for index, color in enumerate(colors):
            glow = Material(color if index == lit else (58, 56, 54))
            canvas.ellipse((x, height + 0.4 - 0.42 * index, z), 0.17, 0.17, SIGN, glow)


def draw_tree(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A trunk and a crown of many clumps; green, autumn, or thin."""
    palette: tuple[Rgb, ...] = (
        (74, 96, 48),
        (58, 82, 46),
        (96, 110, 54),
        (132, 100, 52),
        (92, 84, 66),
    )
    leaves = varied(rng, Material(palette[rng.choice(5, p=(0.32, 0.28, 0.2, 0.1, 0.1))], m.LEAVES))
    bark = varied(rng, Material((84, 68, 54), m.COARSE))
    trunk, radius = rng.uniform(1.6, 3.2), rng.uniform(1.4, 3.2)
    middle = trunk + radius * 0.8
    canvas.line(
        [(x, 0, z), (x + rng.uniform(-0.2, 0.2), middle, z)], rng.uniform(0.25, 0.5), TREE, bark
    )
    shade_at: list[Point] = [
        (x + radius * np.cos(a), 0.0, z + 0.6 + radius * 0.6 * (1 + np.sin(a)))
        for a in np.linspace(0, 2 * np.pi, 10)
    ]
    canvas.shadow(shade_at, 0.35)
    clumps = 26 if z < 25 else 12
    for index in range(clumps):
        angle, reach = rng.uniform(0, 2 * np.pi), radius * np.sqrt(rng.random())
        clump_x, clump_y = x + reach * np.cos(angle), middle + 0.85 * reach * np.sin(angle)
        size = radius * rng.uniform(0.22, 0.4) * (1 if z < 25 else 1.3)
        light = 0.72 + 0.36 * (clump_y - middle + radius) / (2 * radius) + 0.26 * index / clumps
        center = (clump_x, clump_y, z)
        canvas.ellipse(center, size, size * 0.85, TREE, leaves, shade=light)


def draw_clutter(rng: np.random.Generator, canvas: Canvas, x: float, z: float) -> None:
    """A bin, box or bench; these have no class."""
    width, height = rng.uniform(0.4, 1.2), rng.uniform(0.5, 1.2)
    color = varied(
        rng, Material((70, 84, 74) if rng.random() < 0.5 else (110, 96, 84), m.COARSE), 0.4
    )
    corners = [(x, 0, z), (x + width, 0, z), (x + width, height, z), (x, height, z)]
    canvas.polygon(corners, VOID, color)
    lid = [(x - 0.05, height - 0.12, z), (x + width + 0.05, height - 0.12, z)]
    canvas.line([lid[0], lid[1]], 0.1, VOID, color)
