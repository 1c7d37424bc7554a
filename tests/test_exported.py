"""Segmenting with exported files."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import danet
from danet.cli import app
from danet.data.scenes import render
from danet.devices import uses_bfloat16
from danet.errors import LogitsNotFinite, UserError
from danet.export import export
from danet.export.predictor import ExportedPredictor
from networks import tiny_danet


@pytest.fixture(scope="module")
def model() -> danet.DANet:
    return tiny_danet()


@pytest.fixture(scope="module")
def files(model: danet.DANet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(model, folder / "m.onnx", "onnx")
    export(model, folder / "m.xml", "openvino")
    return folder


@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
@pytest.mark.parametrize("size", [(96, 64), (51, 77), (20, 40)])
def test_classes_are_the_models(
    name: str, size: tuple[int, int], model: danet.DANet, files: Path
) -> None:
    picture = render(2, 5)[0].resize(size)
    found = ExportedPredictor(files / name, precision="fp32")(picture)
    # What is smaller than a graph takes is filled up by its edge.
    width, height = (max(32, side) for side in size)
    rows, columns = (np.arange(n).clip(max=m - 1) for n, m in ((height, size[1]), (width, size[0])))
    filled = np.asarray(picture)[rows][:, columns]
    expected = danet.Predictor(model, device="cpu", precision="fp32")(filled)
    assert found.classes.shape == (size[1], size[0])
    assert (found.classes == expected.classes[: size[1], : size[0]]).mean() > 0.999
    assert found.class_names == expected.class_names
    assert found.palette == expected.palette


@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_probabilities_are_the_models(name: str, model: danet.DANet, files: Path) -> None:
    exported = ExportedPredictor(files / name, precision="fp32")
    picture = render(2, 5)[0].resize((51, 77))
    found = exported(picture, probabilities=True)
    expected = danet.Predictor(model, device="cpu", precision="fp32")(picture)
    assert found.probabilities.shape == (5, 77, 51)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
    np.testing.assert_array_equal(exported(picture).probabilities, found.probabilities)
    assert found.overlay().size == picture.size
    assert exported.segment_batch(np.zeros((0, 64, 64, 3), np.uint8)) == []


def test_openvino_computes_in_bfloat16_where_asked_to(model: danet.DANet, files: Path) -> None:
    picture = render(2, 5)[0].resize((96, 64))
    exact, rounded = (
        ExportedPredictor(files / "m.xml", precision)._logits(
            np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255
        )
        for precision in ("fp32", "bf16")
    )
    fingerprints = {ExportedPredictor(files / "m.xml", p).fingerprint() for p in ("fp32", "bf16")}
    assert len(fingerprints) == 2
    difference = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert difference < 0.05
    if uses_bfloat16("auto", torch.device("cpu")):
        assert difference > 1e-5
    with pytest.raises(UserError, match="ONNX Runtime has no bf16"):
        ExportedPredictor(files / "m.onnx", "bf16")
    for name in ("m.onnx", "m.xml"):
        with pytest.raises(UserError, match="precision typo: use auto, fp32 or bf16"):
            ExportedPredictor(files / name, "typo")


def test_other_weights_beside_the_same_graph_are_another_model(files: Path, tmp_path: Path) -> None:
    for name in ("m.xml", "m.bin"):
        shutil.copy(files / name, tmp_path / name)
    before = ExportedPredictor(tmp_path / "m.xml", "fp32").fingerprint()
    assert before == ExportedPredictor(files / "m.xml", "fp32").fingerprint()
    weights = bytearray((tmp_path / "m.bin").read_bytes())
    weights[-4] ^= 1
    (tmp_path / "m.bin").write_bytes(weights)
    assert ExportedPredictor(tmp_path / "m.xml", "fp32").fingerprint() != before


def test_predict_takes_a_file_for_the_model(files: Path, tmp_path: Path) -> None:
    for index in range(3):
        render(2, index)[0].resize((64, 48)).save(tmp_path / f"{index}.png")
    runner = CliRunner()
    command = ["predict", str(files / "m.onnx"), str(tmp_path), "--out", str(tmp_path / "out")]
    first = runner.invoke(app, command, catch_exceptions=False)
    assert "3 of 3" in first.stdout
    again = runner.invoke(app, command, catch_exceptions=False)
    assert "3 were already done" in again.stdout
    other = [command[0], str(files / "m.xml"), *command[2:]]
    assert "3 of 3" in runner.invoke(app, other, catch_exceptions=False).stdout
    with Image.open(tmp_path / "out" / "0.png") as mask:
        expected = ExportedPredictor(files / "m.xml")(tmp_path / "0.png").classes
        np.testing.assert_array_equal(np.asarray(mask), expected)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.onnx", None, "no such file"),
        ("none.xml", None, "no such file"),
        ("damaged.onnx", b"ONNX", "cannot be opened"),
        ("damaged.xml", b"<html>", "not an OpenVINO model"),
        (
            "cut.xml",
            b'<?xml version="1.0"?><net name="m" version="11"><layers>',
            "cannot be opened",
        ),
        ("alone.xml", b"<net>", "its weights are missing; put alone.bin beside it"),
        ("program.pt2", b"PK", "or the model folder"),
    ],
)
def test_other_files_are_refused(
    name: str, content: bytes | None, problem: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.bin").touch()
    with pytest.raises(UserError, match=problem) as error:
        ExportedPredictor(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (None, "does not say its classes"),
        ("{", "damaged"),
        ('{"classes": ["a"], "palette": []}', "damaged"),
        ('{"classes": ["a"], "palette": [[1, 2, 3]]}', "is expected"),
    ],
)
def test_a_graph_must_have_the_classes_that_it_says(
    metadata: str | None, problem: str, files: Path, tmp_path: Path
) -> None:
    foreign = onnx.load(files / "m.onnx")
    del foreign.metadata_props[:]
    if metadata is not None:
        onnx.helper.set_model_props(foreign, {"danet": metadata})
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match=problem):
        ExportedPredictor(tmp_path / "foreign.onnx")(render(2, 0)[0])


def test_logits_that_are_not_finite_are_refused(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = ExportedPredictor(files / "m.onnx")
    logits = np.zeros((1, 5, 40, 40), np.float32)
    logits[0, 2, 3, 4] = np.nan
    monkeypatch.setattr(predictor, "_logits", lambda _: logits)
    with pytest.raises(LogitsNotFinite, match="not finite"):
        predictor(Image.new("RGB", (40, 40)))


def test_a_foreign_graph_that_takes_something_else_is_an_error_per_picture(tmp_path: Path) -> None:
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["images"], ["logits"])],
        "other",
        [onnx.helper.make_tensor_value_info("images", kind, [1, 3])],
        [onnx.helper.make_tensor_value_info("logits", kind, [1, 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.helper.set_model_props(model, {"danet": '{"classes": ["a"], "palette": [[1, 2, 3]]}'})
    onnx.save(model, tmp_path / "other.onnx")
    render(2, 0)[0].save(tmp_path / "photo.png")
    command = ["predict", str(tmp_path / "other.onnx"), str(tmp_path / "photo.png")]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "photo.png" in result.stderr
    assert "does not take pictures as" in result.stderr


@pytest.mark.parametrize("option", [["--device", "cuda"], ["--compile"]])
def test_options_of_the_network_do_not_go_with_a_file(
    option: list[str], files: Path, tmp_path: Path
) -> None:
    render(2, 0)[0].save(tmp_path / "photo.png")
    command = ["predict", str(files / "m.onnx"), str(tmp_path / "photo.png"), *option]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert "as it was exported" in str(result.exception)


@pytest.fixture
def folder_of_scenes(tmp_path: Path) -> Path:
    """Three scenes of 5 classes in the layout of dataset `folder`."""
    root = tmp_path / "scenes"
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    (root / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    for index in range(3):
        image, label = render(2, index)
        image.save(root / "images" / "val" / f"{index}.png")
        Image.fromarray(label % 5).save(root / "labels" / "val" / f"{index}.png")
    return root


@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_files_are_scored_like_their_model(
    name: str, model: danet.DANet, files: Path, tmp_path: Path, folder_of_scenes: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    found = []
    for subject in (files / name, tmp_path / "model"):
        scores = tmp_path / f"{subject.name}.json"
        command = ["evaluate", str(subject), "--data", "folder", "--root", str(folder_of_scenes)]
        result = CliRunner().invoke(app, [*command, "--precision", "fp32", "--json", str(scores)])
        assert result.exit_code == 0, result.output
        found.append(json.loads(scores.read_text()))
    assert found[0]["images"] == found[1]["images"] == 3
    assert found[0]["test"] is None
    difference = np.subtract(found[0]["confusion"], found[1]["confusion"])
    assert np.abs(difference).sum() < 1e-3 * np.sum(found[1]["confusion"])


@pytest.mark.parametrize(
    "option", [["--flip"], ["--multi-scale"], ["--branches"], ["--mode=slide"]]
)
def test_files_refuse_other_protocols(option: list[str], files: Path) -> None:
    result = CliRunner().invoke(
        app, ["evaluate", str(files / "m.onnx"), "--data", "scenes", *option]
    )
    assert isinstance(result.exception, UserError)
    assert "scored as it predicts" in str(result.exception)


def test_threads_share_an_openvino_file(files: Path) -> None:
    predictor = ExportedPredictor(files / "m.xml")
    picture = np.asarray(render(2, 7)[0])
    expected = predictor(picture).classes
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: predictor(picture).classes, range(12)):
            assert np.array_equal(found, expected)
