"""Composes a scene's picture and labels from a seed and an index."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from danet.data.scenes import materials as m
from danet.data.scenes import objects
from danet.data.scenes.classes import SKY, VOID
from danet.data.scenes.materials import (
    Floats,
    Light,
    Material,
    Rgb,
    draw_light,
    textures,
)
from danet.data.scenes.street import (
    FAR,
    Street,
    draw_block,
    draw_end,
    draw_fence,
    draw_ground,
    draw_hedge,
    draw_street,
)
from danet.data.scenes.view import (
    GROUND_DEPTH,
    MAX_DEPTH,
    SUPERSAMPLING,
    Canvas,
    View,
    split_codes,
)

DEFAULT_SIZE = (480, 360)
_LIMIT = (64, 4096)
_THINNEST_POLE = 3.6
"""Smallest width of a pole, in pixels of a picture 480 wide; thinner poles are left out."""

_GROUND_TEXELS = 50
"""Texture resolution in texels per metre of ground."""

Drawing = tuple[float, Callable[[], None]]
"""A distance in metres and the function that draws the object there."""


def render(
    seed: int, index: int, size: tuple[int, int] = DEFAULT_SIZE
) -> tuple[Image.Image, npt.NDArray[np.uint8]]:
    """Draws one scene; its content does not depend on size or process.

    Args:
        seed, index: choose the scene; not negative.
        size: width, height in pixels, each 64..4096, and not higher than wide.

    Returns:
        The RGB picture, and H W train ids (255 is void).
    """
    if not all(_LIMIT[0] <= side <= _LIMIT[1] for side in size):
        raise ValueError(f"scenes are {_LIMIT[0]}..{_LIMIT[1]} pixels wide and high, not {size}")
    if size[0] < size[1]:  # whose lower rows would see the ground too close to the camera
        raise ValueError(f"scenes are not higher than wide, as {size} is")
    rng = np.random.default_rng([seed, index])
    street, light = draw_street(rng), draw_light(rng)
    view = _draw_view(rng, size, street)
    canvas = Canvas(view, light)
    _draw_sky(canvas, light)
    draw_end(rng, canvas)
    draw_ground(rng, canvas, street)
    drawings = [*_sides(rng, canvas, street, light), *_traffic(rng, canvas, street)]
    _draw_from_far_to_near(drawings)
    if rng.random() < 0.15:
        _draw_bonnet(rng, canvas)
    colors, codes, shadow = canvas.finished()
    train_ids, texture, depth = split_codes(codes)
    lit = _shade(rng, view, light, colors, (train_ids, texture, depth), shadow)
    return Image.fromarray(_expose(rng, light, lit)), train_ids


def _draw_from_far_to_near(drawings: list[Drawing]) -> None:
    for _, draw in sorted(drawings, key=lambda drawing: -drawing[0]):
        draw()


def _draw_view(rng: np.random.Generator, size: tuple[int, int], street: Street) -> View:
    on_pavement = rng.random() < 0.15
    side = int(rng.choice((-1, 1)))
    x = street.kerb(side) + side * 0.8 if on_pavement else rng.uniform(-0.6, 0.6) * street.road
    return View(
        size=size,
        focal=rng.uniform(0.75, 1.25),
        horizon=rng.uniform(0.34, 0.52),
        center=rng.uniform(0.34, 0.66),
        height=rng.uniform(1.3, 2.3),
        x=x,
        curve=rng.normal(0, 0.0016),
    )


def _draw_sky(canvas: Canvas, light: Light) -> None:
    """From the colour overhead to that of the horizon, and on below it."""
    height = canvas.view.size[1]
    steps = SUPERSAMPLING * math.ceil(canvas.view.horizon * height)
    share = np.arange(SUPERSAMPLING * height)[:, None].clip(max=steps - 1) / steps
    top, low = (1 - share).astype(np.float32), share.astype(np.float32)
    colors = _rgb(light.sky_top) * top + _rgb(light.sky_low) * low
    canvas.fill(colors, SKY, Material(light.sky_low, m.CLOUDS), MAX_DEPTH)


def _draw_bonnet(rng: np.random.Generator, canvas: Canvas) -> None:
    """Draws the camera's own car along the lower border."""
    width, height = canvas.view.size
    rise = rng.uniform(0.05, 0.12)
    columns = np.linspace(-0.05, 1.05, 20)
    rows = 1.02 - rise * np.sqrt(np.clip(1 - ((columns - 0.5) / 0.56) ** 2, 0, 1))
    outline = np.stack((columns * width, rows * height), axis=1)
    corners = [*outline.ravel().tolist(), width * 1.05, height * 1.1, -0.05 * width, height * 1.1]
    canvas.flat(corners, VOID, Material((52, 54, 60)), depth=2)


