"""Bulk prediction in this process, and what it wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

import danet
from danet.bulk import segment_inputs
from danet.cli import app
from danet.inputs import Results, find_inputs
from danet.processes import Share

ALONE, FIRST, SECOND = Share(0, 1), Share(0, 2), Share(1, 2)

SIZES = ((40, 30), (33, 50), (40, 30), (64, 20))


def picture(index: int) -> Image.Image:
    width, height = SIZES[index % len(SIZES)]
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def predict(model: Path, *arguments: object) -> Result:
    words = ["predict", str(model), *map(str, arguments), "--precision", "fp32"]
    return CliRunner().invoke(app, words)


def manifest(out: Path) -> list[dict[str, Any]]:
    lines = [p.read_text(encoding="utf-8") for p in sorted(out.glob("manifest*.jsonl"))]
    return [json.loads(line) for line in "".join(lines).splitlines()]


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def segment_all(
    segmenter: danet.Predictor, inputs: list[Path], out: Path
) -> list[tuple[str, str | None]]:
    out.mkdir()
    results = Results(out, overlay=False, frame_masks=True)
    found, _ = find_inputs([str(path) for path in inputs], results)
    outcomes = segment_inputs(
        segmenter, found, results, share=Share(0, 1), on_frame=lambda *_: None
    )
    return sorted((Path(outcome.item.name).name, outcome.error) for outcome in outcomes)
