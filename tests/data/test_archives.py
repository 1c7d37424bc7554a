"""Datasets in their .zip archives give what the extracted ones give."""

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from danet.data import archives, open_dataset
from danet.data.archives import ZipPath
from danet.errors import UserError

# For each dataset: the official archives and, in each, the files of its validation split.
LAYOUTS = {
    "cityscapes": {
        "leftImg8bit_trainvaltest.zip": ["leftImg8bit/val/ulm/ulm_0_{}_leftImg8bit.png"],
        "gtFine_trainvaltest.zip": ["gtFine/val/ulm/ulm_0_{}_gtFine_labelIds.png"],
    },
    "ade20k": {
        "ADEChallengeData2016.zip": [
            "ADEChallengeData2016/images/validation/{}.jpg",
            "ADEChallengeData2016/annotations/validation/{}.png",
        ]
    },
    "coco_stuff": {
        "val2017.zip": ["val2017/{}.jpg"],
        "stuffthingmaps_trainval2017.zip": ["val2017/{}.png"],
    },
}
SIZE = (9, 7)


def write(path: Path, seed: int) -> None:
    """A picture where the path is one, a label of ids that every dataset has elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    is_image = path.suffix == ".jpg" or "leftImg8bit" in path.name
    shape = (*SIZE, 3) if is_image else SIZE
    pixels = random.integers(0, 256 if is_image else 9, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def pack(folder: Path, archive: Path) -> None:
    shutil.make_archive(str(archive.with_suffix("")), "zip", folder)


def assert_same(name: str, first: Path, second: Path) -> None:
    expected, actual = (list(open_dataset(name, root, "val")) for root in (first, second))
    assert [item.name for item in actual] == [item.name for item in expected]
    assert len(actual) >= 2
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.label, theirs.label)


def test_members_whose_names_begin_with_a_dot(tmp_path: Path) -> None:
    """As some programs write them."""
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        for number in (0, 1):
            write(tmp_path / f"folder/{kind}/val/{number}.{suffix}", number)
    (tmp_path / "folder/classes.txt").write_text("\n".join("abcdefghi"))
    archive = tmp_path / "folder.ZIP"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "folder").rglob("*.*"):
            file.writestr(f"./{path.relative_to(tmp_path / 'folder')}", path.read_bytes())
    assert any(name.startswith("./") for name in zipfile.ZipFile(archive).namelist())
    assert_same("folder", tmp_path / "folder", archive)


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_archives_as_they_are(name: str, tmp_path: Path) -> None:
    extracted, packed = tmp_path / "extracted", tmp_path / "packed"
    packed.mkdir()
    for archive, templates in LAYOUTS[name].items():
        content = tmp_path / archive.removesuffix(".zip")
        for seed, template in enumerate(templates):
            for number in (3, 20, 100):
                write(content / template.format(number), seed + number)
        pack(content, packed / archive)
        # The pixel maps' archive has no folder of its own; unpacked it needs one.
        own = "stuffthingmaps" if archive.startswith("stuffthingmaps") else ""
        shutil.copytree(content, extracted / own, dirs_exist_ok=True)
    assert_same(name, extracted, packed)


def test_coco_stuff_10k_archive(tmp_path: Path) -> None:
    content, packed = tmp_path / "content", tmp_path / "packed"
    packed.mkdir()
    (content / "annotations").mkdir(parents=True)
    (content / "imageLists").mkdir()
    (content / "imageLists/test.txt").write_text("a\nb\n")
    for seed, name in enumerate("ab"):
        write(content / f"images/{name}.jpg", seed)
        savemat(content / f"annotations/{name}.mat", {"S": np.full(SIZE, 7 + seed, np.uint8)})
    pack(content, packed / "cocostuff-10k-v1.1.zip")
    assert_same("coco_stuff", content, packed)


@pytest.fixture
def folder_archive(tmp_path: Path) -> Path:
    content = tmp_path / "content"
    for seed in range(6):
        write(content / f"images/val/{seed}.jpg", seed)
        write(content / f"labels/val/{seed}.png", seed)
    (content / "classes.txt").write_text("\n".join(f"class {i}" for i in range(9)))
    pack(content, tmp_path / "mine.zip")
    return tmp_path / "mine.zip"


def test_a_root_that_is_one_archive(folder_archive: Path) -> None:
    assert_same("folder", folder_archive.parent / "content", folder_archive)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_several_workers_read_one_archive(start: str, folder_archive: Path) -> None:
    dataset = open_dataset("folder", folder_archive, "val")
    expected = [item.label for item in dataset]  # the archive is open before the workers start
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=start, collate_fn=list
    )
    for _ in range(3):
        for item, label in zip(loader, expected, strict=True):
            np.testing.assert_array_equal(item[1], label)


def test_locations_are_pickled_without_the_open_file(folder_archive: Path) -> None:
    location = ZipPath(folder_archive) / "images" / "val"
    assert location.is_dir()
    assert pickle.loads(pickle.dumps(location)) == location


class TestBadArchives:
    def test_no_archive(self, tmp_path: Path) -> None:
        (tmp_path / "mine.zip").write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match=r"mine\.zip: cannot be read as a \.zip archive"):
            open_dataset("folder", tmp_path / "mine.zip", "val")

    def test_a_damaged_file_in_it(self, folder_archive: Path) -> None:
        with zipfile.ZipFile(folder_archive) as archive:
            offset = archive.getinfo("images/val/3.jpg").header_offset
        content = bytearray(folder_archive.read_bytes())
        content[offset + 100 : offset + 140] = bytes(40)
        folder_archive.write_bytes(content)
        with pytest.raises(UserError, match=r"images/val/3\.jpg: cannot be unpacked"):
            open_dataset("folder", folder_archive, "val")[3]

    def test_a_file_that_unpacks_to_too_much(
        self, folder_archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(archives, "MAX_FILE_BYTES", 10)
        with pytest.raises(UserError, match="refused"):
            open_dataset("folder", folder_archive, "val")

    def test_a_member_without_a_name_is_passed_over(self, folder_archive: Path) -> None:
        with zipfile.ZipFile(folder_archive, "a") as archive:
            nameless = zipfile.ZipInfo("X")
            nameless.filename = ""
            archive.writestr(nameless, b"")
        assert len(open_dataset("folder", folder_archive, "val")) == 6

    def test_names_that_point_outside_are_only_names(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("../../outside.txt", "x")
            archive.writestr("/root.txt", "x")
        top = ZipPath(tmp_path / "a.zip")
        assert not (top / "outside.txt").is_file()
        assert not (tmp_path.parent / "outside.txt").exists()
