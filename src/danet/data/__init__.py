"""Datasets by name.

scenes = danet.data.open_dataset("scenes", split="val")
image, label, name = scenes[0]
"""

import importlib
import pkgutil
from pathlib import Path

from danet.data import catalog
from danet.data.check import CheckedDataset
from danet.data.files import PairedFiles
from danet.data.spec import (
    CatalogEntry,
    DatasetSpec,
    Sample,
    SegmentationDataset,
    SubmissionFormat,
)
from danet.errors import UserError

__all__ = ["DatasetSpec", "Sample", "dataset_names", "dataset_spec", "open_dataset"]


def dataset_names() -> tuple[str, ...]:
    """The names that `open_dataset` accepts."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(catalog.__path__)))


def splits_of(name: str, root: Path | str | None = None) -> dict[str, int | None]:
    """The splits of a dataset, each with its official number of pictures or None.

    Args:
        root: the dataset's folder, for datasets whose versions differ in their numbers.
    """
    entry = _entry(name)
    counts = entry.counts(_path(root))
    return {split: counts.get(split) for split in entry.splits}


def dataset_spec(name: str, root: Path | str | None = None) -> DatasetSpec:
    """The classes of a dataset.

    Args:
        root: the dataset's folder; required by `folder`, whose classes are the user's own.

    Raises:
        UserError: no such dataset, or its classes cannot be read.
    """
    return _entry(name).spec(_path(root))


def submission_format(name: str) -> SubmissionFormat:
    """The format in which the dataset's benchmark server takes label files.

    Raises:
        UserError: no such dataset, or it has no benchmark server.
    """
    submission = _entry(name).submission
    if submission is None:
        raise UserError(
            f"{name} has no server that takes label files; omit --submission, or score its labels"
        )
    return submission


def open_dataset(
    name: str, root: Path | str | None = None, split: str = "train", *, needs_labels: bool = False
) -> SegmentationDataset:
    """Opens one split as a sequence of `Sample(image, label, name)` with a `.spec`.

    Args:
        root: the folder of the data, in the layout of the dataset's official archives; None for
            generated data.
        needs_labels: refuse a test split whose labels only a benchmark's server has. Otherwise
            all of its pixels are ignored.

    Raises:
        UserError: no such dataset or split, its files are missing or do not pair up, or it has no
            labels though it needs them. Reading an item raises it for a damaged file or an
            undefined label id.
    """
    entry = _entry(name)
    if split not in entry.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(entry.splits)}")
    dataset = entry.open_split(_path(root), split)
    if not isinstance(dataset, PairedFiles):
        return dataset if entry.generated else CheckedDataset(dataset)
    if needs_labels and not dataset.has_labels:
        raise UserError(
            f"split {split} of {name} has no labels, its server has them; danet evaluate "
            "--submission DIR writes the files that it takes"
        )
    return dataset


def _path(root: Path | str | None) -> Path | None:
    # Path("") is the working folder, which is not what an unset variable of a shell means.
    if root == "":
        raise UserError("data.root is empty; give the dataset's folder")
    return None if root is None else Path(root)


def _entry(name: str) -> CatalogEntry:
    if name not in dataset_names():
        raise UserError(f"no dataset named {name!r}; there are {', '.join(dataset_names())}")
    entry: CatalogEntry = importlib.import_module(f"{catalog.__name__}.{name}").ENTRY
    return entry
