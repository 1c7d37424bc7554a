import base64
import html.parser
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from danet.data.spec import DatasetSpec
from danet.evaluation.report import (
    WRONG_COLOR,
    Case,
    frequent_confusions,
    learning_curve,
    write_report,
)

SPEC = DatasetSpec("two", ("sky <b>", "road & kerb"), ((10, 20, 30), (200, 100, 0)))
CONFUSION = torch.tensor([[6, 2], [1, 3]])
HISTORY = [
    {"step": 10, "loss": 2.0},
    {"step": 20, "loss": 1.0},
    {"step": 20, "val/mIoU": 0.5},
    {"step": 40, "val/mIoU": 0.6},
]


def case(name: str = "street <script>alert(1)</script>") -> Case:
    truth = np.array([[0, 0, 1], [1, 255, 255]], np.uint8)
    prediction = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    big = (
        np.kron(truth, np.ones((16, 16), np.uint8)),
        np.kron(prediction, np.ones((16, 16), np.uint8)),
    )
    return Case(name, Image.new("RGB", (48, 32), (90, 90, 90)), *big, 3 / 4)


def report(tmp_path: Path, **changes: object) -> str:
    arguments = {
        "title": "a report",
        "spec": SPEC,
        "confusion": CONFUSION,
        "branch_mean_iou": {"fused": 0.583, "position": 0.4},
        "cases": [case()],
        "history": HISTORY,
        "facts": {"Model": "runs/<x>"},
    }
    path = tmp_path / "report.html"
    write_report(path, **{**arguments, **changes})
    return path.read_text(encoding="utf-8")


class WellFormed(html.parser.HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def test_one_file_without_outside_references(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert not re.search(r"(https?:)?//", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
    tags = WellFormed(page).found
    assert tags.count("img") == 4
    assert tags.count("svg") == 2
    assert "script" not in tags
    assert "link" not in tags


def test_names_are_escaped(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert "<script" not in page
    assert "sky &lt;b&gt;" in page
    assert "road &amp; kerb" in page


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """As of files from systems with another encoding."""
    name = os.fsdecode(b"stra\xdfe")
    shown = report(tmp_path, cases=[case(name)])
    assert r"stra\udcdfe" in shown


def test_scores_are_shown(tmp_path: Path) -> None:
    page = report(tmp_path)
    mean_iou = (6 / 9 + 3 / 6) / 2
    assert f"<b>{100 * mean_iou:.1f}</b>" in page
    assert "<b>75.0</b><span>pixel accuracy" in page
    assert "position branch alone" in page


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/\w+;base64,([\w+/=]+)", page)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
        for data in found
    ]


def test_pictures_show_truth_prediction_and_errors(tmp_path: Path) -> None:
    image, truth, prediction, errors = pictures(report(tmp_path))
    assert image.shape == truth.shape == errors.shape == (32, 48, 3)
    assert truth[8, 8].tolist() == [10, 20, 30]
    assert truth[8, 40].tolist() == [200, 100, 0]
    assert prediction[8, 24].tolist() == [200, 100, 0]
    assert np.abs(errors[8, 24] - WRONG_COLOR).max() < 40  # wrong
    assert errors[8, 8].min() > 150  # right: pale
    assert errors[24, 40].max() < 110  # ignored: dark


def test_without_history_or_pictures(tmp_path: Path) -> None:
    page = report(tmp_path, history=[], cases=[])
    assert "<svg" not in page
    assert "<img" not in page


@pytest.mark.parametrize("num_classes", [1, 150])
def test_any_number_of_classes(tmp_path: Path, num_classes: int) -> None:
    spec = DatasetSpec("many", tuple(f"c{i}" for i in range(num_classes)))
    confusion = torch.eye(num_classes).long()
    page = report(tmp_path, spec=spec, confusion=confusion, cases=[])
    WellFormed(page)
    assert len(page) < 200_000


def test_a_report_of_pictures_without_labels(tmp_path: Path) -> None:
    WellFormed(report(tmp_path, confusion=torch.zeros(2, 2).long()))


def test_frequent_confusions() -> None:
    confusion = torch.tensor([[5, 3, 0], [0, 1, 0], [0, 1, 7]])
    assert frequent_confusions(confusion, "abc") == [("a", "b", 0.75), ("c", "b", 0.25)]
    assert frequent_confusions(torch.eye(2), "ab") == []


def test_learning_curve_scales_to_its_box() -> None:
    curve = learning_curve([{"step": 10, "x": 4.0}, {"step": 30, "x": 1.0}], "x", "X")
    assert curve.path == "M0.00 0.00L100.00 75.00"
    assert (curve.low, curve.high, curve.first_step, curve.last_step) == (0, 4, 10, 30)
    assert learning_curve([{"step": 10, "x": 4.0}], "x", "X") is None
    nans = [{"step": 1, "x": float("nan")}, {"step": 2, "x": 1.0}, {"step": 3, "x": 1.0}]
    assert learning_curve(nans, "x", "X").first_step == 2
