import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from danet.cli import app
from danet.data import dataset_spec, open_dataset, splits_of
from danet.data.check import check_pictures, summarize


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five good pairs, and one of every kind of fault, in a user's folder."""
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (tmp_path / kind / split).mkdir(parents=True)
    for index in range(9):
        Image.new("RGB", (4, 2)).save(tmp_path / f"images/train/{index}.png")
        ids = np.array([[0, 1, 1, 255], [0, 0, 0, 255]], np.uint8)
        Image.fromarray(ids).save(tmp_path / f"labels/train/{index}.png")
    (tmp_path / "images/train/1.png").write_text("no image")
    (tmp_path / "labels/train/3.png").write_text("no label")
    Image.new("RGB", (5, 2)).save(tmp_path / "images/train/5.png")
    Image.new("L", (4, 2), 7).save(tmp_path / "labels/train/7.png")
    Image.new("RGB", (4, 2)).save(tmp_path / "images/val/x.png")
    Image.new("L", (4, 2), 1).save(tmp_path / "labels/val/x.png")
    return tmp_path


def test_every_kind_of_fault_is_found_and_the_rest_is_counted(root: Path) -> None:
    seen = []
    check = check_pictures(open_dataset("folder", root), lambda: seen.append(1))
    assert len(seen) == 9
    assert [finding.kind for finding in check.findings] == [
        "unreadable images",
        "unreadable labels",
        "images and labels of different size",
        "label ids out of range",
    ]
    assert check.pixels.tolist() == [5 * 4, 5 * 2, 5 * 2]


def test_one_line_for_each_kind(root: Path) -> None:
    for index in range(9):
        (root / f"images/train/{index}.png").write_text("no image")
    lines = summarize(check_pictures(open_dataset("folder", root)).findings)
    assert len(lines) == 1
    assert lines[0].startswith("unreadable images: 9: ")
    assert lines[0].endswith("; and 6 more")


def test_a_test_split_without_labels_is_a_note(tmp_path: Path) -> None:
    voc = tmp_path / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (voc / folder).mkdir(parents=True)
    for split in ("train", "val", "test"):
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text(split)
        Image.new("RGB", (4, 2)).save(voc / f"JPEGImages/{split}.jpg")
        Image.new("L", (4, 2), 1).save(voc / f"SegmentationClass/{split}.png")
    status, printed, said = check(tmp_path, "voc")
    assert status == 0
    assert "test: 1 pictures, officially 1456" in printed
    assert "note: test: every pixel is ignored, none has a class; it cannot be scored" in said


def test_without_names_a_broken_label_is_a_finding_too(root: Path) -> None:
    (root / "classes.txt").unlink()
    status, printed, said = check(root)
    assert status == 2
    assert "class 7" in printed  # the largest id that could be read
    assert any("unreadable images: 1:" in line for line in said)
    assert any("unreadable labels: 1:" in line for line in said)


def test_names_as_windows_editors_write_them(root: Path) -> None:
    (root / "classes.txt").write_text("road [left]\n[/b] x\n", encoding="utf-8-sig")
    assert open_dataset("folder", root).spec.classes == ("road [left]", "[/b] x")
    _, printed, _ = check(root)
    assert "road [left]" in printed
    assert "[/b] x" in printed


def check(root: Path, name: str = "folder") -> tuple[int, str, list[str]]:
    result = CliRunner().invoke(app, ["data", "check", name, str(root)])
    return result.exit_code, result.stdout, result.stderr.splitlines()


def remove_faults(root: Path) -> None:
    for index in (1, 3, 5, 7):
        for kind in ("images", "labels"):
            (root / f"{kind}/train/{index}.png").unlink()


def test_findings_are_errors_and_exit_with_2(root: Path) -> None:
    status, printed, complaints = check(root)
    assert status == 2
    assert "train: 9 pictures" in printed
    errors = [line for line in complaints if line.startswith("error: train: ")]
    assert len(errors) == 4
    assert any(line.startswith("note: test: ") for line in complaints)


def test_sound_data_passes_with_its_frequencies(root: Path) -> None:
    remove_faults(root)
    status, printed, complaints = check(root)
    assert status == 0
    assert "train: 5 pictures\n" in printed
    assert not [line for line in complaints if line.startswith("error")]
    assert "0.5000" in printed


