"""The types of a dataset: its classes and colours, its samples, and its entry in the catalog."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from danet.palette import Color, default_palette

T = TypeVar("T")

IGNORE_INDEX = 255
"""Train id of pixels left out of loss and scores; every dataset maps its void class to it."""


class Sample(NamedTuple):
    """One picture and its labels.

    Attributes:
        image: RGB, any size.
        label: H W uint8 train ids of the same size; 255 is ignored.
        name: unique in the split and safe as a file stem.
    """

    image: Image.Image
    label: npt.NDArray[np.uint8]
    name: str


@dataclass(frozen=True)
class DatasetSpec:
    """The classes of a dataset, in the order of their train ids 0..K-1.

    Attributes:
        classes: K names.
        palette: K RGB colours, 0..255; `default_palette(K)` where none is given.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Color, ...] = field(default=())
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if not self.palette:
            object.__setattr__(self, "palette", default_palette(len(self.classes)))
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"{self.name}: {len(self.classes)} classes but {len(self.palette)} colours"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class SubmissionFormat(NamedTuple):
    """The format in which a benchmark's server takes label files.

    Attributes:
        file_ids: the id to write for each train id.
        suffix: follows the picture's name in the file name.
        palette: the colours of the file ids; files are grey where it is empty.
    """

    file_ids: tuple[int, ...]
    suffix: str
    palette: tuple[Color, ...] = ()


class SegmentationDataset(Protocol):
    """A sequence of samples with its classes. Several processes may read items."""

    @property
    def spec(self) -> DatasetSpec: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...


def constant(value: T) -> Callable[[Path | None], T]:
    """A function of a dataset's root that returns the same value for every root."""
    return lambda _: value


def _no_counts(_: Path | None) -> Mapping[str, int]:
    return {}


@dataclass(frozen=True)
class CatalogEntry:
    """A dataset of the catalog. Roots are its folder, or None where no folder was given.

    Attributes:
        splits: the names that `open_split` takes.
        spec: root -> classes and colours; raises a UserError where they cannot be read.
        open_split: root, split -> the samples; raises a UserError where files are missing.
        counts: root -> the official number of pictures of each split, as far as there is one.
        submission: the format of a benchmark server's label files; None without a server.
        generated: whether samples are computed, so that there are no files to check.
    """

    splits: tuple[str, ...]
    spec: Callable[[Path | None], DatasetSpec]
    open_split: Callable[[Path | None, str], SegmentationDataset]
    counts: Callable[[Path | None], Mapping[str, int]] = _no_counts
    submission: SubmissionFormat | None = None
    generated: bool = False
