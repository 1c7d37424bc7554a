"""Checks a dataset: all of it before a training run, or its samples as they are read."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from danet.data.files import FilePair, FolderPairs, PairedFiles
from danet.data.images import open_upright
from danet.data.spec import DatasetSpec, Sample, SegmentationDataset
from danet.errors import UserError

FILES_SHOWN = 3


class Finding(NamedTuple):
    """A problem with one file; `kind` groups the files that have the same problem."""

    kind: str
    message: str


class SplitCheck(NamedTuple):
    """The result of checking one split.

    Attributes:
        findings: the problems on which training or evaluation would fail.
        pixels: K + 1 pixel counts by train id, ignored pixels last.
        turned: the pictures that are not stored upright.
    """

    findings: list[Finding]
    pixels: npt.NDArray[np.int64]
    turned: list[str]

    @property
    def is_unlabelled(self) -> bool:
        """Whether labels were read, and all their pixels are ignored."""
        return bool(self.pixels.any()) and not self.pixels[:-1].any()

    def absent(self, classes: Sequence[str]) -> list[str]:
        """The classes that no pixel has, if any pixel has a class."""
        counts = self.pixels[:-1]
        if not counts.any():
            return []
        return [name for name, count in zip(classes, counts, strict=True) if not count]


class CheckedDataset:
    """A dataset of any other kind than `PairedFiles`, whose samples are checked on access.

    Raises:
        UserError: from `[]`, for a sample that is not as `Sample` says.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.spec = dataset.spec
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        problem = self._problem(sample)
        if problem is not None:
            raise UserError(f"dataset {self.spec.name}: sample {sample.name} {problem}")
        return sample

    def _problem(self, sample: Sample) -> str | None:
        image, label, _ = sample
        if image.mode != "RGB":
            return f"has an image of mode {image.mode}; it must be RGB"
        if not isinstance(label, np.ndarray) or label.dtype != np.uint8 or label.ndim != 2:
            return "has no labels of uint8 H W"
        if label.shape != image.size[::-1]:
            height, width = label.shape
            return (
                f"has labels {width}x{height} for an image {image.width}x{image.height}; they must "
                "have the same size"
            )
        counts = np.bincount(label.ravel(), minlength=256)
        counts[self.spec.ignore_index] = 0
        unknown = np.flatnonzero(counts[self.spec.num_classes :]) + self.spec.num_classes
        if len(unknown):
            return (
                f"holds label ids {unknown[:5].tolist()}; train ids are "
                f"0..{self.spec.num_classes - 1}, and {self.spec.ignore_index} is ignored"
            )
        return None


class _PictureCheck(NamedTuple):
    """What was found of one picture: a problem, or its pixels and whether it was turned."""

    finding: Finding | None = None
    pixels: npt.NDArray[np.int64] | None = None
    turned: str | None = None


def check_pictures(
    dataset: SegmentationDataset, on_picture: Callable[[], None] = lambda: None
) -> SplitCheck:
    """Reads every image and label of a split; generated datasets have no files to check.

    Args:
        on_picture: called after each picture.
    """
    result = SplitCheck([], np.zeros(dataset.spec.num_classes + 1, np.int64), [])
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        checks: Iterable[_PictureCheck] = ()
        if isinstance(dataset, PairedFiles):
            checks = threads.map(functools.partial(_check_pair, dataset), dataset.pairs)
        elif isinstance(dataset, CheckedDataset):
            checks = map(functools.partial(_check_sample, dataset), range(len(dataset)))
        for finding, pixels, turned in checks:
            if finding is not None:
                result.findings.append(finding)
            if pixels is not None:
                np.add(result.pixels, pixels, out=result.pixels)
            if turned is not None:
                result.turned.append(turned)
            on_picture()
    return result


def _check_pair(dataset: PairedFiles, pair: FilePair) -> _PictureCheck:
    try:
        image, was_turned = open_upright(pair.image)
    except UserError as error:
        return _PictureCheck(Finding("unreadable images", str(error)))
    try:
        file_ids = dataset.read_file_ids(pair, image)
    except UserError as error:
        return _PictureCheck(Finding("unreadable labels", str(error)))
    try:
        dataset.require_same_size(pair, image, file_ids)
    except UserError as error:
        return _PictureCheck(Finding("images and labels of different size", str(error)))
    try:
        label = dataset.to_train_ids(pair, file_ids)
    except UserError as error:
        return _PictureCheck(Finding("label ids out of range", str(error)))
    turned = str(pair.image) if was_turned else None
    return _PictureCheck(None, _count(label, dataset.spec), turned)


def _check_sample(dataset: CheckedDataset, index: int) -> _PictureCheck:
    try:
        return _PictureCheck(None, _count(dataset[index].label, dataset.spec))
    except UserError as error:
        return _PictureCheck(Finding("unusable samples", str(error)))


def _count(label: npt.NDArray[np.uint8], spec: DatasetSpec) -> npt.NDArray[np.int64]:
    """K + 1 pixel counts by train id, ignored pixels last."""
    counts = np.bincount(label.ravel(), minlength=256)
    return np.append(counts[: spec.num_classes], counts[spec.ignore_index])


def summarize(findings: list[Finding]) -> list[str]:
    """One line per kind of problem: the number of files and the first few messages."""
    by_kind: dict[str, list[str]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding.message)
    lines = []
    for kind, messages in by_kind.items():
        lines.append(f"{kind}: {len(messages)}: {first_few(messages)}")
    return lines


def first_few(texts: Sequence[str]) -> str:
    """The first texts and the number of the others."""
    shown = "; ".join(texts[:FILES_SHOWN])
    return f"{shown}; and {len(texts) - FILES_SHOWN} more" if len(texts) > FILES_SHOWN else shown


def left_out(dataset: SegmentationDataset) -> list[str]:
    """One line for each kind of file that lies in the split's folders and is not read."""
    pairs = dataset.pairs if isinstance(dataset, PairedFiles) else ()
    return pairs.left_out() if isinstance(pairs, FolderPairs) else []
