"""Checks a dataset's files before a training run."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from danet.data.files import FilePair, FolderPairs, PairedFiles
from danet.data.images import open_image
from danet.data.spec import SegmentationDataset
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
    """

    findings: list[Finding]
    pixels: npt.NDArray[np.int64]

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


def check_pictures(
    dataset: SegmentationDataset, on_picture: Callable[[], None] = lambda: None
) -> SplitCheck:
    """Reads every image and label of a split; generated datasets have no files to check.

    Args:
        on_picture: called after each picture.
    """
    pixels = np.zeros(dataset.spec.num_classes + 1, np.int64)
    findings: list[Finding] = []
    if isinstance(dataset, PairedFiles):
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            outcomes = threads.map(lambda pair: _check_pair(dataset, pair), dataset.pairs)
            for outcome in outcomes:
                if isinstance(outcome, Finding):
                    findings.append(outcome)
                else:
                    pixels += outcome
                on_picture()
    return SplitCheck(findings, pixels)


def _check_pair(dataset: PairedFiles, pair: FilePair) -> Finding | npt.NDArray[np.int64]:
    try:
        image = open_image(pair.image)
    except UserError as error:
        return Finding("unreadable images", str(error))
    try:
        file_ids = dataset.read_file_ids(pair, image)
    except UserError as error:
        return Finding("unreadable labels", str(error))
    try:
        dataset.require_same_size(pair, image, file_ids)
    except UserError as error:
        return Finding("images and labels of different size", str(error))
    try:
        label = dataset.to_train_ids(pair, file_ids)
    except UserError as error:
        return Finding("label ids out of range", str(error))
    counts = np.bincount(label.ravel(), minlength=256)
    return np.append(counts[: dataset.spec.num_classes], counts[dataset.spec.ignore_index])


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
