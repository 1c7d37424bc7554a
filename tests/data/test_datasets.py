import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from danet.data import catalog, dataset_names, dataset_spec, open_dataset, splits_of
from danet.data.catalog import folder
from danet.data.check import check_pictures
from danet.data.images import open_label
from danet.data.spec import CatalogEntry
from danet.errors import UserError


def write_pair(root: Path, image: str, label: str, ids: list[list[int]]) -> None:
    array = np.array(ids, np.uint8)
    for path, content in ((image, np.zeros((*array.shape, 3), np.uint8)), (label, array)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(root / path)


class TestCamVid:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write_pair(tmp_path, "val/b.png", "valannot/b.png", [[0, 10], [11, 255]])
        write_pair(tmp_path, "val/a.png", "valannot/a.png", [[5, 5]])
        return tmp_path

    def test_void_is_ignored_and_names_are_sorted(self, root: Path) -> None:
        dataset = open_dataset("camvid", root, "val")
        assert [sample.name for sample in dataset] == ["a", "b"]
        np.testing.assert_array_equal(dataset[1].label, [[0, 10], [255, 255]])
        assert dataset.spec.num_classes == 11
        assert dataset.spec.classes[3] == "road"

    def test_an_id_out_of_range_names_the_file(self, root: Path) -> None:
        write_pair(root, "val/c.png", "valannot/c.png", [[12, 0]])
        with pytest.raises(UserError, match=r"c\.png holds label ids \[12\]"):
            open_dataset("camvid", root, "val")[2]

    def test_sizes_that_differ_name_both(self, root: Path) -> None:
        Image.new("RGB", (5, 4)).save(root / "val/a.png")
        with pytest.raises(UserError, match=r"a\.png is 2x1 but its image a\.png is 5x4"):
            open_dataset("camvid", root, "val")[0]

    def test_an_image_without_label(self, root: Path) -> None:
        (root / "valannot/a.png").unlink()
        with pytest.raises(UserError, match=r"1 of 2 images have no label here, first a"):
            open_dataset("camvid", root, "val")

    def test_a_missing_split_folder(self, root: Path) -> None:
        with pytest.raises(UserError, match="train is not a folder"):
            open_dataset("camvid", root, "train")

    @pytest.mark.parametrize("root", [None, "nowhere"])
    def test_no_root(self, root: str | None) -> None:
        with pytest.raises(UserError, match=r"data\.root=DIR|^nowhere is not a folder"):
            open_dataset("camvid", root, "val")


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write_pair(tmp_path, "images/train/a.jpg", "labels/train/a.png", [[0, 2], [1, 255]])
        write_pair(tmp_path, "images/val/b.jpg", "labels/val/b.png", [[0, 0]])
        return tmp_path

    def test_classes_are_counted_in_the_labels(self, root: Path) -> None:
        assert dataset_spec("folder", root).classes == ("class 0", "class 1", "class 2")
        np.testing.assert_array_equal(open_dataset("folder", root)[0].label, [[0, 2], [1, 255]])

    def test_classes_file_gives_names_and_colours(self, root: Path) -> None:
        (root / "classes.txt").write_text("sky 1 2 3\nparking lot\nroad\n")
        spec = dataset_spec("folder", root)
        assert spec.classes == ("sky", "parking lot", "road")
        assert spec.palette[0] == (1, 2, 3)
        assert len(set(spec.palette)) == 3

    def test_comments_in_the_classes_file(self, root: Path) -> None:
        (root / "classes.txt").write_text("# of my drive\nsky\n\n10 km sign\n#\nroad 1 2 3\n")
        assert dataset_spec("folder", root).classes == ("sky", "10 km sign", "road")

    def test_accents_of_either_form(self, root: Path) -> None:
        write_pair(root, "images/train/cafe\u0301.jpg", "labels/train/caf\u00e9.png", [[0, 1]])
        assert [sample.name for sample in open_dataset("folder", root)] == ["a", "caf\u00e9"]

    def test_an_id_beyond_the_named_classes(self, root: Path) -> None:
        (root / "classes.txt").write_text("sky\nroad\n")
        with pytest.raises(UserError, match=r"label ids \[2\] that dataset folder does not define"):
            open_dataset("folder", root)[0]

    def test_the_most_classes_that_8_bits_hold_are_all_usable(self, root: Path) -> None:
        (root / "classes.txt").write_text("\n".join(f"class {index}" for index in range(255)))
        write_pair(root, "images/train/a.jpg", "labels/train/a.png", [[253, 254], [0, 255]])
        np.testing.assert_array_equal(open_dataset("folder", root)[0].label, [[253, 254], [0, 255]])
        (root / "classes.txt").write_text("\n".join(f"class {index}" for index in range(254)))
        with pytest.raises(
            UserError, match=r"label ids \[254\] that dataset folder does not define"
        ):
            open_dataset("folder", root)[0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "0 classes"),
            ("a\na\n", "twice"),
            (
                "a 1 2 256\nb\n",
                "the colour at the end of 'a 1 2 256' is not three numbers in 0..255",
            ),
            ("a,1,2,3\nb,4,5,6\n", "'a,1,2,3': separate a colour's numbers by spaces"),
            ("0 a\n1 b\n", "every line begins with its id; write the names alone"),
        ],
    )
    def test_classes_file_mistakes(self, root: Path, text: str, message: str) -> None:
        (root / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            dataset_spec("folder", root)

    def test_labels_are_counted_once_for_each_root(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = []

        def open_and_count(path: Path) -> np.ndarray:
            opened.append(path.name)
            return open_label(path)

        monkeypatch.setattr(folder, "open_label", open_and_count)
        for path in (root, root / "images" / ".."):
            assert dataset_spec("folder", path).num_classes == 3
            assert open_dataset("folder", path).spec.num_classes == 3
        assert sorted(opened) == ["a.png", "b.png"]
        other = tmp_path / "other"
        write_pair(other, "images/train/a.jpg", "labels/train/a.png", [[0, 4]])
        assert dataset_spec("folder", other).num_classes == 5

    def test_one_class_must_be_named(self, root: Path) -> None:
        """Masks of 0 and 255 would train on one class and reach an mIoU of 1."""
        write_pair(root, "images/train/a.jpg", "labels/train/a.png", [[0, 255], [0, 255]])
        with pytest.raises(UserError, match=r"no class other than 0 .*give objects id 1.*s\.txt"):
            dataset_spec("folder", root)
        with pytest.raises(UserError, match="no class other than 0"):
            open_dataset("folder", root)
        (root / "classes.txt").write_text("road\n")
        assert dataset_spec("folder", root).classes == ("road",)
        np.testing.assert_array_equal(open_dataset("folder", root)[0].label, [[0, 255], [0, 255]])

    def test_masks_is_another_name_for_labels(self, root: Path) -> None:
        (root / "labels").rename(root / "masks")
        assert len(open_dataset("folder", root, "val")) == 1

    def test_two_files_of_one_stem(self, root: Path) -> None:
        Image.new("RGB", (2, 2)).save(root / "images/train/a.png")
        with pytest.raises(UserError, match=r"a\.jpg and a\.png differ only in"):
            open_dataset("folder", root)

    def test_no_labels(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="neither labels/ nor masks/"):
            dataset_spec("folder", tmp_path)


@pytest.mark.parametrize("name", ["scenes", "camvid"])
def test_a_dataset_is_indexed_as_a_sequence_of_single_items(name: str, tmp_path: Path) -> None:
    root = None
    if name == "camvid":
        root = tmp_path
        for folder in ("val", "valannot"):
            (root / folder).mkdir()
            Image.new("L", (4, 4)).save(root / folder / "a.png")
    dataset = open_dataset(name, root, "val")
    assert dataset[-1].name == dataset[len(dataset) - 1].name
    assert dataset[np.int64(0)].name == dataset[0].name
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(TypeError, match="slice"):
        dataset[:2]


def test_unknown_names_are_told_with_the_known_ones() -> None:
    assert {"camvid", "folder", "scenes"} <= set(dataset_names())
    with pytest.raises(UserError, match="no dataset named 'cityscape'"):
        open_dataset("cityscape")
    with pytest.raises(UserError, match="no split 'trainval'; it has train, val, test"):
        open_dataset("scenes", split="trainval")


def test_a_new_module_of_the_catalog_is_all_that_a_dataset_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up.py").write_text(
        "import numpy as np\n"
        "from PIL import Image\n"
        "from danet.data.spec import CatalogEntry, DatasetSpec, Sample, constant\n"
        "SPEC = DatasetSpec('made_up', ('sky', 'road'))\n"
        "class MadeUp(list):\n"
        "    spec = SPEC\n"
        "def sample(mode, shape, dtype, label_id):\n"
        "    return Sample(Image.new(mode, (3, 2)), np.full(shape, label_id, dtype), 'one')\n"
        "SAMPLES = MadeUp([\n"
        "    sample('RGB', (2, 3), np.uint8, 1), sample('RGB', (3, 2), np.uint8, 1),\n"
        "    sample('RGB', (2, 3), np.uint8, 2), sample('L', (2, 3), np.uint8, 255),\n"
        "    sample('RGB', (2, 3), np.int64, 1), sample('RGB', (2, 3), np.uint8, 255)])\n"
        "ENTRY = CatalogEntry(('val',), constant(SPEC), lambda root, split: SAMPLES)\n"
    )
    monkeypatch.setattr(catalog, "__path__", [*catalog.__path__, str(tmp_path)])
    assert "made_up" in dataset_names()
    assert dataset_spec("made_up").classes == ("sky", "road")
    assert splits_of("made_up") == {"val": None}
    dataset = open_dataset("made_up", tmp_path, "val")
    assert len(dataset) == 6
    assert dataset[0].label.tolist() == [[1] * 3] * 2
    found = check_pictures(dataset)
    assert found.pixels.tolist() == [0, 6, 6]
    assert [finding.message for finding in found.findings] == [
        f"dataset made_up: sample one {problem}"
        for problem in (
            "has labels 2x3 for an image 3x2; they must have the same size",
            "holds label ids [2]; train ids are 0..1, and 255 is ignored",
            "has an image of mode L; it must be RGB",
            "has no labels of uint8 H W",
        )
    ]
    with pytest.raises(UserError, match="no split 'train'; it has val"):
        open_dataset("made_up", tmp_path)


@pytest.mark.parametrize("name", dataset_names())
def test_every_module_of_the_catalog_has_an_entry(name: str) -> None:
    entry = importlib.import_module(f"{catalog.__name__}.{name}").ENTRY
    assert isinstance(entry, CatalogEntry)
    assert set(entry.counts(None)) <= set(entry.splits)
