"""Readers of the larger datasets on miniatures in their official layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import SBDataset, VOCSegmentation

from danet.data import dataset_spec, open_dataset, splits_of
from danet.data.catalog import cityscapes, coco_stuff
from danet.errors import UserError

Maker = Callable[..., None]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Writes an image, or a label with the given ids, below the root."""

    def write(path: str, ids: list[list[int]] | None = None) -> None:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".txt":
            target.write_text("\n".join(ids))
        elif ids is None:
            Image.new("RGB", (3, 1)).save(target)
        else:
            Image.fromarray(np.array(ids, np.uint8)).save(target)

    return write


def labels(name: str, root: Path, split: str) -> dict[str, list[int]]:
    return {s.name: s.label[0].tolist() for s in open_dataset(name, root, split)}


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("cityscapes", 19, "road", "bicycle"),
        ("ade20k", 150, "wall", "flag"),
        ("voc", 21, "background", "tvmonitor"),
        ("pascal_context", 60, "background", "wood"),
        ("pascal_context_59", 59, "aeroplane", "wood"),
        ("coco_stuff", 171, "person", "wood"),
        ("camvid", 11, "sky", "bicyclist"),
    ],
)
def test_classes_are_the_official_ones(name: str, count: int, first: str, last: str) -> None:
    spec = dataset_spec(name)
    assert (spec.num_classes, spec.classes[0], spec.classes[-1]) == (count, first, last)
    assert spec.name == name


class TestCityscapes:
    @pytest.fixture(autouse=True)
    def images(self, make: Maker) -> None:
        for city in ("ulm", "bonn"):
            make(f"leftImg8bit/val/{city}/{city}_000000_000019_leftImg8bit.png")

    def test_label_ids_are_mapped(self, make: Maker, tmp_path: Path) -> None:
        for city, ids in (("ulm", [7, 33, 0]), ("bonn", [8, 29, 11])):
            make(f"gtFine/val/{city}/{city}_000000_000019_gtFine_labelIds.png", [ids])
        assert labels("cityscapes", tmp_path, "val") == {
            "bonn_000000_000019": [1, 255, 2],
            "ulm_000000_000019": [0, 18, 255],
        }

    def test_train_ids_are_taken_as_they_are(self, make: Maker, tmp_path: Path) -> None:
        for city in ("ulm", "bonn"):
            make(f"gtFine/val/{city}/{city}_000000_000019_gtFine_labelTrainIds.png", [[0, 18, 255]])
        assert labels("cityscapes", tmp_path, "val")["ulm_000000_000019"] == [0, 18, 255]

    def test_a_missing_label_is_named(self, make: Maker, tmp_path: Path) -> None:
        make("gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png", [[7, 7, 7]])
        with pytest.raises(UserError, match="1 of 2 images have no label here, first bonn"):
            open_dataset("cityscapes", tmp_path, "val")

    def test_the_test_split_may_lie_there_without_labels(self, make: Maker, tmp_path: Path) -> None:
        make("leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png")
        name = "berlin_000000_000019"
        assert labels("cityscapes", tmp_path, "test") == {name: [255, 255, 255]}
        with pytest.raises(UserError, match="split test of cityscapes has no labels"):
            open_dataset("cityscapes", tmp_path, "test", needs_labels=True)
        make(f"gtFine/test/berlin/{name}_gtFine_labelIds.png", [[7, 0, 33]])
        assert labels("cityscapes", tmp_path, "test") == {name: [0, 255, 18]}

    def test_every_label_id(self) -> None:
        assert len(cityscapes.LABEL_IDS) == 19
        assert tuple(sorted(cityscapes.LABEL_IDS)) == cityscapes.LABEL_IDS


@pytest.mark.parametrize("parent", ["", "ADEChallengeData2016/"])
def test_ade20k_shifts_by_one_and_ignores_zero(parent: str, make: Maker, tmp_path: Path) -> None:
    make(f"{parent}images/validation/ADE_val_00000001.jpg")
    make(f"{parent}annotations/validation/ADE_val_00000001.png", [[0, 1, 150]])
    assert labels("ade20k", tmp_path, "val") == {"ADE_val_00000001": [255, 0, 149]}
    make(f"{parent}annotations/validation/ADE_val_00000001.png", [[151, 1, 150]])
    with pytest.raises(UserError, match=r"label ids \[151\]"):
        labels("ade20k", tmp_path, "val")


@pytest.mark.parametrize("parent", ["", "ADEChallengeData2016/"])
def test_ade20ks_test_pictures_have_no_labels(parent: str, make: Maker, tmp_path: Path) -> None:
    make(f"{parent}release_test/testing/ADE_test_00000001.jpg")
    assert labels("ade20k", tmp_path, "test") == {"ADE_test_00000001": [255, 255, 255]}
    inside = tmp_path / "ADEChallengeData2016"
    inside.mkdir(exist_ok=True)
    assert len(open_dataset("ade20k", inside, "test")) == 1
    with pytest.raises(UserError, match="split test of ade20k has no labels"):
        open_dataset("ade20k", tmp_path, "test", needs_labels=True)


