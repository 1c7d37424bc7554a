"""Real file systems that are full or read-only, in a mount namespace of their own."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namespaces import ISOLATED, needs_namespaces
from networks import TINY_RUN, tiny_danet

pytestmark = [pytest.mark.slow, needs_namespaces]

TINY = (*TINY_RUN, "train.steps=400", "train.checkpoint_every=10")
CHECK = """
import sys
from pathlib import Path
from PIL import Image
for path in sorted(Path(sys.argv[1]).rglob("*")):
    if path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".ckpt":
        from danet.training.checkpoint import load_checkpoint  # takes seconds
        print("step", load_checkpoint(path)["step"])
    print("left:", path.name)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_danet(11).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(30):
        pixels = np.random.default_rng(index).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


def on_disk(folder: Path, options: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status and errors of `danet` writing to a file system of its own, and what is left."""
    folder.mkdir(exist_ok=True)
    command = shlex.join([sys.executable, "-m", "danet", *map(str, arguments)])
    check = shlex.join([sys.executable, "-c", CHECK, str(folder)])
    script = f"mount -t tmpfs -o {options} none {shlex.quote(str(folder))} && "
    script += f"{{ {command}; echo status $?; {check}; }}"
    done = subprocess.run(
        [*ISOLATED, "bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status, _, left = done.stdout.partition("status ")[2].partition("\n")
    return int(status), done.stderr, left


@pytest.mark.parametrize("size", ["7m", "12m"])
def test_a_full_disk_ends_training_and_leaves_a_whole_checkpoint(size: str, tmp_path: Path) -> None:
    settings = [f"--set={item}" for item in TINY]
    arguments = ("train", "demo", "--out", tmp_path / "disk" / "run", *settings)
    status, said, left = on_disk(tmp_path / "disk", f"size={size}", *arguments)
    assert status == 2
    assert "Traceback" not in said
    assert "cannot be written" in said
    assert "step" in left
    assert ".tmp" not in left


def test_a_full_disk_ends_prediction_and_leaves_whole_masks(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = ("predict", model, photos, "--out", tmp_path / "disk", "--precision", "fp32")
    status, said, left = on_disk(tmp_path / "disk", "size=64k", *arguments)
    assert status == 2
    assert "Traceback" not in said
    assert "cannot be written (No space left on device)" in said
    assert 5 < left.count(".png") < 20
    assert ".tmp" not in left


def test_a_full_disk_leaves_no_half_report(model: Path, dataset: Path, tmp_path: Path) -> None:
    report = tmp_path / "disk" / "report.html"
    arguments = ("evaluate", model, "--data", "folder", "--root", dataset, "--report", report)
    status, said, left = on_disk(tmp_path / "disk", "size=8k", *arguments)
    assert status == 2
    assert "Traceback" not in said
    assert "report.html: cannot be written (No space left on device)" in said
    assert left == ""


@pytest.mark.parametrize("file_format", ["torch", "onnx"])
def test_a_full_disk_leaves_no_half_export(file_format: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "disk" / ("m.pt2" if file_format == "torch" else "m.onnx")
    arguments = ("export", model, "--format", file_format, "--out", out)
    status, said, left = on_disk(tmp_path / "disk", "size=64k", *arguments)
    assert status == 2, said
    assert "Traceback" not in said
    assert "cannot be written" in said
    assert "m." not in left


def test_a_read_only_folder_is_named_before_any_work(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    settings = [f"--set={item}" for item in TINY]
    for arguments in (
        ("train", "demo", "--out", tmp_path / "disk" / "run", *settings),
        ("predict", model, photos, "--out", tmp_path / "disk" / "out"),
        ("export", model, "--format", "torch", "--out", tmp_path / "disk" / "m.pt2"),
    ):
        status, said, left = on_disk(tmp_path / "disk", "ro", *arguments)
        assert status == 2
        assert "Traceback" not in said
        assert "cannot be written (Read-only file system)" in said
        assert left == ""
