import numpy as np
from PIL import Image

from danet.palette import colored, hex_color, highlighted


def test_ids_are_drawn_in_their_colours_and_others_in_black() -> None:
    classes = np.array([[0, 1], [2, 255]], np.uint8)
    image = colored(classes, ((1, 2, 3), (200, 0, 255)))
    assert image.mode == "P"
    assert np.asarray(image).tolist() == classes.tolist()
    drawn = np.asarray(image.convert("RGB")).tolist()
    assert drawn == [[[1, 2, 3], [200, 0, 255]], [[0, 0, 0], [0, 0, 0]]]


def test_hex_color() -> None:
    assert hex_color((0, 10, 255)) == "#000aff"


def test_highlighted_pixels_are_coloured_and_others_grey() -> None:
    levels = np.array([[0, 100, 255, 40]], np.uint8)
    image = Image.fromarray(np.repeat(levels[..., None], 3, axis=2))
    mask = np.array([[False, False, False, True]])
    pixels = np.asarray(highlighted(image, mask, (213, 94, 0)))
    assert pixels.tolist() == [[[0] * 3, [100] * 3, [255] * 3, [213, 94, 0]]]
    dimmed = np.array([[False, True, False, True]])
    pale = np.asarray(highlighted(image, mask, (1, 2, 3), gain=0.5, offset=120, dimmed=dimmed))
    assert pale.tolist() == [[[120] * 3, [51] * 3, [247] * 3, [1, 2, 3]]]
