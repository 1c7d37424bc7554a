"""PASCAL Context on VOC 2010, 60 classes, background among them: 4998 / 5105 pictures.

Layout: `VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext,ImageSets/SegmentationContext}`, the
labels and lists as written by mmsegmentation's converter. Users' conversions have 4996 / 5104
pictures. `pascal_context_59` ignores the background.
"""

from pathlib import Path

from danet.data.classes import read_spec
from danet.data.files import (
    FilePair,
    PairedFiles,
    existing,
    find_folder,
    pair_up,
    read_names,
    require_all,
    require_root,
    same_ids,
)
from danet.data.spec import CatalogEntry, constant

SPEC = read_spec("pascal_context")


def _open_split(root: Path | None, split: str) -> PairedFiles:
    return PairedFiles(SPEC, pairs(root, split), same_ids(SPEC.num_classes))


def pairs(root: Path | None, split: str) -> list[FilePair]:
    """The image and label files of a split."""
    voc = find_folder(require_root(SPEC.name, root), "VOCdevkit/VOC2010", "VOC2010", ".")
    names = read_names(voc / "ImageSets" / "SegmentationContext" / f"{split}.txt")
    images = existing(voc / "JPEGImages", names, ".jpg")
    require_all(images, names, voc / "JPEGImages")
    label_folder = voc / "SegmentationClassContext"
    return pair_up(images, existing(label_folder, names, ".png"), label_folder)


ENTRY = CatalogEntry(
    splits=("train", "val"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=constant({"train": 4998, "val": 5105}),
)
