"""Cityscapes, fine annotations, 19 classes: 2975 / 500 / 1525 pictures of 2048x1024.

Layout: `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and
`gtFine/SPLIT/CITY/*_gtFine_labelIds.png` (ids 0..33) or `*_gtFine_labelTrainIds.png`. The official
labels of the test split are all void, and it may lie there without. The official `.zip` files in
the root are read without unpacking.
"""

from pathlib import Path

from danet.data.archives import Location
from danet.data.classes import read_spec
from danet.data.files import (
    PairedFiles,
    find_folder,
    label_map,
    list_images,
    pair_up,
    require_root,
    same_ids,
    without_labels,
)
from danet.data.spec import CatalogEntry, SubmissionFormat, constant
from danet.errors import UserError

SPEC = read_spec("cityscapes")
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of each train id, in train id order; the other ids in 0..33 are ignored."""

_IMAGE, _IDS, _TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(SPEC.name, root)
    image_folder = find_folder(
        folder, f"leftImg8bit/{split}", f"leftImg8bit_trainvaltest.zip/leftImg8bit/{split}"
    )
    images = _by_name(image_folder, _IMAGE)
    if not images:
        raise UserError(f"{image_folder} holds no CITY/*{_IMAGE}")
    ignored = dict.fromkeys(range(34), SPEC.ignore_index)
    mapped = {label_id: train_id for train_id, label_id in enumerate(LABEL_IDS)}
    label_ids = label_map({**ignored, **mapped})
    try:
        label_folder = find_folder(
            folder, f"gtFine/{split}", f"gtFine_trainvaltest.zip/gtFine/{split}"
        )
    except UserError:
        if split != "test":
            raise
        return PairedFiles(SPEC, without_labels(images), label_ids)
    train_ids = _by_name(label_folder, _TRAIN_IDS)
    if train_ids.keys() >= images.keys():
        pairs = pair_up(images, train_ids, label_folder)
        return PairedFiles(SPEC, pairs, same_ids(SPEC.num_classes))
    return PairedFiles(SPEC, pair_up(images, _by_name(label_folder, _IDS), label_folder), label_ids)


def _by_name(folder: Location, suffix: str) -> dict[str, Location]:
    cities = sorted((city for city in folder.iterdir() if city.is_dir()), key=str)
    return {
        path.name.removesuffix(suffix): path
        for city in cities
        for path in list_images(city)
        if path.name.endswith(suffix)
    }


ENTRY = CatalogEntry(
    splits=("train", "val", "test"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=constant({"train": 2975, "val": 500, "test": 1525}),
    # The official evaluator pairs files by CITY_SEQUENCE_FRAME*.png.
    submission=SubmissionFormat(LABEL_IDS, "_pred_labelIds.png"),
)
