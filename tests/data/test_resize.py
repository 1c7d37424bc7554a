import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from danet.data.resize import Box, bilinear_part, nearest_part


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], Box]:
    """The sizes of a picture and of what it is resized to, H W, and a part of that."""
    picture = draw(st.tuples(*[st.integers(1, 90)] * 2))
    resized = draw(st.tuples(*[st.integers(1, 150)] * 2))
    height, width = (draw(st.integers(1, side)) for side in resized)
    top, left = draw(st.integers(0, resized[0] - height)), draw(st.integers(0, resized[1] - width))
    return picture, resized, Box(top, left, height, width)


def random_pixels(*shape: int) -> Tensor:
    random = np.random.default_rng(sum(shape))
    return torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))


def cut(pixels: Tensor, part: Box) -> Tensor:
    top, left, height, width = part
    return pixels[..., top : top + height, left : left + width]


@settings(max_examples=200, deadline=None)
@given(parts())
@example(((70, 90), (35, 45), Box(3, 5, 20, 40)))
@example(((40, 50), (600, 700), Box(250, 0, 300, 700)))  # several strips
def test_a_part_is_cut_from_the_resized_picture(
    case: tuple[tuple[int, int], tuple[int, int], Box],
) -> None:
    picture, resized, part = case
    image = random_pixels(3, *picture)
    whole = F.interpolate(image[None].double(), resized, mode="bilinear", align_corners=False)[0]
    actual = bilinear_part(image, resized, part)
    assert actual.dtype == torch.uint8
    # Half a level is the rounding to whole ones; the rest, coordinates in float32.
    assert (actual - cut(whole, part)).abs().max() < 0.51


@settings(max_examples=200, deadline=None)
@given(parts())
def test_a_part_of_a_label_is_cut_from_the_resized_one(
    case: tuple[tuple[int, int], tuple[int, int], Box],
) -> None:
    picture, resized, part = case
    label = random_pixels(*picture)
    whole = F.interpolate(label[None, None], resized, mode="nearest")[0, 0]
    assert torch.equal(nearest_part(label, resized, part), cut(whole, part))


@pytest.mark.parametrize("resized", [(24, 40), (61, 70), (200, 300)])
def test_pillows_pictures_are_resized_as_tensors_are(resized: tuple[int, int]) -> None:
    pixels = random_pixels(48, 80, 3)
    part = Box(3, 7, 20, 30)
    actual = bilinear_part(Image.fromarray(pixels.numpy()), resized, part)
    assert torch.equal(actual, bilinear_part(pixels.permute(2, 0, 1), resized, part))