def _sides(rng: np.random.Generator, canvas: Canvas, street: Street, light: Light) -> list[Drawing]:
    """Draws both sides of the street: buildings, gardens and open ground.

    What runs along the street is drawn at its far end, before all that stands beside it on the
    pavement (and before the few who stand between a fence and its house); what is behind it, before
    that.
    """
    drawings: list[Drawing] = []
    for side in (-1, 1):
        wall = street.wall(side)
        lit = 1.0 + 0.25 * light.sun * (1 if side != light.sun_side else -1)
        built = rng.uniform(0.45, 0.95)
        near = rng.uniform(-4, 3)
        while near < FAR * 0.75:
            length = rng.uniform(6, 16) * (1 if near < 40 else 2)
            start, end = max(near, 1.7), near + length
            near = end
            if end <= start + 1:
                continue
            own = np.random.default_rng(rng.integers(2**63))
            if rng.random() < built:
                if rng.random() < 0.25:
                    fence = partial(draw_fence, own, canvas, wall - side * 0.9, start, end)
                    drawings.append((end, fence))
                block = partial(draw_block, own, canvas, wall, start, end, lit)
                drawings.append((end + 1e-3, block))
                if light.sun > 0.3 and side == light.sun_side:
                    reach = -side * rng.uniform(1.5, 6)
                    corners = [
                        (wall, 0.0, start),
                        (wall + reach, 0.0, start),
                        (wall + reach, 0.0, end),
                        (wall, 0.0, end),
                    ]
                    canvas.shadow(corners, 0.45 * light.sun)
                continue
            border = draw_fence if rng.random() < 0.6 else draw_hedge
            drawings.append((end, partial(border, own, canvas, wall, start, end)))
            for _ in range(rng.integers(1, 4)):
                x = wall + side * rng.uniform(1.0, 5)
                z = rng.uniform(start, end) + 2.0
                drawings.append((end + 1e-3 * z, partial(objects.draw_tree, own, canvas, x, z)))
    return drawings


def _traffic(rng: np.random.Generator, canvas: Canvas, street: Street) -> list[Drawing]:
    """The objects that stand or move on road and pavement."""
    drawings: list[Drawing] = []
    own = np.random.default_rng(rng.integers(2**63))

    def place(draw: Callable[..., None], x: float, z: float) -> None:
        drawings.append((z, partial(draw, own, canvas, x, z)))

    for side in (-1, 1):
        _roadside(rng, place, canvas.view, street, side)
    for _ in range(rng.poisson(1.0)):
        place(objects.draw_vehicle, rng.uniform(-0.55, 0.55) * street.road, rng.uniform(9, 50))
    for _ in range(1 + rng.poisson(1.0)):
        x = rng.choice((-1, 1)) * street.road * rng.uniform(0.3, 0.95)
        place(objects.draw_bicyclist, x, 4.5 + rng.gamma(2.0, 2.6))
    if rng.random() < 0.15:
        place(objects.draw_pedestrian, rng.uniform(-0.8, 0.8) * street.road, rng.uniform(8, 25))
    return drawings


def _roadside(
    rng: np.random.Generator, place: Callable[..., None], view: View, street: Street, side: int
) -> None:
    """Parked cars, and the objects and people on the pavement of one side."""

    def beside() -> float:
        kerb = street.kerb(side)
        return kerb + rng.uniform(0.15, 0.85) * (street.wall(side) - kerb)

    if rng.random() < 0.6:
        z = rng.uniform(5, 16)
        for _ in range(rng.integers(1, 6)):
            place(objects.draw_vehicle, side * (street.road - 1.1), z)
            z += rng.uniform(5.5, 12)
    farthest = view.focal * 480 * 0.2 / _THINNEST_POLE
    z = rng.uniform(4, 14)
    while z < farthest:
        draw = objects.draw_lamp_post if rng.random() < 0.6 else objects.draw_sign
        place(draw, street.kerb(side) + side * rng.uniform(0.3, 0.7), z)
        z += rng.uniform(7, 16)
    if rng.random() < 0.25:
        for z in np.arange(rng.uniform(4, 7), 16, rng.uniform(1.6, 3)):
            place(objects.draw_bollard, street.kerb(side) + side * 0.4, float(z))
    if rng.random() < 0.45:
        for z in np.arange(rng.uniform(8, 16), 60, rng.uniform(7, 14)):
            place(objects.draw_tree, street.kerb(side) + side * rng.uniform(0.6, 1.2), float(z))
    for _ in range(rng.poisson(2.0)):
        x, z = beside(), 4.5 + rng.gamma(2.0, 2.8)
        for neighbour in range(1 + (rng.random() < 0.3)):
            place(objects.draw_pedestrian, x + 0.6 * neighbour, z + 0.1 * neighbour)
    if rng.random() < 0.3:
        place(objects.draw_clutter, beside(), rng.uniform(5, 20))