class TestVoc:
    VOC = "VOCdevkit/VOC2012"

    @pytest.fixture(autouse=True)
    def images(self, make: Maker) -> None:
        make(f"{self.VOC}/ImageSets/Segmentation/train.txt", ["a", "b"])
        make(f"{self.VOC}/ImageSets/Segmentation/val.txt", ["v"])
        for name in "abcdv":
            make(f"{self.VOC}/JPEGImages/{name}.jpg")
        for name in "abv":
            make(f"{self.VOC}/SegmentationClass/{name}.png", [[0, 20, 255]])

    def test_own_splits(self, tmp_path: Path) -> None:
        assert labels("voc", tmp_path, "val") == {"v": [0, 20, 255]}
        assert list(labels("voc", tmp_path / "VOCdevkit", "train")) == ["a", "b"]
        assert list(labels("voc", tmp_path / self.VOC, "train")) == ["a", "b"]

    def test_test_pictures_have_no_labels(self, make: Maker, tmp_path: Path) -> None:
        make(f"{self.VOC}/ImageSets/Segmentation/test.txt", ["t"])
        with pytest.raises(UserError, match="1 of the split's 1 images are missing, first t"):
            open_dataset("voc", tmp_path, "test")
        make(f"{self.VOC}/JPEGImages/t.jpg")
        assert labels("voc", tmp_path, "test") == {"t": [255, 255, 255]}
        assert open_dataset("voc", tmp_path, "val", needs_labels=True)[0].label.tolist()
        with pytest.raises(UserError, match="split test of voc has no labels"):
            open_dataset("voc", tmp_path, "test", needs_labels=True)

    def test_augmented_with_pngs(self, make: Maker, tmp_path: Path) -> None:
        for name in "abcv":
            make(f"{self.VOC}/SegmentationClassAug/{name}.png", [[5, 5, 5]])
        assert labels("voc", tmp_path, "train_aug") == {
            "a": [0, 20, 255],
            "b": [0, 20, 255],
            "c": [5, 5, 5],
        }

    @pytest.mark.parametrize("sbd", ["benchmark_RELEASE/dataset", "VOCdevkit/VOCaug/dataset"])
    def test_augmented_with_sbds_own_files(self, sbd: str, make: Maker, tmp_path: Path) -> None:
        make(f"{sbd}/train.txt", ["a", "c", "v"])
        make(f"{sbd}/val.txt", ["d"])
        (tmp_path / sbd / "cls").mkdir()
        for name in "acdv":
            segmentation = {"Segmentation": np.array([[7, 0, 20]], np.uint8)}
            savemat(tmp_path / sbd / "cls" / f"{name}.mat", {"GTcls": segmentation})
        assert labels("voc", tmp_path, "train_aug") == {
            "a": [0, 20, 255],
            "b": [0, 20, 255],
            "c": [7, 0, 20],
            "d": [7, 0, 20],
        }

    def test_torchvision_reads_the_same(self, make: Maker, tmp_path: Path) -> None:
        """Its own readers of VOC and SBD as a second source, on every class id."""
        sbd = tmp_path / "benchmark_RELEASE/dataset"
        ids = np.array([[*range(21), 255]], np.uint8)
        make(f"{self.VOC}/SegmentationClass/a.png", ids.tolist())
        for listing, names in (("train", ["c"]), ("val", ["d"])):
            make(f"benchmark_RELEASE/dataset/{listing}.txt", names)
        (sbd / "cls").mkdir()
        for name in "cd":
            segmentation = {"Segmentation": np.roll(ids[:, :21], ord(name))}
            savemat(sbd / f"cls/{name}.mat", {"GTcls": segmentation})
            Image.new("RGB", (21, 1)).save(sbd / f"../../{self.VOC}/JPEGImages/{name}.jpg")
        (sbd / "img").symlink_to(tmp_path / self.VOC / "JPEGImages")
        Image.new("RGB", (22, 1)).save(tmp_path / self.VOC / "JPEGImages/a.jpg")
        theirs = {
            Path(source.images[index]).stem: np.asarray(source[index][1])[0].tolist()
            for source in (
                VOCSegmentation(str(tmp_path), image_set="train"),
                SBDataset(str(sbd), image_set="train", mode="segmentation"),
                SBDataset(str(sbd), image_set="val", mode="segmentation"),
            )
            for index in range(len(source))
        }
        assert labels("voc", tmp_path, "train_aug") == theirs
        assert sorted(theirs) == ["a", "b", "c", "d"]

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="needs SBD's labels"):
            open_dataset("voc", tmp_path, "train_aug")
        (tmp_path / self.VOC / "JPEGImages/b.jpg").unlink()
        with pytest.raises(UserError, match="1 of the split's 2 images are missing, first b"):
            open_dataset("voc", tmp_path, "train")
        (tmp_path / self.VOC / "ImageSets/Segmentation/train.txt").unlink()
        with pytest.raises(UserError, match=r"train\.txt: cannot be read"):
            open_dataset("voc", tmp_path, "train")

    def test_damaged_mat_files_are_named(self, make: Maker, tmp_path: Path) -> None:
        sbd = "benchmark_RELEASE/dataset"
        make(f"{sbd}/train.txt", ["c"])
        make(f"{sbd}/val.txt", [])
        (tmp_path / sbd / "cls").mkdir()
        for content, message in ((b"garbage", "damaged"), (None, "holds no label map")):
            path = tmp_path / sbd / "cls/c.mat"
            path.write_bytes(content) if content else savemat(path, {"x": 1})
            with pytest.raises(UserError, match=message):
                labels("voc", tmp_path, "train_aug")


