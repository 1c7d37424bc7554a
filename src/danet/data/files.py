"""Datasets that are pairs of image and label files on disk."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from danet.data.images import IMAGE_SUFFIXES, open_image, open_label
from danet.data.spec import IGNORE_INDEX, DatasetSpec, Sample
from danet.errors import UserError

UNMAPPED = 254
"""Marks, inside a label map, the ids that a dataset does not define."""

LabelMap = npt.NDArray[np.uint8]


class FilePair(NamedTuple):
    """An image and its label on disk."""

    image: Path
    label: Path
    name: str


def label_map(train_ids: Mapping[int, int]) -> LabelMap:
    """A table of 256 entries from label file ids to train ids; 255 always maps to itself."""
    table = np.full(256, UNMAPPED, dtype=np.uint8)
    table[IGNORE_INDEX] = IGNORE_INDEX
    for file_id, train_id in train_ids.items():
        table[file_id] = train_id
    return table


def require_root(name: str, root: Path | None) -> Path:
    """The dataset's folder; raises a UserError where none is given or there is none."""
    if root is None:
        raise UserError(f"dataset {name} is read from disk: say where it is with data.root=DIR")
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder; give the folder that holds {name}")
    return root


def list_images(folder: Path) -> list[Path]:
    """The image files right inside a folder, sorted by name; hidden files are left out."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; check data.root and the split's name")
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def pair_by_stem(image_folder: Path, label_folder: Path) -> list[FilePair]:
    """Pairs `image_folder/STEM.*` with `label_folder/STEM.*`.

    Raises:
        UserError: a folder is missing or empty, an image has no label, or two share a stem.
    """
    images, labels = list_images(image_folder), list_images(label_folder)
    label_of = {path.stem: path for path in labels}
    if not images:
        raise UserError(f"{image_folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    stems = {path.stem for path in images}
    for paths, folder in ((images, image_folder), (labels, label_folder)):
        if len({path.stem for path in paths}) < len(paths):
            raise UserError(f"{folder}: two files share a name but for the suffix; remove one")
    without_label = sorted(stems - label_of.keys())
    if without_label:
        raise UserError(
            f"{image_folder}: {len(without_label)} images have no label in {label_folder}, "
            f"first {without_label[0]}; add the labels or remove the images"
        )
    return [FilePair(path, label_of[path.stem], path.stem) for path in images]


class PairedFiles:
    """Reads each pair when it is asked for."""

    def __init__(
        self, spec: DatasetSpec, pairs: Sequence[FilePair], ids_to_train_ids: LabelMap
    ) -> None:
        self.spec = spec
        self.pairs = list(pairs)
        self._ids_to_train_ids = ids_to_train_ids

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image = open_image(pair.image)
        file_ids = open_label(pair.label)
        if image.size != file_ids.shape[::-1]:
            height, width = file_ids.shape
            raise UserError(
                f"{pair.label} is {width}x{height} but its image {pair.image.name} is "
                f"{image.width}x{image.height}; make them the same size"
            )
        label = self._ids_to_train_ids[file_ids]
        if (label == UNMAPPED).any():
            unknown = np.unique(file_ids[label == UNMAPPED]).tolist()
            raise UserError(
                f"{pair.label} holds label ids {unknown[:5]} that {self.spec.name} does not "
                f"define; it has {self.spec.num_classes} classes, and 255 is ignored"
            )
        return Sample(image, label, pair.name)
