"""The command as a user calls it: what it prints, what it writes, and how it ends."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

import danet
from danet.bench.workload import Workload
from danet.cli import main
from danet.cli.options import note_protocol
from danet.config import TestConfig
from danet.model_folder import Metadata


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process, as its entry point does."""

    def call(*arguments: object, status: int = 0) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["danet", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:  # noqa: PT012 - success does not exit
            main()
            sys.exit(0)
        outcome = Outcome(ended.value.code or 0, *capfd.readouterr())
        assert outcome.status == status, outcome.stderr
        return outcome

    return call


@pytest.fixture
def fails(run: Command) -> Callable[..., str]:
    """Runs a command that must end with status 2 and one line; returns the line."""

    def call(*arguments: object) -> str:
        outcome = run(*arguments, status=2)
        lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, outcome.stderr
        assert "Traceback" not in outcome.stderr
        return lines[0]

    return call


def test_a_mistake_ends_the_process_with_one_line_and_status_2() -> None:
    """The real thing once: `python -m danet`, its exit status and its standard error."""
    result = subprocess.run(
        [sys.executable, "-m", "danet", "config", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "error: recipe nowhere: no such recipe or file; see danet recipes\n"


def test_output_that_cannot_be_written_is_told() -> None:
    """Found when the last of it is flushed: a disk that is full."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "danet", "recipes"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.startswith("error: standard output or a temporary file: No space left")
    assert len(result.stderr.splitlines()) == 1


def test_characters_that_a_terminal_lacks_are_spelt_out(dataset: Path, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).symlink_to(dataset / kind)
    classes = (dataset / "classes.txt").read_text().splitlines()
    (tmp_path / "classes.txt").write_text("\n".join(["Straße", *classes[1:]]), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "danet", "data", "check", "folder", tmp_path],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert r"Stra\xdfe" in result.stdout


def test_what_may_not_be_read_is_one_line(
    dataset: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    said = fails("data", "check", "folder", dataset)
    assert said.endswith(
        "Permission denied; check that this user may read it, and its folder, or write there"
    )
    assert str(dataset) in said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = danet.data.dataset_spec("scenes")
    folder = tmp_path_factory.mktemp("model")
    metadata = Metadata(classes=spec.classes, palette=spec.palette, dataset="scenes")
    danet.DANet(
        11, "test_resnet", pretrained_backbone=False, head_channels=16, metadata=metadata
    ).save_pretrained(folder)
    return folder


def test_train_evaluate_predict_on_a_users_own_folder(
    dataset: Path, tmp_path: Path, run: Command
) -> None:
    out = tmp_path / "run"
    settings = {
        "data.name": "folder",
        "data.root": dataset,
        "data.crop_size": "[64, 64]",
        "data.workers": 0,
        "data.train_images": "null",
        "model.head_channels": 16,
        "train.steps": 2,
        "train.batch_size": 2,
    }
    trained = run(
        "train", "demo", "--out", out, *(f"--set={key}={value}" for key, value in settings.items())
    )
    assert trained.stdout == f"model: {out / 'model'}\n"
    assert "2/2" in trained.stderr

    scores, report = tmp_path / "scores.json", tmp_path / "report.html"
    evaluated = run("evaluate", out, "--branches", "--flip", "--json", scores, "--report", report)
    tree = json.loads(scores.read_text())
    assert tree["images"] == 3
    assert set(tree["branches"]) == {"fused", "position", "channel"}
    assert f"mIoU {tree['mIoU']:.4f}" in evaluated.stdout
    assert tree["test"]["flip"] is True
    assert report.read_text().count("<img") == 12

    masks = tmp_path / "masks"
    run("predict", out, dataset / "images/val", "--out", masks, "--overlay")
    assert sorted(path.name for path in masks.iterdir()) == sorted(
        ["manifest.jsonl"]
        + [name for index in range(3) for name in (f"{index}.png", f"{index}_overlay.jpg")]
    )
    assert Image.open(masks / "0.png").size == (96, 72)


def test_predict_passes_over_broken_files(model: Path, tmp_path: Path, run: Command) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    out = tmp_path / "out"
    inputs = (tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "missing.png")
    result = run("predict", model, *inputs, "--out", out, status=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert sorted(path.name for path in out.iterdir()) == ["good.png", "manifest.jsonl"]
    assert "1 of 2 pictures" in result.stdout


def test_sliding_and_multi_scale_evaluation(
    model: Path, dataset: Path, tmp_path: Path, run: Command
) -> None:
    out = tmp_path / "scores.json"
    arguments = ("--data", "folder", "--root", dataset, "--json", out)
    run("evaluate", model, *arguments, "--mode", "slide", "--multi-scale")
    test = json.loads(out.read_text())["test"]
    assert test["mode"] == "slide"
    assert test["ratios"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_config_prints_the_resolved_recipe(run: Command) -> None:
    printed = run("config", "demo", "--set", "train.seed=5").stdout
    tree = yaml.safe_load(printed)
    assert tree["train"]["seed"] == 5
    assert set(tree) == {"model", "data", "train", "test"}


def test_recipes_and_datasets_are_listed(run: Command) -> None:
    assert {"camvid", "folder", "scenes"} <= set(run("data", "list").stdout.split())
    assert "demo" in run("recipes").stdout


LONG = "x" * 300
"""Longer than a file's name may be."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere"), "see danet recipes"),
        (("train", "demo", "--set", "train.stepz=1"), "did you mean steps"),
        (("train", "camvid"), "data.root=DIR"),
        (("train", "camvid", "--set", "data.root=/nowhere"), "not a folder"),
        (("train", "demo", "--set", "data.name=scene"), "there are ade20k, camvid"),
        (("train", "demo", "--set", "train.device=mps"), "none on this machine"),
        (("train", "demo", "--set", "model.backbone=resnet7"), "no 'resnet7'"),
        (("train", "demo", "--set", "model.init_from=/nowhere"), "no such folder"),
        (("evaluate", "/nowhere"), "no such folder"),
        (("serve", "street-small", "--host", ""), "--host is empty"),
        (("evaluate", __file__), "is a file"),
        (("predict", "street-small", "", "--out", "/tmp/x"), "an input is empty"),
        (("predict", "/nowhere", __file__, "--out", "/tmp/x"), "no such folder"),
        (("config", "demo", "--set", "train"), "SECTION.KEY=VALUE"),
        (("train", "demo", "--set", f"model.init_from={LONG}"), LONG),
        (("train", "demo", "--set", f"model.backbone_weights={LONG}"), LONG),
        (("train", "camvid", "--set", f"data.root={LONG}"), LONG),
        (("evaluate", LONG), LONG),
        (("evaluate", f"{LONG}.onnx"), LONG),
        (("predict", LONG, __file__, "--out", "/tmp/x"), LONG),
        (("bench", "demo", "--estimate", "--memory", "nan"), "--memory nan: give GiB above 0"),
        (("bench", "demo", "--estimate", "--memory", "inf"), "--memory inf: give GiB above 0"),
        (("bench", "demo", "--estimate", "--memory=-1"), "--memory -1: give GiB above 0"),
        (("bench", "demo", "--memory", "24"), "--memory goes with --estimate"),
        (("bench", "demo", "--estimate", "--peer"), "leave it out, or leave out --peer"),
        (("bench", "demo", "--estimate", "--compile"), "leave it out, or leave out --compile"),
        (
            ("bench", "demo", "--estimate", "--rounds", "3", "--repeats", "3"),
            "--estimate measures nothing; leave it out, or leave out --rounds and --repeats",
        ),
        (("bench", "demo", "--device", "cpu:foo"), "use cpu or cpu:0"),
        (("convert", LONG, "--out", "/nowhere"), LONG),
        (("convert", "/nowhere.pth", "--out", "/nowhere"), "no such file"),
        (
            ("convert", __file__, "--out", "/nowhere"),
            "damaged, or not a checkpoint of tensors (not a torch file of plain values)",
        ),
        (
            ("bench", "demo", "--train", "--set", "train.class_weights=[1, 2]"),
            "2 weights, but scenes has 11 classes",
        ),
        (
            ("bench", "demo", "--train", "--compile", "--set", "train.activation_checkpointing=1"),
            "exclude each other",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: tuple[object, ...], message: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = ("--out", tmp_path / "run") if arguments[0] == "train" else ()
    assert message in fails(*arguments, *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "tiles"), "'--mode': 'tiles' is not one of 'whole', 'slide'"),
        (("--precision", "fp8"), "'fp8' is not one of 'auto', 'fp32', 'bf16'"),
        (("--device", "tpu"), "unknown"),
        (("--split", "dev"), "no split 'dev'"),
        (("--data", "camvid"), "data.root"),
    ],
)
def test_mistakes_in_evaluating_are_told_in_one_line(
    model: Path, options: tuple[str, ...], message: str, fails: Callable[..., str]
) -> None:
    assert message in fails("evaluate", model, *options)


def test_a_dataset_of_other_classes(
    model: Path, dataset: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).symlink_to(dataset / kind)
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghijkl"))
    line = fails("evaluate", model, "--data", "folder", "--root", tmp_path)
    assert "11 classes but dataset folder has 12" in line


def test_a_dataset_of_as_many_other_classes(
    model: Path, dataset: Path, tmp_path: Path, run: Command
) -> None:
    arguments = ("evaluate", model, "--data", "folder", "--root")
    assert "note" not in run(*arguments, dataset).stderr
    for kind in ("images", "labels"):
        (tmp_path / kind).symlink_to(dataset / kind)
    (tmp_path / "classes.txt").write_text("\n".join(["[/b]", "[red]", "\x1b[2J", *"defghijk"]))
    evaluated = run(*arguments, tmp_path)
    notes = [line for line in evaluated.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "11 of 11 class names are not those of dataset folder" in notes[0]
    assert "mIoU" in evaluated.stdout
    for name in ("[/b]", "[red]", r"\x1b[2J"):  # neither markup nor orders to the terminal
        assert name in evaluated.stdout


def test_label_out_of_range_stops_training_with_its_file(
    dataset: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).symlink_to(dataset / name)
    (tmp_path / "classes.txt").write_text("only\n")
    line = fails(
        *("train", "demo", "--out", tmp_path / "run"),
        *("--set", "data.name=folder", "--set", f"data.root={tmp_path}"),
        *("--set", "data.train_images=null", "--set", "data.workers=1"),
    )
    assert "labels/train" in line
    assert "does not define" in line


def test_unwritable_output(model: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "file").touch()
    line = fails("predict", model, tmp_path / "a.png", "--out", tmp_path / "file")
    assert "file" in line


@pytest.mark.parametrize("wrong", ["model", "picture"])
def test_wrong_input_leaves_no_folder(
    wrong: str, model: Path, tmp_path: Path, run: Command
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    named = {"model": model, "picture": picture, wrong: tmp_path / "nowhere"}
    for command in ("predict", "explain"):
        out = tmp_path / f"{command}.out" / "why.png"
        run(command, named["model"], named["picture"], "--out", out, status=2)
        assert not out.parent.exists()


@pytest.mark.parametrize(
    "arguments", [("export", "--format", "onnx", "--out"), ("evaluate", "--json")]
)
def test_a_missing_model_leaves_no_folder(
    arguments: tuple[str, ...], tmp_path: Path, fails: Callable[..., str]
) -> None:
    command, *options = arguments
    assert "nowhere" in fails(command, tmp_path / "nowhere", *options, tmp_path / "out/a.onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--json"),
        ("evaluate", "--report"),
        ("explain", "--point=0,0", "--arrays=a.npz", "--out"),
        ("explain", "--point=0,0", "--out=a.png", "--arrays"),
        ("export", "--format=onnx", "--out"),
    ],
)
def test_output_files_are_probed_before_the_model_is_read(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("picture.png")
    Path("file").touch()
    command, *options = arguments
    picture = ["picture.png"] if command == "explain" else []
    suffix = "npz" if options[-1] == "--arrays" else "onnx" if command == "export" else "png"
    out = f"file/out.{suffix}"
    line = fails(command, "/nowhere", *picture, *options, out)
    assert line.startswith(f"error: {out}: cannot be written")


def test_only_the_first_process_probes_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in (("0", "cannot be written"), ("1", "model /nowhere: no such folder")):
        monkeypatch.setenv("RANK", rank)
        assert message in fails("evaluate", "/nowhere", "--json", tmp_path / "file" / "a.json")


@pytest.mark.parametrize(
    ("options", "how"), [((), (1, 3, 3)), (("--batch=8", "--rounds=1", "--repeats=2"), (8, 1, 2))]
)
def test_bench_measures_as_often_as_told(
    options: tuple[str, ...],
    how: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    run: Command,
) -> None:
    measured = []

    def benchmark(workload: Workload, *_: object, rounds: int, repeats: int) -> None:
        measured.append((workload.batch, rounds, repeats))

    monkeypatch.setattr("danet.bench.report.benchmark", benchmark)
    monkeypatch.setattr("danet.bench.report.print_benchmark", lambda _: None)
    run("bench", "demo", *options)
    assert measured == [how]


def test_bench_probes_its_file_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    measured: list[object] = []
    monkeypatch.setattr("danet.bench.report.estimate_limits", lambda *_, **__: measured.append(1))
    line = fails("bench", "demo", "--estimate", "--json", tmp_path)
    assert "cannot be written" in line
    assert not measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "demo", "--wrong"), "No such option: --wrong; see danet train --help"),
        (("nonsense",), "No such command 'nonsense'; see danet --help"),
        (("export", "model"), "Choose from: onnx, torch, openvino; see danet export --help"),
        (("bench", "--rounds", "abc"), "Invalid value for '--rounds'"),
        (("export", "m", "--format=tflite", "--out=m.onnx"), "'tflite' is not one of 'onnx',"),
        (("data", "check"), "see danet data check --help"),
        (("predict", "street-small", "a.png", "--out", ""), "it is empty; give a folder"),
        (("train", "demo", "--out="), "it is empty; give a folder"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: tuple[str, ...], message: str, run: Command
) -> None:
    said = run(*arguments, status=2).stderr
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1


