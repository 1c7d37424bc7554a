"""Scores of semantic segmentation, computed from the confusion matrix of a whole split."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassScore(NamedTuple):
    """Scores of one class, fractions in 0..1.

    Attributes:
        iou: nan if the class occurs neither in the truth nor in the prediction.
        accuracy: nan if the class does not occur in the truth.
    """

    iou: float
    accuracy: float


class Scores(NamedTuple):
    """Fractions in 0..1, as mmsegmentation's IoUMetric defines them; means skip nan classes.

    Attributes:
        mean_iou: mean over classes of TP / (TP + FP + FN).
        mean_accuracy: mean over classes of TP / (TP + FN).
        overall_accuracy: correctly labelled pixels over all labelled pixels.
        per_class: one entry per class, in train id order.
    """

    mean_iou: float
    mean_accuracy: float
    overall_accuracy: float
    per_class: tuple[ClassScore, ...]


def confusion_matrix(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by (true class, predicted class).

    Args:
        truth: integer train ids of any shape; ids outside 0..K-1 are ignored.
        prediction: integer class ids 0..K-1 of the same shape.

    Returns:
        K K int64; rows are the true classes.
    """
    truth, prediction = truth.flatten().long(), prediction.flatten().long()
    labelled = (truth >= 0) & (truth < num_classes)
    pair = truth[labelled] * num_classes + prediction[labelled]
    return torch.bincount(pair, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion: Tensor) -> Scores:
    """Scores of a K K confusion matrix whose rows are the true classes."""
    counts = confusion.double()
    correct, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = correct / (truth + predicted - correct)
    accuracy = correct / truth
    return Scores(
        mean_iou=iou.nanmean().item(),
        mean_accuracy=accuracy.nanmean().item(),
        overall_accuracy=(correct.sum() / counts.sum()).item(),
        per_class=tuple(
            ClassScore(*pair) for pair in zip(iou.tolist(), accuracy.tolist(), strict=True)
        ),
    )