def _shade(
    rng: np.random.Generator,
    view: View,
    light: Light,
    colors: Floats,
    layers: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.int32]],
    shadow: Floats,
) -> Floats:
    """Texture, shadow, and fog on the ground; what stands on it was drawn with its fog."""
    train_ids, texture, depth = layers
    is_sky, on_ground = train_ids == SKY, depth == GROUND_DEPTH
    right, ahead = view.ground()
    distance = np.where(on_ground, ahead, depth.astype(np.float32))
    clarity = light.clarity(distance)
    clarity[is_sky] = 1
    grain = _grain(rng, view, texture, on_ground, right, ahead)
    grain *= np.where(is_sky, np.float32(2 * light.clouds), np.float32(1))
    grain *= np.where(on_ground, np.float32(1), clarity)
    darkness = shadow * on_ground * np.float32(0.45 + 0.55 * light.sun)
    brightness = (1 + grain) * (1 - darkness) * np.float32(light.exposure)
    haze = _rgb(light.sky_low) * np.float32(light.exposure)
    veil = on_ground * (1 - clarity)
    shaded: Floats = colors * (brightness * (1 - veil))[..., None] + haze * veil[..., None]
    return shaded


def _grain(
    rng: np.random.Generator,
    view: View,
    texture: npt.NDArray[np.int32],
    on_ground: npt.NDArray[np.bool_],
    right: Floats,
    ahead: Floats,
) -> Floats:
    """Relative brightness H W of the pixels' textures: in perspective on the ground, else flat.

    The ground's texture fades with distance, where many texels fall on one pixel.
    """
    width, height = view.size
    zoom = DEFAULT_SIZE[0] / width
    shift = rng.integers(m.TEXTURE_SIZE, size=2)
    flat_row = (np.arange(height)[:, None] * zoom + shift[0]).astype(np.int32)
    flat_column = (np.arange(width)[None] * zoom + shift[1]).astype(np.int32)
    row = np.where(on_ground, (ahead * _GROUND_TEXELS).astype(np.int32), flat_row)
    column = np.where(on_ground, (right * _GROUND_TEXELS).astype(np.int32), flat_column)
    row, column = row % m.TEXTURE_SIZE, column % m.TEXTURE_SIZE
    grain = textures().ravel()[(texture * m.TEXTURE_SIZE + row) * m.TEXTURE_SIZE + column]
    fade = np.minimum(np.float32(1), 12 / ahead)
    textured: Floats = np.where(on_ground, grain * fade, grain)
    return textured


def _rgb(color: Rgb) -> Floats:
    return np.array(color, dtype=np.float32)


def _expose(rng: np.random.Generator, light: Light, lit: Floats) -> npt.NDArray[np.uint8]:
    """Tint, contrast and sensor noise, as 8 bit."""
    contrast = np.float32(rng.uniform(0.85, 1.15))
    pixels = (lit * _rgb(light.tint) - 110) * contrast + 110
    height, width = lit.shape[:2]
    shift = rng.integers(m.TEXTURE_SIZE, size=2)
    rows, columns = np.arange(height) + shift[0], np.arange(width) + shift[1]
    tile = np.ix_(rows % m.TEXTURE_SIZE, columns % m.TEXTURE_SIZE)
    noise = textures()[m.FINE][tile] * np.float32(rng.uniform(15, 60))
    exposed: npt.NDArray[np.uint8] = np.clip(pixels + noise[..., None], 0, 255).astype(np.uint8)
    return exposed
