"""The evaluation report: one self-contained HTML file.

The page is `report.html.j2`; this module computes its content.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from danet.atomic import replacing
from danet.data.spec import IGNORE_INDEX, DatasetSpec, SegmentationDataset
from danet.evaluation.evaluate import PictureScore, Segment
from danet.evaluation.metrics import scores
from danet.palette import colored, hex_color, highlighted

MAX_PICTURE_SIDE = 640
"""Longest side in pixels; larger pictures are shrunk to keep the file small."""
LARGEST_MATRIX = 40
"""Largest number of classes for which the whole confusion matrix is shown."""
CONFUSIONS_LISTED = 10
WRONG_COLOR = (213, 44, 90)


class Case(NamedTuple):
    """A segmented picture in the report.

    Attributes:
        truth: H W uint8 train ids, 255 ignored.
        prediction: H W uint8 class ids.
        accuracy: share of the labelled pixels that are right, 0..1.
    """

    name: str
    image: Image.Image
    truth: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]
    accuracy: float


class Curve(NamedTuple):
    """A line chart: an SVG path in a 100 x 100 box, and the labels of its axes."""

    title: str
    path: str
    dots: list[tuple[float, float]]
    low: float
    high: float
    first_step: int
    last_step: int
    last: float


def report_cases(
    segment: Segment,
    dataset: SegmentationDataset,
    pictures: Sequence[PictureScore],
    *,
    worst: int = 8,
    others: int = 4,
) -> list[Case]:
    """Segments the worst pictures again, and some that are spread evenly over the others.

    Args:
        worst, others: numbers of pictures.
    """
    ranked = sorted((p for p in pictures if not math.isnan(p.accuracy)), key=lambda p: p.accuracy)
    rest = ranked[worst:]
    spread = [rest[(2 * i + 1) * len(rest) // (2 * others)] for i in range(others)] if rest else []
    cases = []
    for picture in dict.fromkeys([*ranked[:worst], *spread]):
        sample = dataset[picture.position]
        prediction = segment(sample)[0].cpu().numpy()
        cases.append(Case(sample.name, sample.image, sample.label, prediction, picture.accuracy))
    return cases


def write_report(
    path: Path,
    *,
    title: str,
    spec: DatasetSpec,
    confusion: Tensor,
    branch_mean_iou: Mapping[str, float],
    cases: Sequence[Case],
    history: Sequence[Mapping[str, float]],
    facts: Mapping[str, str],
) -> None:
    """Writes the report as one file without outside references.

    Args:
        confusion: K K pixel counts; rows are the true classes.
        branch_mean_iou: mIoU in 0..1 of each scored branch.
        cases: shown in this order.
        history: rows of `metrics.jsonl`; no learning curves are drawn if empty.
        facts: rows of the table of what was evaluated and how.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("danet.evaluation", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    result = scores(confusion)
    page = environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        result=result,
        classes=_class_rows(spec, confusion),
        branches=branch_mean_iou,
        curves=[
            curve
            for curve in (
                learning_curve(history, "loss", "Training loss"),
                learning_curve(history, "val/mIoU", "Validation mIoU"),
            )
            if curve is not None
        ],
        matrix=_row_shares(confusion).tolist() if spec.num_classes <= LARGEST_MATRIX else None,
        confusions=frequent_confusions(confusion, spec.classes),
        cases=[_pictures(case, spec) for case in cases],
    )
    with replacing(path) as temporary:
        # Names of files may hold bytes that are no characters.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def _class_rows(spec: DatasetSpec, confusion: Tensor) -> list[dict[str, Any]]:
    pixels = confusion.sum(1).double()
    shares = (pixels / pixels.sum().clamp(min=1)).tolist()
    return [
        {
            "name": name,
            "color": hex_color(color),
            "iou": score.iou,
            "accuracy": score.accuracy,
            "share": share,
        }
        for name, color, score, share in zip(
            spec.classes, spec.palette, scores(confusion).per_class, shares, strict=True
        )
    ]


def _row_shares(confusion: Tensor) -> Tensor:
    """Divides each row by its sum: shares of a true class's pixels; 0 for a class without any."""
    counts = confusion.double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def frequent_confusions(confusion: Tensor, classes: Sequence[str]) -> list[tuple[str, str, float]]:
    """The most frequent (truth, prediction) errors, each with its share of all wrong pixels."""
    wrong = confusion.double().clone()
    wrong.fill_diagonal_(0)
    total = wrong.sum().item()
    largest = wrong.flatten().topk(min(CONFUSIONS_LISTED, wrong.numel()))
    return [
        (classes[index // len(classes)], classes[index % len(classes)], count / total)
        for count, index in zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
        if count > 0
    ]


def learning_curve(history: Sequence[Mapping[str, float]], key: str, title: str) -> Curve | None:
    """The curve of one logged value; None if it was logged less than twice."""
    points = [(row["step"], row[key]) for row in history if key in row]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) < 2:
        return None
    steps, values = zip(*points, strict=True)
    low, high = min(0.0, *values), max(values)
    width, height = max(steps) - min(steps) or 1, high - low or 1
    scaled = [
        (100 * (step - min(steps)) / width, 100 - 100 * (value - low) / height)
        for step, value in points
    ]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in scaled)
    dots = scaled if len(scaled) <= 40 else []
    return Curve(title, path, dots, low, high, int(min(steps)), int(max(steps)), values[-1])


def _pictures(case: Case, spec: DatasetSpec) -> dict[str, Any]:
    ignored = case.truth == IGNORE_INDEX
    wrong = (case.prediction != case.truth) & ~ignored
    return {
        "name": case.name,
        "accuracy": case.accuracy,
        "pictures": {
            "picture": _as_url(case.image, "JPEG"),
            "truth": _as_url(colored(case.truth, spec.palette), "PNG"),
            "prediction": _as_url(colored(case.prediction, spec.palette), "PNG"),
            "errors": _as_url(_error_map(case.image, wrong, ignored), "JPEG"),
        },
    }


def _error_map(
    image: Image.Image, wrong: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_]
) -> Image.Image:
    """The picture in pale grey, with ignored pixels darkened and wrong pixels in `WRONG_COLOR`."""
    return highlighted(image, wrong, WRONG_COLOR, gain=0.35, offset=160, dimmed=ignored)


def _as_url(image: Image.Image, file_format: str) -> str:
    """The picture as a data URL, shrunk to `MAX_PICTURE_SIDE`."""
    shrunk = image.copy()
    smooth = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BOX
    shrunk.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE), smooth)
    buffer = io.BytesIO()
    shrunk.save(buffer, file_format, quality=82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{file_format.lower()};base64,{data}"
