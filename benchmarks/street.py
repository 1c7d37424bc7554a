"""The shipped street model on CamVid's validation pictures: scores, calibration, time and memory.

python benchmarks/street.py street-small --root DIR
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results_file import add_results_option, commit, write_rows

import danet
from danet.bench.measure import resident_bytes
from danet.bench.report import hardware
from danet.data import open_dataset
from danet.data.spec import IGNORE_INDEX

BINS = 20
PROTOCOLS = {
    "single scale": [],
    "mirrored too": ["--flip"],
}


def evaluate(args: argparse.Namespace, options: list[str]) -> dict[str, float]:
    """The scores that `danet evaluate` gives, from the model's folder on disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        command = [sys.executable, "-m", "danet", "evaluate", args.model, "--data", "camvid"]
        command += ["--root", str(args.root), *options, "--json", str(path)]
        subprocess.run(command, check=True)
        found = json.loads(path.read_text(encoding="utf-8"))
    scores = {name: found[name] for name in ("mIoU", "mAcc", "aAcc")}
    return scores | {name: score["IoU"] for name, score in found["per_class"].items()}


def calibration(predictor: danet.Predictor, args: argparse.Namespace) -> list[dict[str, float]]:
    """For each bin of probability its pixels, their mean probability, and how many are right."""
    pixels, right, probability = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
    for sample in open_dataset("camvid", args.root, "val"):
        found = predictor(sample.image, probabilities=True)
        labelled = sample.label != IGNORE_INDEX
        confidence = found.probabilities.max(0)[labelled]
        correct = (found.classes == sample.label)[labelled]
        index = np.minimum((confidence * BINS).astype(int), BINS - 1)
        pixels += np.bincount(index, minlength=BINS)
        right += np.bincount(index, weights=correct, minlength=BINS)
        probability += np.bincount(index, weights=confidence, minlength=BINS)
    return [
        {
            "from": round(index / BINS, 2),
            "pixels": int(pixels[index]),
            "probability": round(probability[index] / pixels[index], 4),
            "accuracy": round(right[index] / pixels[index], 4),
        }
        for index in range(BINS)
        if pixels[index]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("model")
    parser.add_argument("--root", type=Path, required=True, help="the folder of CamVid")
    args = parser.parse_args()
    predictor = danet.Predictor(args.model)
    image = open_dataset("camvid", args.root, "val")[0].image
    predictor(image)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        predictor(image)
        seconds.append(time.perf_counter() - start)
    cost = {
        "seconds_480x360": round(statistics.median(seconds), 4),
        "peak_MiB": round(resident_bytes("VmHWM") / 2**20),
    }
    rows = []
    for protocol, options in PROTOCOLS.items():
        scores = {name: round(value, 5) for name, value in evaluate(args, options).items()}
        row = {"commit": commit(), "model": args.model, "protocol": protocol, **scores}
        rows.append({**row, **cost, "hardware": hardware("cpu")})
        print(rows[-1], flush=True)
    write_rows(args.results / "street.csv", rows)
    write_rows(args.results / "street_calibration.csv", calibration(predictor, args))


if __name__ == "__main__":
    main()
