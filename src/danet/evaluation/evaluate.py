"""Scoring a model on a dataset."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danet.atomic import replacing
from danet.config import TestConfig
from danet.data.spec import DatasetSpec, Sample, SegmentationDataset
from danet.data.transforms import as_tensors
from danet.devices import autocast
from danet.errors import UserError
from danet.evaluation.inference import Branch, predict_classes
from danet.evaluation.metrics import Scores, confusion_matrix, scores
from danet.evaluation.report import Case
from danet.model import DANet


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


def check_classes(model: DANet, spec: DatasetSpec) -> None:
    """Raises a UserError unless the model predicts exactly the dataset's classes."""
    if len(model.metadata.classes) != spec.num_classes:
        raise UserError(
            f"the model has {len(model.metadata.classes)} classes but dataset {spec.name} has "
            f"{spec.num_classes}; evaluate it on the data it was trained for"
        )


def available_branches(model: DANet) -> tuple[Branch, ...]:
    """The classifiers that the model has."""
    branches: list[Branch] = ["fused"]
    branches += ["position"] if model.config.position else []
    branches += ["channel"] if model.config.channel else []
    return tuple(branches)


@torch.inference_mode()
def evaluate(
    model: DANet,
    dataset: SegmentationDataset,
    test: TestConfig,
    *,
    precision: str = "auto",
    branches: Sequence[Branch] = ("fused",),
    indices: Iterable[int] | None = None,
    on_picture: Callable[[], None] = lambda: None,
    write_prediction: Callable[[str, npt.NDArray[np.uint8]], None] | None = None,
) -> Evaluation:
    """Segments pictures and counts every labelled pixel.

    Args:
        model: in evaluation mode, on the device to compute on.
        indices: the pictures to score; all where None.
        on_picture: called after each picture.
        write_prediction: takes each picture's name and its H W class ids.

    Raises:
        UserError: classes differ, or a picture or label cannot be read.
    """
    check_classes(model, dataset.spec)
    num_classes = dataset.spec.num_classes
    confusion = {branch: torch.zeros(num_classes, num_classes).long() for branch in branches}
    pictures = []
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        predictions, label = _predict(model, sample, test, precision, branches)
        for branch, prediction in zip(branches, predictions, strict=True):
            counts = confusion_matrix(label, prediction, num_classes).cpu()
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


@torch.inference_mode()
def report_cases(
    model: DANet,
    dataset: SegmentationDataset,
    test: TestConfig,
    pictures: Sequence[PictureScore],
    *,
    precision: str = "auto",
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
        predictions, _ = _predict(model, sample, test, precision, ("fused",))
        prediction = predictions[0].cpu().numpy()
        cases.append(Case(sample.name, sample.image, sample.label, prediction, picture.accuracy))
    return cases


def _predict(
    model: DANet, sample: Sample, test: TestConfig, precision: str, branches: Sequence[Branch]
) -> tuple[Tensor, Tensor]:
    """Label maps R H W and the truth H W."""
    device = next(model.parameters()).device
    image, label = (tensor.to(device) for tensor in as_tensors(sample.image, sample.label))
    with autocast(precision, device):
        return predict_classes(model, image, test, branches), label


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


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes scores, and what else was asked to go with them."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
