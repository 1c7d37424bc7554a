"""Datasets by name.

scenes = danet.data.open_dataset("scenes", split="val")
image, label, name = scenes[0]
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from danet.data import catalog
from danet.data.spec import DatasetSpec, Sample, SegmentationDataset, SubmissionFormat
from danet.errors import UserError

__all__ = ["DatasetSpec", "Sample", "dataset_names", "dataset_spec", "open_dataset"]


def dataset_names() -> tuple[str, ...]:
    """Every name that `open_dataset` takes."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(catalog.__path__)))


def splits_of(name: str, root: Path | str | None = None) -> dict[str, int | None]:
    """The splits of a dataset, each with its official number of pictures or None.

    Args:
        root: tells versions of a dataset apart, where it has several.
    """
    module = _module(name)
    counts = getattr(module, "COUNTS", {})
    if callable(counts):
        counts = counts(None if root is None else Path(root))
    return {split: counts.get(split) for split in module.SPLITS}


def dataset_spec(name: str, root: Path | str | None = None) -> DatasetSpec:
    """The classes of a dataset.

    Args:
        root: needed where the classes are the user's own (`folder`).

    Raises:
        UserError: no such dataset, or its classes cannot be read.
    """
    spec = _module(name).spec(None if root is None else Path(root))
    assert isinstance(spec, DatasetSpec)
    return spec


def submission_format(name: str) -> SubmissionFormat:
    """How the dataset's server takes label files.

    Raises:
        UserError: no such dataset, or it has no server.
    """
    submission = getattr(_module(name), "SUBMISSION", None)
    if submission is None:
        raise UserError(f"{name} has no server that takes label files")
    assert isinstance(submission, SubmissionFormat)
    return submission


def open_dataset(
    name: str, root: Path | str | None = None, split: str = "train"
) -> SegmentationDataset:
    """Opens one split as a sequence of `Sample(image, label, name)` with a `.spec`.

    Args:
        root: the folder the data lies in, in the layout of the dataset's official archives;
            None for generated data.

    Raises:
        UserError: no such dataset or split, or its files are missing or do not pair up. Reading
            an item raises it for a damaged file or a label id out of range.
    """
    module = _module(name)
    if split not in module.SPLITS:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(module.SPLITS)}")
    dataset: SegmentationDataset = module.open_split(None if root is None else Path(root), split)
    return dataset


def _module(name: str) -> ModuleType:
    if name not in dataset_names():
        raise UserError(f"no dataset named {name!r}; there are {', '.join(dataset_names())}")
    return importlib.import_module(f"{catalog.__name__}.{name}")
