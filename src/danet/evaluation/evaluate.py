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
from danet.evaluation.inference import predict_classes
from danet.evaluation.metrics import Scores, confusion_matrix, scores
from danet.evaluation.report import Case
from danet.heads import Branch
from danet.model import DANet
from danet.model_folder import Metadata
from danet.threads import map_ahead

_READERS = 2
"""Threads that decode, and pictures that wait decoded."""


class PictureScore(NamedTuple):
    """How one picture of the split went; `accuracy` is nan where nothing is labelled."""

    position: int
    name: str
    accuracy: float


class Evaluation(NamedTuple):
    """The outcome on a split.

    Attributes:
        confusion: per branch K K int64, rows are the truth.
        pictures: one entry per picture, in the split's order.
    """

    spec: DatasetSpec
    confusion: dict[Branch, Tensor]
    pictures: list[PictureScore]

    def scores(self, branch: Branch = "fused") -> Scores:
        return scores(self.confusion[branch])


def merge(shares: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of a split of which each share saw other pictures."""
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
    """Checks that a model's classes can be the dataset's, which are compared by their ids.

    Args:
        say: is told where names differ. It is no error, for the same classes have many spellings.

    Raises:
        UserError: the model has another number of classes.
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
"""What is scored: a picture to its label maps, H W uint8, one for each branch."""


def segment_with(
    model: DANet, test: TestConfig, precision: str = "auto", branches: Sequence[Branch] = ("fused",)
) -> Segment:
    """Segmenting by a model, in evaluation mode and on the device to compute on."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def segment(sample: Sample) -> Sequence[Tensor]:
        image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)
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
    """Segments pictures and counts every labelled pixel.

    Args:
        segment: predicts the dataset's classes; see `check_classes`.
        branches: those that `segment` gives label maps of.
        indices: the pictures to score; all where None.
        on_picture: called after each picture.
        write_prediction: takes each picture's name and its H W class ids.

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
    """The pictures in order, the next ones decoded while one is segmented."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from map_ahead(pool, dataset.__getitem__, indices, _READERS)


def report_cases(
    segment: Segment,
    dataset: SegmentationDataset,
    pictures: Sequence[PictureScore],
    *,
    worst: int = 8,
    others: int = 4,
) -> list[Case]:
    """Segments again the worst pictures and some that are evenly spread over the rest."""
    ranked = sorted((p for p in pictures if not math.isnan(p.accuracy)), key=lambda p: p.accuracy)
    rest = ranked[worst:]
    spread = [rest[(2 * i + 1) * len(rest) // (2 * others)] for i in range(others)] if rest else []
    cases = []
    for picture in dict.fromkeys([*ranked[:worst], *spread]):
        sample = dataset[picture.position]
        prediction = segment(sample)[0].cpu().numpy()
        cases.append(Case(sample.name, sample.image, sample.label, prediction, picture.accuracy))
    return cases


def scores_as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Scores as fractions in 0..1; None for a class that does not occur."""

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
