"""PASCAL VOC 2012, 21 classes: 1464 / 1449 / 1456 pictures, 10582 with SBD's annotations.

Layout: `VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}`. Split `train_aug`
is VOC's training images and SBD's, without VOC's validation images. SBD's labels are read from
`SegmentationClassAug/*.png` in VOC2012, or from SBD's own `cls/*.mat` in
`benchmark_RELEASE/dataset` or `VOCaug/dataset`. Images of VOC's own list keep VOC's labels. The
test split, from an archive of its own, has no labels; its server takes palette PNGs in
`results/VOC2012/Segmentation/comp6_test_cls`.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from danet.data.archives import Location
from danet.data.classes import read_spec
from danet.data.files import (
    PairedFiles,
    existing,
    find_folder,
    list_images,
    pair_up,
    read_names,
    require_all,
    require_root,
    same_ids,
    without_labels,
)
from danet.data.images import open_label
from danet.data.mat import open_sbd_label
from danet.data.spec import CatalogEntry, SubmissionFormat, constant
from danet.errors import UserError
from danet.palette import default_palette

SPEC = read_spec("voc")
_AUGMENTED = "SegmentationClassAug"
_SBD = (
    "benchmark_RELEASE/dataset",
    "../benchmark_RELEASE/dataset",
    "VOCaug/dataset",
    "../VOCaug/dataset",
    "VOCdevkit/VOCaug/dataset",
    "dataset",
)


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(SPEC.name, root)
    voc = find_folder(folder, "VOCdevkit/VOC2012", "VOC2012", ".")
    names = read_names(_listing(voc, "train" if split == "train_aug" else split))
    label_folder = voc / "SegmentationClass"
    labels = existing(label_folder, names, ".png")
    if split == "train_aug":
        label_folder, added = _added_labels(folder, voc)
        labels = {**added, **labels}
        names = list(dict.fromkeys([*names, *added]))
    images = existing(voc / "JPEGImages", names, ".jpg")
    require_all(images, names, voc / "JPEGImages")
    pairs = without_labels(images) if split == "test" else pair_up(images, labels, label_folder)
    return PairedFiles(SPEC, pairs, same_ids(SPEC.num_classes), _open_any_label)


def _listing(voc: Location, split: str) -> Location:
    return voc / "ImageSets" / "Segmentation" / f"{split}.txt"


def _added_labels(root: Location, voc: Location) -> tuple[Location, dict[str, Location]]:
    """The folder of SBD's labels, and the label of each image not in VOC's validation split."""
    validated = set(read_names(_listing(voc, "val")))
    if (voc / _AUGMENTED).is_dir():
        folder = voc / _AUGMENTED
        paths = {path.stem: path for path in list_images(folder)}
    else:
        try:
            sbd = find_folder(root, *_SBD)
        except UserError as error:
            raise UserError(
                f"{voc}: split train_aug needs SBD's labels; put {_AUGMENTED}/*.png here, or SBD's "
                f"benchmark_RELEASE in {root}, or set data.train_split=train"
            ) from error
        folder = sbd / "cls"
        names = [*read_names(sbd / "train.txt"), *read_names(sbd / "val.txt")]
        paths = existing(folder, names, ".mat")
        require_all(paths, names, folder)
    return folder, {name: path for name, path in paths.items() if name not in validated}


def _open_any_label(path: Location) -> npt.NDArray[np.uint8]:
    return open_sbd_label(path) if path.suffix == ".mat" else open_label(path)


ENTRY = CatalogEntry(
    splits=("train", "val", "test", "train_aug"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=constant({"train": 1464, "val": 1449, "test": 1456, "train_aug": 10_582}),
    # The devkit's colours, of all 256 ids.
    submission=SubmissionFormat(tuple(range(SPEC.num_classes)), ".png", default_palette(256)),
)
