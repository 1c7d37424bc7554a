"""Datasets of image and label files, on disk or in archives."""

import operator
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from danet.data.archives import Location, ZipPath, is_zip, locate
from danet.data.images import (
    IMAGE_SUFFIXES,
    is_picture_name,
    open_image,
    open_label,
    open_upright,
)
from danet.data.spec import IGNORE_INDEX, DatasetSpec, Sample
from danet.errors import UserError, explaining_lookup, explaining_os_error


class LabelMap(NamedTuple):
    """Maps the 256 possible ids of a label file to train ids.

    Attributes:
        train_ids: 256 uint8; 0 where the dataset does not define the id.
        defined: 256 bool; whether the dataset defines the id. A separate table, because 255
            classes and the ignored id leave no train id to mark undefined ones.
    """

    train_ids: npt.NDArray[np.uint8]
    defined: npt.NDArray[np.bool_]


class FilePair(NamedTuple):
    """An image and its label, on disk or in an archive; None where only a server has the label."""

    image: Location
    label: Location | None
    name: str


class FolderPairs(list[FilePair]):
    """The pairs of two folders, and the labels there that belong to no image."""

    def __init__(
        self, pairs: Iterable[FilePair], image_folder: Location, unused_labels: list[Location]
    ) -> None:
        super().__init__(pairs)
        self.image_folder = image_folder
        self.unused_labels = unused_labels

    def left_out(self) -> list[str]:
        """One line for each kind of file that the pairs leave out, with the first one's name."""
        lines = []
        if self.unused_labels:
            first = self.unused_labels[0]
            lines.append(f"labels without a picture: {len(self.unused_labels)}, first {first}")
        pictures = list(_pictures_below(self.image_folder))
        if pictures:
            lines.append(f"pictures in subfolders, not read: {len(pictures)}, first {pictures[0]}")
        return lines


def _pictures_below(folder: Location) -> Iterator[Location]:
    """The image files in the folder's subfolders at any depth, without hidden ones."""
    inside: list[Location] = list(folder.iterdir())
    for path in sorted(inside, key=str):
        is_picture = path.suffix.lower() in IMAGE_SUFFIXES
        is_link = isinstance(path, Path) and path.is_symlink()  # it may lead back to here
        if not (path.name.startswith(".") or is_picture or is_link) and path.is_dir():
            yield from list_images(path)
            yield from _pictures_below(path)


def label_map(train_ids: Mapping[int, int]) -> LabelMap:
    """Builds the tables from file id -> train id pairs; 255 always maps to itself."""
    tables = LabelMap(np.zeros(256, np.uint8), np.zeros(256, np.bool_))
    for file_id, train_id in {IGNORE_INDEX: IGNORE_INDEX, **train_ids}.items():
        tables.train_ids[file_id] = train_id
        tables.defined[file_id] = True
    return tables


def same_ids(num_classes: int) -> LabelMap:
    """Of files that hold the train ids 0..K-1."""
    return label_map({train_id: train_id for train_id in range(num_classes)})


def ids_from_one(num_classes: int) -> LabelMap:
    """Of files with 1..K for the classes and 0 ignored: mmsegmentation's reduce_zero_label."""
    return label_map(
        {0: IGNORE_INDEX} | {train_id + 1: train_id for train_id in range(num_classes)}
    )


def require_root(name: str, root: Path | None) -> Location:
    """The dataset's folder or .zip archive; raises a UserError if there is none."""
    if root is None:
        raise UserError(
            f"dataset {name} is read from disk; say where it is: --root DIR, or in danet train "
            "--set data.root=DIR"
        )
    with explaining_lookup(root):
        if is_zip(root):
            return ZipPath(root)
        if not root.is_dir():
            raise UserError(f"{root} is not a folder or .zip file; give that of dataset {name}")
    return root


