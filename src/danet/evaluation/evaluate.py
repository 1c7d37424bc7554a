"""Scoring a model on a dataset."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danet.config import TestConfig
from danet.data.spec import DatasetSpec, Sample, SegmentationDataset
from danet.devices import autocast
from danet.errors import UserError
from danet.evaluation.inference import pixels_of, predict_classes
from danet.evaluation.metrics import Scores, confusion_matrix, scores
from danet.heads import Branch
from danet.model import DANet
from danet.model_folder import Metadata
from danet.threads import map_ahead

_READERS = 2
"""Number of decoding threads, and of pictures decoded ahead."""


class PictureScore(NamedTuple):
    """The accuracy on one picture of the split.

    Attributes:
        position: index of the picture in the split.
        accuracy: share of the labelled pixels that are right, 0..1; nan if none is labelled.
    """

    position: int
    name: str
    accuracy: float


class Evaluation(NamedTuple):
    """The confusion matrices of a split.

    Attributes:
        confusion: K K int64 pixel counts of each branch; rows are the true classes.
        pictures: one entry for each picture, in the order of the split.
    """

    spec: DatasetSpec
    confusion: dict[Branch, Tensor]
    pictures: list[PictureScore]

    def scores(self, branch: Branch = "fused") -> Scores:
        return scores(self.confusion[branch])


def merge(shares: Sequence[Evaluation]) -> Evaluation:
    """Adds up evaluations of disjoint parts of one split."""
    return Evaluation(
        shares[0].spec,
        {
            branch: sum((share.confusion[branch] for share in shares[1:]), counts)
            for branch, counts in shares[0].confusion.items()
        },
        sorted(picture for share in shares for picture in share.pictures),
    )


def check_classes(
    metadata: Metadata, spec: DatasetSpec, say: Callable[[str], None] = lambda _: None
) -> None:
    """Checks that a model has as many classes as the dataset; scoring compares class ids.

    Args:
        say: called with a note if class names differ. That is not an error, because the same class
            may be spelt in several ways.

    Raises:
        UserError: the numbers of classes differ.
    """
    if len(metadata.classes) != spec.num_classes:
        raise UserError(
            f"the model has {len(metadata.classes)} classes but dataset {spec.name} has "
            f"{spec.num_classes}; evaluate it on the data it was trained for"
        )
    both = zip(metadata.classes, spec.classes, strict=True)
    differing = [index for index, (own, wanted) in enumerate(both) if own != wanted]
    if differing:
        first = differing[0]
        say(
            f"note: {len(differing)} of {spec.num_classes} class names are not those of dataset "
            f"{spec.name}, first that of class {first}: {metadata.classes[first]!r}, not "
            f"{spec.classes[first]!r}; the scores are right only if these are the same classes "
            "in the same order"
        )


Segment = Callable[[Sample], Sequence[Tensor]]
"""Maps a picture to its predicted label maps, H W uint8, one for each branch."""


def segment_with(
    model: DANet, test: TestConfig, precision: str = "auto", branches: Sequence[Branch] = ("fused",)
) -> Segment:
    """A function that segments pictures with a network.

    Args:
        model: in evaluation mode and on the device to compute on.
    """
    device = next(model.parameters()).device

    @torch.inference_mode()
    def segment(sample: Sample) -> Sequence[Tensor]:
        image = pixels_of(sample.image)
        with autocast(precision, device):
            return list(predict_classes(model, image.to(device), test, branches))

    return segment


def evaluate(
    segment: Segment,
    dataset: SegmentationDataset,
    *,
    branches: Sequence[Branch] = ("fused",),
    indices: Iterable[int] | None = None,
    on_picture: Callable[[], None] = lambda: None,
    write_prediction: Callable[[str, npt.NDArray[np.uint8]], None] | None = None,
) -> Evaluation:
    """Segments the pictures of a split and counts the labelled pixels in confusion matrices.

    Args:
        segment: predicts class ids of the dataset; see `check_classes`.
        branches: the branches whose label maps `segment` returns, in order.
        indices: positions of the pictures to score; None for all.
        on_picture: called after each picture.
        write_prediction: called with each picture's name and its H W uint8 class ids.

    Raises:
        UserError: a picture or label cannot be read.
    """
    num_classes = dataset.spec.num_classes
    confusion = {branch: torch.zeros(num_classes, num_classes).long() for branch in branches}
    pictures = []
    for index, sample in _read_ahead(dataset, range(len(dataset)) if indices is None else indices):
        label = torch.from_numpy(sample.label)
        for branch, prediction in zip(branches, segment(sample), strict=True):
            counts = confusion_matrix(label.to(prediction.device), prediction, num_classes).cpu()
            confusion[branch] += counts
            if branch == "fused":
                labelled = int(counts.sum())
                right = int(counts.diagonal().sum())
                accuracy = right / labelled if labelled else math.nan
                pictures.append(PictureScore(index, sample.name, accuracy))
                if write_prediction is not None:
                    write_prediction(sample.name, prediction.cpu().numpy())
        on_picture()
    return Evaluation(dataset.spec, confusion, pictures)


def _read_ahead(
    dataset: SegmentationDataset, indices: Iterable[int]
) -> Iterator[tuple[int, Sample]]:
    """Yields the pictures in order; the next ones are decoded while one is segmented."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from map_ahead(pool, dataset.__getitem__, indices, _READERS)


def scores_as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Scores as fractions in 0..1; None where a score is undefined, as for absent classes."""

    def fraction(value: float) -> float | None:
        return None if math.isnan(value) else value

    fused = evaluation.scores()
    names = evaluation.spec.classes
    return {
        "mIoU": fraction(fused.mean_iou),
        "mAcc": fraction(fused.mean_accuracy),
        "aAcc": fraction(fused.overall_accuracy),
        "per_class": {
            name: {"IoU": fraction(score.iou), "Acc": fraction(score.accuracy)}
            for name, score in zip(names, fused.per_class, strict=True)
        },
        "branches": {
            branch: {"mIoU": fraction(evaluation.scores(branch).mean_iou)}
            for branch in evaluation.confusion
        },
        "confusion": evaluation.confusion["fused"].tolist(),
        "classes": list(names),
        "images": len(evaluation.pictures),
    }
