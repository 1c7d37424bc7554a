from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import danet
from danet.config import PUBLISHED_RATIOS, DataConfig, RunConfig
from danet.errors import UserError
from danet.evaluation.run import _dataset_of, evaluate_model
from danet.model_folder import RECIPE_FILE
from networks import tiny_danet


@pytest.fixture(scope="module")
def model() -> danet.DANet:
    """Of three classes, and trained on a folder."""
    network = tiny_danet(3, channel=False)
    network.metadata = network.metadata.model_copy(update={"dataset": "folder"})
    return network


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    (root / "classes.txt").write_text("a\nb\nc\n")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, values, shape in (("images", 256, (48, 64, 3)), ("labels", 3, (48, 64))):
            (root / kind / split).mkdir(parents=True)
            for name in "xy":
                pixels = generator.integers(0, values, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / kind / split / f"{name}.png")
    return root


def test_a_model_is_scored_by_the_protocol_that_was_asked_for(
    model: danet.DANet, dataset: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    result = evaluate_model(
        model,
        root=dataset,
        mode="slide",
        multi_scale=True,
        branches=True,
        precision="fp32",
        say=notes.append,
    )
    tree = result.to_json()
    assert (tree["dataset"], tree["split"], tree["images"]) == ("folder", "val", 2)
    assert tree["test"]["mode"] == "slide"
    assert tuple(tree["test"]["ratios"]) == PUBLISHED_RATIOS
    assert list(tree["branches"]) == ["fused", "position"]
    assert np.sum(tree["confusion"]) == 2 * 48 * 64
    assert len(notes) == 1
    assert "3 of 3 class names" in notes[0]
    result.write_report(tmp_path / "report.html", "mine")
    page = (tmp_path / "report.html").read_text()
    assert "mine" in page
    assert "float32 on cpu" in page


def test_the_runs_recipe_says_where_its_dataset_is(
    model: danet.DANet, dataset: Path, tmp_path: Path
) -> None:
    recipe = RunConfig(data=DataConfig(name="folder", root=dataset))
    (tmp_path / RECIPE_FILE).write_text(recipe.to_yaml())
    assert evaluate_model(model, run=tmp_path).to_json()["images"] == 2
    with pytest.raises(UserError):
        evaluate_model(model)
    moved = RunConfig(data=DataConfig(name="folder", root=Path("elsewhere")))
    (tmp_path / RECIPE_FILE).write_text(moved.to_yaml())
    with pytest.raises(
        UserError, match=r"recipe\.yaml: data\.root=elsewhere does not exist.*--root"
    ):
        evaluate_model(model, run=tmp_path)


def test_settings_of_the_test_can_be_changed(model: danet.DANet, dataset: Path) -> None:
    window = {"mode": "slide", "window": [32, 32], "stride": [16, 16]}
    result = evaluate_model(model, root=dataset, settings=window)
    assert result.test == model.metadata.test.model_copy(
        update={"mode": "slide", "window": (32, 32), "stride": (16, 16)}
    )
    assert "slide, windows of 32x32 every 16x16" in result.facts["Protocol"]
    with pytest.raises(UserError, match="test: windw: unknown key; did you mean window"):
        evaluate_model(model, root=dataset, settings={"windw": [32, 32]})


def test_what_is_not_asked_for_is_as_the_model_says(model: danet.DANet, dataset: Path) -> None:
    settings = {"flip": True, "mode": "slide", "window": (32, 32), "stride": (24, 24)}
    flipped = tiny_danet(3)
    test = flipped.metadata.test.model_copy(update={**settings, "ratios": (0.5,)})
    flipped.metadata = model.metadata.model_copy(update={"test": test})
    for asked, expected in (
        ({}, test),
        ({"mode": "whole"}, test.model_copy(update={"mode": "whole"})),
    ):
        assert evaluate_model(flipped, root=dataset, precision="fp32", **asked).test == expected


def test_mistakes_are_told(model: danet.DANet, dataset: Path) -> None:
    with pytest.raises(UserError, match="mode: Input should be 'whole' or 'slide'"):
        evaluate_model(model, root=dataset, mode="tiles")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not say what it was trained on"):
        evaluate_model(tiny_danet(3))


def test_a_split_without_labels_is_segmented_for_its_server_only(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit/VOC2012"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/test.txt").write_text("a\nb\n")
    (voc / "JPEGImages").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 32)).save(voc / f"JPEGImages/{name}.jpg")
    network = tiny_danet(21)
    with pytest.raises(UserError, match="has no labels, its server has them"):
        evaluate_model(network, "voc", tmp_path, "test")
    out = tmp_path / "results"
    result = evaluate_model(network, "voc", tmp_path, "test", submission=out)
    tree = result.to_json()
    assert (tree["mIoU"], tree["images"]) == (None, 2)
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert Image.open(out / "a.png").size == (40, 32)
    (tmp_path / "link").symlink_to(voc, target_is_directory=True)
    for folder in (voc, tmp_path / "link"):
        with pytest.raises(UserError, match="the dataset's own files are there"):
            evaluate_model(network, "voc", tmp_path, "test", submission=folder / "JPEGImages")
    assert len(list((voc / "JPEGImages").iterdir())) == 2
    test = network.metadata.test.model_copy(update={"scale": (64, 48)})
    network.metadata = network.metadata.model_copy(update={"test": test})
    result = evaluate_model(network, "voc", tmp_path, "test", submission=out)
    result.write_report(tmp_path / "report.html", "mine")
    report = (tmp_path / "report.html").read_text()
    assert "voc test" in report
    assert "whole, pictures fitted into 64x48, scales 1" in report


def test_lines_of_metrics_that_are_none_are_skipped(
    model: danet.DANet, dataset: Path, tmp_path: Path
) -> None:
    good = '{"step": 2, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"loss": 1.0}}\n{{"step": 1, "loss": "bad"}}\n{good}'
    )
    result = evaluate_model(model, root=dataset, precision="fp32", run=tmp_path)
    assert result.history == [{"step": 2, "loss": 0.5}]
    result.write_report(tmp_path / "report.html", "mine")


def test_another_dataset_does_not_lie_where_the_runs_does(tmp_path: Path) -> None:
    recipe = RunConfig(data=DataConfig(name="folder", root=tmp_path))
    (tmp_path / RECIPE_FILE).write_text(recipe.to_yaml())
    assert _dataset_of("folder", tmp_path, None, None) == ("folder", tmp_path)
    assert _dataset_of("folder", tmp_path, "camvid", None) == ("camvid", None)