def list_images(folder: Location) -> list[Location]:
    """The image files directly in a folder, sorted by name, without hidden files."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; check the dataset's folder and the split's name"
        )
    images: list[Location] = [path for path in folder.iterdir() if is_picture_name(path.name)]
    return sorted(images, key=str)


def find_folder(root: Location, *candidates: str) -> Location:
    """The first candidate path below the root that is a folder, on disk or in a .zip file.

    Raises:
        UserError: no candidate is a folder.
    """
    for candidate in candidates:
        folder = locate(root, candidate)
        if folder.is_dir():
            return folder
    raise UserError(f"{root} holds none of {', '.join(candidates)}; check the dataset's folder")


def read_names(listing: Location) -> list[str]:
    """Reads a split's list of names, one per line.

    Raises:
        UserError: the file is missing or not UTF-8 text.
    """
    with explaining_os_error(
        str(listing), "cannot be read as the split's list", "check the dataset's folder"
    ):
        try:
            return listing.read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise UserError(f"{listing}: the split's list is not UTF-8 text ({error})") from error


def pair_by_stem(
    image_folder: Location, label_folder: Location, label_suffix: str = ""
) -> FolderPairs:
    """Pairs `image_folder/STEM.*` with `label_folder/STEM{label_suffix}.*`.

    Raises:
        UserError: a folder is missing or empty, an image has no label, or two files share a stem.
    """
    images = images_by_stem(image_folder)
    labels = {
        stem.removesuffix(label_suffix): path
        for stem, path in _by_stem(label_folder).items()
        if stem.endswith(label_suffix)
    }
    pairs = pair_up(images, labels, label_folder)
    unused = [path for stem, path in labels.items() if stem not in images]
    return FolderPairs(pairs, image_folder, unused)


def images_by_stem(folder: Location) -> dict[str, Location]:
    """The image files directly in a folder by their names without suffix, sorted.

    Raises:
        UserError: the folder is missing or has none, or two share a stem.
    """
    images = _by_stem(folder)
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


def _by_stem(folder: Location) -> dict[str, Location]:
    paths = list_images(folder)
    by_stem: dict[str, Location] = {}
    for path in paths:
        # Some systems write an accent as a character of its own.
        other = by_stem.setdefault(unicodedata.normalize("NFC", path.stem), path)
        if other is not path:
            raise UserError(
                f"{folder}: {other.name} and {path.name} differ only in their suffix; "
                "remove or rename one"
            )
    return by_stem


def pair_up(
    images: Mapping[str, Location], labels: Mapping[str, Location], label_folder: Location
) -> list[FilePair]:
    """Pairs each image with the label of the same name, in the images' order.

    Args:
        label_folder: the folder of the labels, named in the error message.

    Raises:
        UserError: an image has no label.
    """
    without = [name for name in images if name not in labels]
    if without:
        raise UserError(
            f"{label_folder}: {len(without)} of {len(images)} images have no label here, "
            f"first {without[0]}; add the labels or remove the images"
        )
    return [FilePair(path, labels[name], name) for name, path in images.items()]


def without_labels(images: Mapping[str, Location]) -> list[FilePair]:
    """The images of a test split whose labels only a benchmark's server has."""
    return [FilePair(path, None, name) for name, path in images.items()]


def existing(folder: Location, names: Sequence[str], suffix: str) -> dict[str, Location]:
    """Name -> path, for the names that have a file `NAME{suffix}` in the folder."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name: folder / (name + suffix) for name in names if name + suffix in there}


def require_all(found: Mapping[str, Location], names: Sequence[str], folder: Location) -> None:
    """Raises a UserError unless every name was found."""
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise UserError(
            f"{folder}: {len(missing)} of the split's {len(names)} images are missing"
            + (f", first {missing[0]}" if missing else "")
        )


class PairedFiles:
    """A dataset of file pairs, read on access. All pixels of an image without label are ignored."""

    def __init__(
        self,
        spec: DatasetSpec,
        pairs: Sequence[FilePair],
        ids_to_train_ids: LabelMap,
        read_label: Callable[[Location], npt.NDArray[np.uint8]] = open_label,
    ) -> None:
        self.spec = spec
        self.pairs = pairs
        self._ids_to_train_ids = ids_to_train_ids
        self._read_label = read_label

    @property
    def has_labels(self) -> bool:
        return any(pair.label is not None for pair in self.pairs)

    def folders(self) -> set[Path]:
        """The folders on disk, resolved, in which its files are."""
        files = (file for pair in self.pairs for file in (pair.image, pair.label))
        folders = {file.parent for file in files if isinstance(file, Path)}
        return {folder.resolve() for folder in folders}

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[operator.index(index)]  # no slice
        image = open_image(pair.image)
        file_ids = self.read_file_ids(pair, image)
        self.require_same_size(pair, image, file_ids)
        return Sample(image, self.to_train_ids(pair, file_ids), pair.name)

    def read_file_ids(self, pair: FilePair, image: Image.Image) -> npt.NDArray[np.uint8]:
        """The label file's ids H W; those of ignored pixels where the image has no label."""
        if pair.label is None:
            return np.full(image.size[::-1], IGNORE_INDEX, np.uint8)
        return self._read_label(pair.label)

    def require_same_size(
        self, pair: FilePair, image: Image.Image, file_ids: npt.NDArray[np.uint8]
    ) -> None:
        """Raises a UserError unless label and image have the same size."""
        if image.size != file_ids.shape[::-1]:
            height, width = file_ids.shape
            advice = "make them the same size"
            if image.size == file_ids.shape and open_upright(pair.image).was_turned:
                advice = "its EXIF orientation turns it; label it upright, or remove that tag"
            raise UserError(
                f"{pair.label} is {width}x{height} but its image {pair.image.name} is "
                f"{image.width}x{image.height}; {advice}"
            )

    def to_train_ids(
        self, pair: FilePair, file_ids: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]:
        """Maps a label file's ids; raises a UserError for ids the dataset does not define."""
        # take() needs half the time of indexing by the ids.
        defined = self._ids_to_train_ids.defined.take(file_ids)
        if not defined.all():
            unknown = np.unique(file_ids[~defined]).tolist()
            raise UserError(
                f"{pair.label} holds label ids {unknown[:5]} that dataset {self.spec.name} does "
                f"not define; it has {self.spec.num_classes} classes, and 255 is ignored"
            )
        return self._ids_to_train_ids.train_ids.take(file_ids)