def test_the_version_is_the_packages(run: Command) -> None:
    assert run("--version").stdout == f"{danet.__version__}\n"
    assert danet.__version__[0].isdecimal()


def test_without_a_command_the_help_is_shown(run: Command) -> None:
    outcome = run(status=2)
    assert "Usage: danet" in outcome.stdout + outcome.stderr


def test_help_does_not_import_what_it_does_not_need() -> None:
    script = (
        "import sys; sys.argv = ['danet', '--help']\n"
        "from danet.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'lightning_fabric', 'gradio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_public_names_exist() -> None:
    for name in danet.__all__:
        assert getattr(danet, name) is not None
    assert set(danet.__all__) <= set(dir(danet))
    assert not np.any([name.startswith("_") for name in danet.__all__])


@pytest.mark.parametrize(
    ("test", "noted"),
    [
        ({}, False),
        ({"scale": (640, 480)}, False),
        ({"ratios_of": "image"}, False),
        ({"ratios_of": "image", "scale": (640, 480)}, True),
        ({"ratios": (0.5,)}, True),
        ({"ratios": (0.5, 1.0)}, True),
        ({"flip": True}, True),
        ({"mode": "slide"}, True),
    ],
)
def test_pictures_taken_otherwise_than_by_predict_are_noted(
    test: dict[str, object], noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    note_protocol(TestConfig.model_validate(test))
    assert ("note: the model's test protocol" in capsys.readouterr().err) == noted
