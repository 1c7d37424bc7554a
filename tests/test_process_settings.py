"""Settings that are the whole process's stay as they were, whatever threads do at once."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

import danet
from danet.data.images import open_image
from danet.data.scenes import render
from danet.kernels.precision import fast_exact_float32
from networks import tiny_danet


def in_threads(work: Callable[[int], object], count: int = 4) -> None:
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_explaining_leaves_compilation_on_and_matplotlib_as_it_was(tmp_path: Path) -> None:
    predictor = danet.Predictor(tiny_danet(), device="cpu", precision="fp32")
    picture = render(2, 7)[0].resize((64, 48))
    fonts, math = mpl.rcParams["font.family"], mpl.rcParams["text.parse_math"]

    def explain(index: int) -> None:
        danet.explain(predictor, picture, (3, 4)).save(tmp_path / f"{index}.png")

    in_threads(explain)
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    assert len(graphs) == 1
    assert (mpl.rcParams["font.family"], mpl.rcParams["text.parse_math"]) == (fonts, math)


def test_opening_pictures_leaves_the_filters_of_warnings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    in_threads(lambda _: [open_image(tmp_path / "a.png") for _ in range(100)])
    assert list(warnings.filters) == before


def test_a_precision_that_was_set_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danet.kernels.precision.onednn_keeps_float32", lambda: True)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        with fast_exact_float32(torch.device("cpu")):
            setting.fp32_precision = "tf32"
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


def test_a_figure_is_the_same_from_any_thread(tmp_path: Path) -> None:
    predictor = danet.Predictor(tiny_danet(), device="cpu", precision="fp32")
    explanation = danet.explain(predictor, np.zeros((48, 64, 3), np.uint8), (3, 4))
    in_threads(lambda index: explanation.save(tmp_path / f"{index}.svg"), 3)
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(set(files)) == 1
