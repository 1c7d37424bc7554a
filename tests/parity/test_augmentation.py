"""Training pictures against mmsegmentation's pipeline."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from danet.config import DataConfig
from danet.data.resize import Box, nearest_part
from danet.data.transforms import (
    NormalizeAndPad,
    PhotometricDistortion,
    RandomScaledCrop,
    fitted_size,
)

from .conftest import street, street_pictures

pytestmark = pytest.mark.slow

KEPT = 24


@pytest.fixture(scope="module", params=street_pictures())
def sample(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tv_tensors.Image, tv_tensors.Mask, Path]:
    """A street's image and label, and the file that the peer reads them from."""
    image, label = street(*request.param)
    path = tmp_path_factory.mktemp("sample") / "sample.safetensors"
    save_file({"image": image.permute(1, 2, 0).contiguous(), "label": label}, path)
    return tv_tensors.Image(image), tv_tensors.Mask(label), path


def between_two_pixels(size: tuple[int, int], scaled: tuple[int, int]) -> tv_tensors.Mask:
    """1 where the nearest pixel is a matter of rounding: OpenCV asks in float64, torch in float32.

    The source coordinate, whose whole part is the nearest pixel, is then itself whole.
    """
    columns, rows = (
        (np.arange(new) * (old / new) + 1e-4) % 1 < 2e-4
        for old, new in zip(size, scaled, strict=True)
    )
    return tv_tensors.Mask(torch.from_numpy(columns[None] | rows[:, None]).to(torch.uint8))


@pytest.mark.parametrize(
    ("base", "crop"), [((480, 240), (192, 160)), ((640, 160), (224, 224))], ids=["inside", "padded"]
)
def test_pictures_are_equal_pixel_for_pixel_given_the_same_draws(
    base: tuple[int, int],
    crop: tuple[int, int],
    sample: tuple[tv_tensors.Image, tv_tensors.Mask, Path],
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    image, label, path = sample
    out = tmp_path / "out.safetensors"
    options = ("--base", *base, "--crop", *crop, "--count", KEPT, "--kept", KEPT)
    peer("augment", "--sample", path, *options, "--out", out)
    theirs = load_file(out)
    config = DataConfig()
    normalize_and_pad = NormalizeAndPad(crop, config.mean, config.std)
    size = (image.shape[-1], image.shape[-2])
    levels, ids = 0.0, 0
    for draw, expected_image, expected_label in zip(
        theirs["draws"].tolist(), theirs["images"], theirs["labels"], strict=True
    ):
        *bounds, left, top, mirrored = draw
        width, height = fitted_size(size, (bounds[0], bounds[1]))
        box = Box(top, left, min(crop[1], height), min(crop[0], width))
        scaled = (height, width)
        part = nearest_part(label.as_subclass(Tensor), scaled, box)
        params = {"scaled": scaled, "box": box, "label": part}
        scaled_crop = RandomScaledCrop(None, (1, 1), crop, 0.75)
        cuts = [scaled_crop.transform(item, params) for item in (image, label)]
        made: list[Tensor] = []
        for cut in (*cuts, TF.crop(between_two_pixels(size, (width, height)), *box)):
            padded = normalize_and_pad.transform(TF.hflip(cut) if mirrored else cut, {})
            made.append(padded.as_subclass(Tensor))
        torch.testing.assert_close(made[1][made[2] != 1], expected_label[made[2] != 1])
        ids += int((made[1] != expected_label).sum())
        difference = (made[0] - expected_image).abs()
        levels = max(levels, (difference * torch.tensor(config.std).view(3, 1, 1)).max().item())
    print(f"largest difference in levels of 255: {levels:.3g}; {ids} label pixels between two")
    assert levels < 1.01  # OpenCV rounds the bilinear weights to 11 bits
    assert ids < 1e-3 * KEPT * crop[0] * crop[1]


def test_draws_are_distributed_alike(
    sample: tuple[tv_tensors.Image, tv_tensors.Mask, Path],
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Scale, crop position (after the class cap) and flip of 10,000 draws on a small picture."""
    image, label, _ = sample
    image, label = (item[..., ::4, ::4] for item in (image, label))
    image, label = tv_tensors.Image(image), tv_tensors.Mask(label)
    size = (image.shape[-1], image.shape[-2])
    crop, count = (40, 30), 10_000
    path, out = tmp_path / "sample.safetensors", tmp_path / "out.safetensors"
    pixels = image.as_subclass(Tensor).permute(1, 2, 0).contiguous()
    save_file({"image": pixels, "label": label.as_subclass(Tensor).contiguous()}, path)
    options = ("--base", *size, "--crop", *crop, "--count", count, "--kept", 1)
    peer("augment", "--sample", path, *options, "--out", out)
    theirs = load_file(out)["draws"]

    torch.manual_seed(0)
    transform = RandomScaledCrop(size, (0.5, 2.0), crop, 0.75)
    ours = []
    for _ in range(count):
        params = transform.make_params([image, label])
        ours.append([params["scaled"][1], params["box"].left, params["box"].top])
    drawn = torch.tensor(ours)
    widths = torch.tensor([fitted_size(size, (w, h))[0] for w, h in theirs[:, :2].tolist()])
    for name, first, second in (
        ("width", drawn[:, 0], widths),
        ("left", drawn[:, 1], theirs[:, 2]),
        ("top", drawn[:, 2], theirs[:, 3]),
    ):
        probability = ks_2samp(first.numpy(), second.numpy()).pvalue
        print(f"{name}: Kolmogorov-Smirnov p = {probability:.2f}")
        assert probability > 1e-3, name
    assert abs(theirs[:, 4].double().mean() - DataConfig().flip) < 0.02


# One answer per question of the peer: brightness?, how much; contrast first?; and so on.
DISTORTIONS = {
    "nothing": ([0, 1, 0, 0, 0], {}),
    "brightness": ([1, 20.5, 1, 0, 0, 0], {"brightness": 20.5}),
    "contrast first": ([0, 1, 1, 1.37, 0, 0], {"contrast": 1.37, "contrast_first": True}),
    "contrast last": ([0, 0, 0, 0, 1, 0.61], {"contrast": 0.61}),
    "saturation": ([0, 1, 0, 1, 1.4, 0], {"saturation": 1.4}),
    "hue": ([0, 1, 0, 0, 1, 13], {"hue": 13 / 180}),
}
UNCHANGED = {
    "brightness": None,
    "contrast": None,
    "saturation": None,
    "hue": None,
    "contrast_first": False,
}


def test_colours_change_alike(
    sample: tuple[tv_tensors.Image, tv_tensors.Mask, Path],
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    image, _, path = sample
    draws, out = tmp_path / "draws.json", tmp_path / "out.safetensors"
    draws.write_text(json.dumps({name: answers for name, (answers, _) in DISTORTIONS.items()}))
    peer("distort", "--sample", path, "--draws", draws, "--out", out)
    theirs = load_file(out)
    for name, (_, params) in DISTORTIONS.items():
        ours = PhotometricDistortion().transform(image, {**UNCHANGED, **params})
        expected = theirs[name].permute(2, 0, 1).float()
        difference = (ours.as_subclass(Tensor).float() - expected).abs()
        print(f"{name}: mean {difference.mean():.3f}, largest {difference.max():.0f} of 255")
        if name in ("saturation", "hue"):  # OpenCV keeps hue in 180 and saturation in 256 steps
            assert difference.mean() < 1.5
            assert np.quantile(difference.numpy(), 0.999) <= 6
        else:
            assert difference.max() == 0