def test_a_missing_training_split_fails(root: Path) -> None:
    (root / "images/train").rename(root / "images/other")
    status, _, complaints = check(root)
    assert status == 2
    assert any("images/train is not a folder" in line for line in complaints)


def test_a_class_that_the_training_split_lacks_is_a_warning(root: Path) -> None:
    remove_faults(root)
    (root / "classes.txt").write_text("a\nb\nc\n")
    status, _, complaints = check(root)
    assert status == 0
    assert "warning: train: classes that no pixel has: 1: c" in complaints
    assert not [line for line in complaints if line.startswith("warning: val")]


def test_a_split_without_a_labelled_pixel_fails(root: Path) -> None:
    remove_faults(root)
    Image.new("L", (4, 2), 255).save(root / "labels/val/x.png")
    status, _, complaints = check(root)
    assert status == 2
    assert any(line.startswith("error: val: every pixel is ignored") for line in complaints)


def test_a_test_split_may_lack_labels(root: Path) -> None:
    """As Cityscapes' does."""
    remove_faults(root)
    for kind in ("images", "labels"):
        (root / kind / "test").mkdir()
        mode = "RGB" if kind == "images" else "L"
        Image.new(mode, (4, 2), "white").save(root / kind / "test/y.png")
    status, _, complaints = check(root)
    assert status == 0
    assert any(line.startswith("note: test: every pixel is ignored") for line in complaints)


def test_generated_pictures_are_not_looked_at() -> None:
    nothing = check_pictures(open_dataset("scenes", split="val"))
    assert not nothing.is_unlabelled
    assert nothing.absent(dataset_spec("scenes").classes) == []


def test_official_counts(tmp_path: Path) -> None:
    assert splits_of("cityscapes") == {"train": 2975, "val": 500, "test": 1525}
    assert splits_of("folder") == {"train": None, "val": None, "test": None}
    assert splits_of("coco_stuff", tmp_path)["val"] == 5000
    (tmp_path / "imageLists").mkdir()
    assert splits_of("coco_stuff", tmp_path)["val"] == 1000


def test_files_that_are_not_read_are_noted(root: Path) -> None:
    remove_faults(root)
    assert not [line for line in check(root)[2] if line.startswith("note: train: ")]
    for name in ("y", "z"):
        Image.new("L", (4, 2)).save(root / f"labels/train/{name}.png")
    for name in ("more/deep/b", "more/a", ".cache/hidden"):
        path = root / f"images/train/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 2)).save(path)
    status, _, complaints = check(root)
    assert status == 0
    assert [line for line in complaints if line.startswith("note: train: ")] == [
        f"note: train: labels without a picture: 2, first {root}/labels/train/y.png",
        f"note: train: pictures in subfolders, not read: 2, first {root}/images/train/more/a.png",
    ]


def test_folders_that_lead_back_are_not_followed(root: Path) -> None:
    remove_faults(root)
    for name in ("self", "again"):
        (root / "images/train" / name).symlink_to(".")
    status, _, complaints = check(root)
    assert status == 0
    assert not [line for line in complaints if "in subfolders" in line]


def test_pictures_that_are_not_stored_upright(root: Path) -> None:
    remove_faults(root)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for split in ("train", "val"):
        Image.new("RGB", (4, 2)).save(root / f"images/{split}/turned.jpg", exif=exif)
        Image.new("L", (4, 2)).save(root / f"labels/{split}/turned.png")
    status, _, complaints = check(root)
    assert status == 0
    notes = [line for line in complaints if "EXIF orientation" in line]
    assert [line.partition(": 1: ")[0] for line in notes] == [
        f"note: {split}: pictures that their EXIF orientation turns" for split in ("train", "val")
    ]
    exif[ExifTags.Base.Orientation] = 0  # as some cameras write, which turns nothing
    Image.new("RGB", (4, 2)).save(root / "images/train/turned.jpg", exif=exif)
    assert len([line for line in check(root)[2] if "EXIF orientation" in line]) == 1
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (4, 2)).save(root / "images/val/turned.jpg", exif=exif)
    status, _, complaints = check(root)
    assert status == 2
    assert any("its EXIF orientation turns it; label it upright" in line for line in complaints)


def test_official_counts_of_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "cocostuff-10k-v1.1.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("imageLists/train.txt", "")
    assert splits_of("coco_stuff", tmp_path) == {"train": 9000, "val": 1000}
    assert splits_of("coco_stuff", archive) == {"train": 9000, "val": 1000}