def test_pascal_context_with_and_without_background(make: Maker, tmp_path: Path) -> None:
    voc = "VOCdevkit/VOC2010"
    make(f"{voc}/ImageSets/SegmentationContext/val.txt", ["2008_1"])
    make(f"{voc}/JPEGImages/2008_1.jpg")
    make(f"{voc}/SegmentationClassContext/2008_1.png", [[0, 1, 59]])
    assert labels("pascal_context", tmp_path, "val") == {"2008_1": [0, 1, 59]}
    assert labels("pascal_context_59", tmp_path, "val") == {"2008_1": [255, 0, 58]}


class TestCocoStuff:
    def test_ids(self) -> None:
        ids = coco_stuff.pixel_map_ids()
        assert len(ids) == 171
        assert (ids[0], ids[10], ids[12], ids[181]) == (0, 10, 11, 170)

    @pytest.mark.parametrize("images", ["", "images/"])
    @pytest.mark.parametrize("maps", ["annotations", "stuffthingmaps"])
    def test_164k(self, images: str, maps: str, make: Maker, tmp_path: Path) -> None:
        make(f"{images}val2017/000000000139.jpg")
        make(f"{maps}/val2017/000000000139.png", [[0, 181, 255]])
        assert labels("coco_stuff", tmp_path, "val") == {"000000000139": [0, 170, 255]}

    def test_164k_converted(self, make: Maker, tmp_path: Path) -> None:
        make("images/val2017/7.jpg")
        make("annotations/val2017/7_labelTrainIds.png", [[0, 170, 255]])
        make("annotations/val2017/7.png", [[0, 181, 255]])
        assert labels("coco_stuff", tmp_path, "val") == {"7": [0, 170, 255]}

    def test_10k_archive(self, make: Maker, tmp_path: Path) -> None:
        make("images/COCO_train2014_1.jpg")
        make("imageLists/test.txt", ["COCO_train2014_1"])
        (tmp_path / "annotations").mkdir()
        ids = np.array([[0, 1, 182]], np.uint16)
        savemat(tmp_path / "annotations/COCO_train2014_1.mat", {"S": ids})
        assert labels("coco_stuff", tmp_path, "val") == {"COCO_train2014_1": [255, 0, 170]}

    def test_10k_converted(self, make: Maker, tmp_path: Path) -> None:
        make("images/test2014/1.jpg")
        make("annotations/test2014/1_labelTrainIds.png", [[0, 1, 171]])
        assert labels("coco_stuff", tmp_path, "val") == {"1": [255, 0, 170]}

    def test_the_labels_tell_the_version(self, make: Maker, tmp_path: Path) -> None:
        """Not COCO's own pictures of 2014, which may lie beside those of 2017."""
        make("images/train2014/1.jpg")
        make("images/test2014/1.jpg")
        make("images/val2017/7.jpg")
        make("annotations/val2017/7.png", [[0, 181, 255]])
        assert labels("coco_stuff", tmp_path, "val") == {"7": [0, 170, 255]}
        assert splits_of("coco_stuff", tmp_path)["val"] == 5000
        make("annotations/train2014/1_labelTrainIds.png", [[0, 1, 171]])
        with pytest.raises(UserError, match="both versions, 10k and 164k"):
            labels("coco_stuff", tmp_path, "val")

    def test_an_id_that_no_class_has(self, make: Maker, tmp_path: Path) -> None:
        make("val2017/7.jpg")
        make("stuffthingmaps/val2017/7.png", [[0, 11, 255]])
        with pytest.raises(UserError, match=r"label ids \[11\]"):
            labels("coco_stuff", tmp_path, "val")


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "voc", "pascal_context", "coco_stuff"])
def test_an_empty_folder_says_what_is_expected(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of|cannot be read"):
        open_dataset(name, tmp_path, "val")
