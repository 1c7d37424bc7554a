import hashlib
import itertools
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from danet.data import dataset_spec, open_dataset
from danet.data.scenes import compose, render
from danet.data.scenes.classes import BUILDING, FENCE, PEDESTRIAN
from danet.data.scenes.materials import Light, Material
from danet.data.scenes.objects import draw_pedestrian
from danet.data.scenes.street import draw_street
from danet.data.scenes.view import Canvas, View, split_codes
from danet.errors import UserError

NUM_SCENES = 24


@pytest.fixture(scope="module")
def samples() -> list:
    dataset = open_dataset("scenes", split="val")
    return [dataset[index] for index in range(NUM_SCENES)]


def digest(sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.label.tobytes()).hexdigest()


def test_shape_and_ids(samples: list) -> None:
    for sample in samples:
        assert sample.image.mode == "RGB"
        assert sample.image.size == (480, 360)
        assert sample.label.shape == (360, 480)
        assert sample.label.dtype == np.uint8
        assert set(np.unique(sample.label)) <= {*range(11), 255}


def test_classes_are_camvids() -> None:
    assert dataset_spec("scenes").classes == dataset_spec("camvid").classes


def test_a_scene_depends_on_split_and_index_alone(samples: list) -> None:
    assert digest(open_dataset("scenes", split="val")[5]) == digest(samples[5])
    assert digest(open_dataset("scenes", split="train")[5]) != digest(samples[5])
    assert len({digest(sample) for sample in samples}) == NUM_SCENES


def test_another_process_draws_the_same_bits(samples: list) -> None:
    script = (
        "import hashlib; from danet.data import open_dataset; "
        "s = open_dataset('scenes', split='val')[3]; "
        "print(hashlib.sha256(s.image.tobytes() + s.label.tobytes()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest(samples[3])


def test_every_class_occurs_and_none_fills_the_set(samples: list) -> None:
    counts = sum(np.bincount(sample.label.ravel(), minlength=256) for sample in samples)
    shares = counts / counts.sum()
    assert (shares[:11] > 0.001).all()
    assert shares.max() < 0.5
    assert 0 < shares[255] < 0.05


def test_scenes_differ_in_light_and_layout(samples: list) -> None:
    brightness = [np.asarray(sample.image).mean() for sample in samples]
    road = [(sample.label == 3).mean() for sample in samples]
    assert max(brightness) > 1.6 * min(brightness)
    assert max(road) - min(road) > 0.1


def test_color_alone_does_not_tell_the_class(samples: list) -> None:
    """What context is for: the best guess from a pixel's own colour is often wrong."""
    votes = np.zeros((4096, 11), int)
    pixels = [(np.asarray(s.image).reshape(-1, 3) >> 4, s.label.ravel()) for s in samples]
    for colors, labels in pixels:
        known = labels != 255
        bins = colors[known].astype(int) @ (256, 16, 1)
        np.add.at(votes, (bins, labels[known]), 1)
    assert votes.max(1).sum() / votes.sum() < 0.75


def test_nothing_beside_a_person_on_the_pavement_hides_them() -> None:
    """Fronts and fences reach from nearer than the person to farther, but behind their back."""
    white = (255.0, 255.0, 255.0)
    light = Light(0, 1, (1, 1, 1), 1, white, white, 0, 1000)
    view = View((480, 360), 1, 0.4, 0.5, 1.8, 0, curve=0)
    for seed, side, z in itertools.product(range(10), (-1, 1), (5, 8, 12)):
        rng = np.random.default_rng(seed)
        street = draw_street(rng)
        x = street.wall(side) - 1.5 * side
        alone, among = Canvas(view, light), Canvas(view, light)
        draw_pedestrian(np.random.default_rng(0), alone, x, z)
        person = partial(draw_pedestrian, np.random.default_rng(0), among, x, z)
        sides = compose._sides(rng, among, street, light)
        compose._draw_from_far_to_near([*sides, (z, person)])
        expected, found = (split_codes(canvas.finished()[1])[0] for canvas in (alone, among))
        assert not np.isin(found[expected == PEDESTRIAN], (BUILDING, FENCE)).any()


def test_fog_hides_what_is_far() -> None:
    haze = (200.0, 210.0, 220.0)
    view = View((480, 360), 1, 0.4, 0.5, 1.8, 0, curve=0)
    canvas = Canvas(view, Light(0, 1, (1, 1, 1), 1, haze, haze, 0, visibility=50))
    for left, depth in ((-1.0, 2.5), (40.0, 100.0)):
        square = [(left, 1, depth), (left + 9, 1, depth), (left + 9, 3, depth), (left, 3, depth)]
        canvas.polygon(square, BUILDING, Material((10.0, 20.0, 30.0)))
    near, far = (canvas.finished()[0][142, column] for column in (240, 450))
    np.testing.assert_allclose(near, np.array([10, 20, 30]) * 0.95 + np.array(haze) * 0.05, atol=1)
    np.testing.assert_allclose(far, np.array([10, 20, 30]) * 0.135 + np.array(haze) * 0.865, atol=1)


def test_edges_against_the_sky_are_no_brighter_than_both_sides(samples: list) -> None:
    brighter = edges = 0
    for sample in samples:
        rows = np.asarray(sample.image.convert("L"), int)
        sky = sample.label == dataset_spec("scenes").classes.index("sky")
        edge = sky[1:-3] & sky[2:-2] & ~sky[3:-1] & ~sky[4:]
        above, middle, below = rows[1:-3][edge], rows[2:-2][edge], rows[4:][edge]
        brighter += (middle > np.maximum(above, below) + 8).sum()
        edges += edge.sum()
    assert edges > 1000
    assert brighter < 0.1 * edges


@pytest.mark.parametrize("size", [(63, 64), (4097, 64), (64, 65)])
def test_a_size_that_cannot_be_drawn_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="scenes are"):
        render(0, 0, size)


def test_indices_work_like_a_sequence() -> None:
    dataset = open_dataset("scenes", split="test")
    assert dataset[-1].name == f"test_{len(dataset) - 1:05}"
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_root_makes_no_sense() -> None:
    with pytest.raises(UserError, match=r"do not set data\.root"):
        open_dataset("scenes", "/somewhere")
