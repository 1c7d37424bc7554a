"""COCO-Stuff, 171 classes: 10k (9000 / 1000 pictures) or 164k (118287 / 5000), by layout.

10k: `images/*.jpg`, `annotations/*.mat` (ids 1..182 with gaps, 0 ignored) and
`imageLists/{train,test}.txt` as in the official archive, or `{images,annotations}/{train,test}2014`
with `*_labelTrainIds.png` (ids 1..171, 0 ignored) as mmsegmentation's converter writes them.

164k: `{train,val}2017` or `images/{train,val}2017`, and the pixel maps (ids 0..181 with gaps, 255
ignored) in `annotations/`, `stuffthingmaps/` or `annotations/stuffthingmaps/`; or the converter's
`*_labelTrainIds.png` (ids 0..170).

The official `.zip` files in the root are read as they are: `cocostuff-10k-v1.1.zip`;
`{train,val}2017.zip` and `stuffthingmaps_trainval2017.zip`.
"""

from pathlib import Path

from danet.data.archives import Location, locate
from danet.data.classes import read_spec
from danet.data.files import (
    PairedFiles,
    existing,
    find_folder,
    ids_from_one,
    label_map,
    pair_by_stem,
    pair_up,
    read_names,
    require_all,
    require_root,
    same_ids,
)
from danet.data.mat import open_coco_stuff_label
from danet.data.spec import CatalogEntry, constant
from danet.errors import UserError

SPEC = read_spec("coco_stuff")
UNUSED_IDS = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
"""Ids in 0..181 that do not occur in the 164k pixel maps."""

_TRAIN_IDS = "_labelTrainIds"
_FOLDERS_10K = {"train": "train2014", "val": "test2014"}
_LISTS_10K = {"train": "train.txt", "val": "test.txt"}


def _counts(root: Path | None) -> dict[str, int]:
    """Official numbers of pictures in the version whose layout the root has; 164k without one."""
    if root is not None:
        folder = require_root(SPEC.name, root)
        if _archive_10k(folder) or _is_10k_converted(folder):
            return {"train": 9000, "val": 1000}
    return {"train": 118_287, "val": 5000}


def pixel_map_ids() -> dict[int, int]:
    """File id -> train id in the 164k pixel maps; the ids in .mat files are larger by one."""
    used = [i for i in range(182) if i not in UNUSED_IDS]
    return {file_id: train_id for train_id, file_id in enumerate(used)}


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(SPEC.name, root)
    archive = _archive_10k(folder)
    if archive:
        return _open_10k_archive(archive, split)
    if not _is_10k_converted(folder):
        return _open_164k(folder, split)
    if any(locate(folder, place).is_dir() for place in _labels_164k(split)):
        raise UserError(
            f"{folder} holds the labels of both versions, 10k and 164k; keep them in separate "
            "folders"
        )
    return _open_10k_converted(folder, split)


def _archive_10k(root: Location) -> Location | None:
    """The folder with the official 10k archive's content, unpacked or in the .zip file."""
    contents = (root, locate(root, "cocostuff-10k-v1.1.zip"))
    return next((content for content in contents if (content / "imageLists").is_dir()), None)


def _is_10k_converted(root: Location) -> bool:
    """By the labels: pictures named so may be COCO's own of 2014."""
    return any((root / "annotations" / name).is_dir() for name in _FOLDERS_10K.values())


def _open_10k_archive(root: Location, split: str) -> PairedFiles:
    names = read_names(root / "imageLists" / _LISTS_10K[split])
    images = existing(root / "images", names, ".jpg")
    require_all(images, names, root / "images")
    labels = existing(root / "annotations", names, ".mat")
    shifted = {file_id + 1: train_id for file_id, train_id in pixel_map_ids().items()}
    ids = label_map({0: SPEC.ignore_index, **shifted})
    pairs = pair_up(images, labels, root / "annotations")
    return PairedFiles(SPEC, pairs, ids, open_coco_stuff_label)


def _open_10k_converted(root: Location, split: str) -> PairedFiles:
    name = _FOLDERS_10K[split]
    pairs = pair_by_stem(root / "images" / name, root / "annotations" / name, _TRAIN_IDS)
    return PairedFiles(SPEC, pairs, ids_from_one(SPEC.num_classes))


def _labels_164k(split: str) -> list[str]:
    """The places where the split's label folder may be."""
    folders = (
        *("annotations", "stuffthingmaps", "annotations/stuffthingmaps"),
        "stuffthingmaps_trainval2017.zip",
    )
    return [f"{folder}/{split}2017" for folder in folders]


def _open_164k(root: Location, split: str) -> PairedFiles:
    name = f"{split}2017"
    images = find_folder(root, f"images/{name}", name, f"{name}.zip/{name}")
    labels = find_folder(root, *_labels_164k(split))
    if any(path.stem.endswith(_TRAIN_IDS) for path in labels.iterdir()):
        pairs = pair_by_stem(images, labels, _TRAIN_IDS)
        return PairedFiles(SPEC, pairs, same_ids(SPEC.num_classes))
    return PairedFiles(SPEC, pair_by_stem(images, labels), label_map(pixel_map_ids()))


ENTRY = CatalogEntry(
    splits=("train", "val"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=_counts,
)
