from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import danet
from danet.cli import app
from danet.errors import UserError
from networks import attentive_danet


@pytest.mark.parametrize("point", [(-1, 0), (50, 0), (0, 37)])
def test_a_point_outside_is_refused(
    predictor: danet.Predictor, image: Image.Image, point: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match="outside the picture, which is 50x37"):
        danet.explain(predictor, image, point)


@pytest.mark.parametrize("point", [(1.5, 2), (1, 2, 3)])
def test_points_are_whole_pixels(
    predictor: danet.Predictor, image: Image.Image, point: tuple[float, ...]
) -> None:
    with pytest.raises(UserError, match="column and row in whole pixels"):
        danet.explain(predictor, image, point)


def test_a_network_without_attention_is_refused(image: Image.Image) -> None:
    with pytest.raises(UserError, match="no attention branch"):
        danet.explain(attentive_danet(position=False, channel=False), image, (0, 0))


@pytest.mark.parametrize(("position", "channel"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures_and_arrays(
    image: Image.Image, tmp_path: Path, position: bool, channel: bool, suffix: str
) -> None:
    explanation = danet.explain(attentive_danet(position, channel), image, (20, 30))
    figure = tmp_path / f"figure{suffix}"
    explanation.save(figure)
    if suffix == ".png":
        assert min(Image.open(figure).size) > 400
    else:
        text = figure.read_text(encoding="utf-8")
        assert text.lstrip().startswith("<?xml")
        assert text.count("<image") >= 3
    explanation.save_arrays(tmp_path / "arrays.npz")
    arrays = np.load(tmp_path / "arrays.npz", allow_pickle=False)
    assert ("attention" in arrays) == position
    assert ("strongest_channels" in arrays) == channel
    np.testing.assert_array_equal(arrays["classes_fused"], explanation.branches["fused"])
    if position:
        np.testing.assert_array_equal(arrays["attention"], explanation.attention)


def test_explain_writes_its_files_or_says_why_not(image: Image.Image, tmp_path: Path) -> None:
    attentive_danet().save_pretrained(tmp_path / "model")
    image.save(tmp_path / "a.png")
    run = CliRunner()
    arguments = ["explain", str(tmp_path / "model"), str(tmp_path / "a.png")]
    files = ["--out", str(tmp_path / "f.svg"), "--arrays", str(tmp_path / "f.npz")]
    done = run.invoke(app, [*arguments, "--point", "20,30", *files])
    assert done.exit_code == 0, done.output
    assert "pixel 20,30: class" in done.output
    assert (tmp_path / "f.svg").exists()
    assert (tmp_path / "f.npz").exists()
    for point, out, message in [
        ("20", "f.png", "write X,Y in pixels"),
        ("20,-3", "f.png", "write X,Y in pixels"),
        ("20,99", "f.png", "outside the picture"),
        ("20,30", "a.png", "is an input and would be overwritten"),
        ("20,30", "f.bmp", "choose one by suffix"),
    ]:
        failed = run.invoke(app, [*arguments, "--point", point, "--out", str(tmp_path / out)])
        assert isinstance(failed.exception, UserError)
        assert message in str(failed.exception)
        assert not (tmp_path / "f.png").exists()
