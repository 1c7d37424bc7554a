"""Whole pictures, sliding windows, scales and flips, and the metric, against mmsegmentation."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from danet.config import TestConfig
from danet.data import dataset_spec
from danet.evaluation.inference import predict_probabilities
from danet.evaluation.metrics import confusion_matrix, scores
from danet.interop.convert import convert
from danet.model import DANet

from .conftest import street, street_pictures

pytestmark = pytest.mark.slow

TESTS = {
    "whole": TestConfig(),
    "slide": TestConfig(mode="slide", window=(128, 96), stride=(80, 64)),
    "augmented": TestConfig(ratios=(0.5, 1.0, 1.75), flip=True),
}


@pytest.fixture(scope="module", params=street_pictures())
def picture(request: pytest.FixtureRequest) -> Tensor:
    """A street of an odd size, uint8 3 H W."""
    return street(*request.param)[0][:, 40:203, 100:341]


@pytest.fixture(scope="module")
def checkpoint(peer: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peer's network."""
    folder = tmp_path_factory.mktemp("peer")
    images, checkpoint = folder / "images.safetensors", folder / "weights.pth"
    save_file({"images": torch.zeros(1, 3, 64, 64)}, images)
    peer("model", "--images", images, "--checkpoint", checkpoint, "--out", folder / "unused")
    return checkpoint


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", TESTS)
def test_label_maps_are_the_peers(
    name: str,
    align_corners: bool,
    picture: Tensor,
    checkpoint: Path,
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    image, out = tmp_path / "image.safetensors", tmp_path / "out.safetensors"
    save_file({"image": picture.permute(1, 2, 0).contiguous()}, image)
    options = ["--align-corners"] if align_corners else []
    files = ("--checkpoint", checkpoint, "--image", image, "--out", out)
    peer("predict", "--test", name, *options, *files)
    theirs = load_file(out)
    model = convert(checkpoint)
    model.config = model.config.model_copy(update={"align_corners": align_corners})
    with torch.inference_mode():
        ours = predict_probabilities(model, picture, TESTS[name])
    expected, labels = theirs["scores"], theirs["labels"]
    difference = (ours - expected).abs().max().item()
    disagree = ours.argmax(0) != labels
    first, second = expected.topk(2, 0).values
    print(f"{name} align_corners={align_corners}: {difference:.1e}, {disagree.sum()} pixels")
    assert difference < 1e-4
    assert (first - second)[disagree].lt(2e-4).all()  # ties only
    assert len(labels.unique()) >= 3
    assert expected.std((1, 2)).max() > 0.05  # the scores differ between places


def test_a_cityscapes_submission_scores_officially_what_we_say(
    peer: Callable[..., str], tmp_path: Path
) -> None:
    """From the command line, on a miniature of the data set with every label id."""
    random = np.random.default_rng(0)
    for city, number in (("ulm", 1), ("ulm", 2), ("bonn", 1)):
        name = f"{city}_00000{number}_000019"
        pixels = random.integers(0, 256, (6, 12, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        ids = random.integers(0, 34, (6, 12), np.uint8).repeat(16, 0).repeat(16, 1)
        for folder, suffix, array in (
            ("leftImg8bit", "leftImg8bit", pixels),
            ("gtFine", "gtFine_labelIds", ids),
        ):
            path = tmp_path / f"{folder}/val/{city}/{name}_{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    torch.manual_seed(0)
    spec = dataset_spec("cityscapes")
    model = DANet(19, backbone="test_resnet", pretrained_backbone=False, head_channels=32)
    model.metadata = model.metadata.model_copy(
        update={"classes": spec.classes, "palette": spec.palette}
    )
    with torch.no_grad():
        model.head.fused_classifier[1].weight.mul_(100)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "labels"
    arguments = ["evaluate", tmp_path / "model", "--data", "cityscapes", "--root", tmp_path]
    arguments += ["--submission", out, "--json", tmp_path / "scores.json"]
    subprocess.run([sys.executable, "-m", "danet", *map(str, arguments)], check=True)

    printed = peer("cityscapes", "--root", tmp_path, "--predictions", out)
    theirs = json.loads(printed.splitlines()[-1])
    ours = json.loads((tmp_path / "scores.json").read_text())["per_class"]
    assert len(np.unique(np.stack([np.asarray(Image.open(p)) for p in out.iterdir()]))) > 3
    assert sum(score["IoU"] > 0 for score in ours.values()) > 3
    for name, score in ours.items():
        assert score["IoU"] == pytest.approx(theirs[name], abs=1e-9)


def test_scores_are_those_of_ioumetric(peer: Callable[..., str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truths = torch.randint(0, 18, (4, 60, 80), generator=generator)
    noise = torch.randint(0, 18, truths.shape, generator=generator)
    predictions = truths.where(torch.rand(truths.shape, generator=generator) < 0.7, noise)
    truths[:, :10] = 255
    truths[truths == 3] = 4
    maps = {"predictions": predictions.byte(), "truths": truths.byte()}
    save_file(maps, tmp_path / "maps.safetensors")
    printed = peer("metric", "--maps", tmp_path / "maps.safetensors", "--num-classes", 19)
    theirs = json.loads(printed.splitlines()[-1])
    ours = scores(confusion_matrix(truths, predictions, 19))
    assert ours.overall_accuracy == pytest.approx(theirs["aAcc"][0], abs=1e-6)
    for index, score in enumerate(ours.per_class):
        assert score.iou == pytest.approx(theirs["IoU"][index], abs=1e-6, nan_ok=True)
        assert score.accuracy == pytest.approx(theirs["Acc"][index], abs=1e-6, nan_ok=True)
    means = torch.tensor([theirs["IoU"], theirs["Acc"]], dtype=torch.float64).nanmean(1).tolist()
    assert [ours.mean_iou, ours.mean_accuracy] == pytest.approx(means, abs=1e-6)
