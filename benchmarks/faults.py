"""Kills training, prediction, evaluation and export at random moments, and looks at what is left.

After every kill the same command is started again until it comes to its end; then everything must
be byte for byte what a run left alone wrote, with nothing else beside it.

python benchmarks/faults.py
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from results_file import add_results_option, commit, renew_rows

import danet
from danet.data.scenes import render
from danet.training.checkpoint import load_checkpoint

WORKS = ("training", "prediction", "evaluation", "export")
PICTURES = 400
RUN = """
import danet.data.catalog.scenes as scenes
scenes._LENGTHS = {"train": 16, "val": 40, "test": 4}
from danet.cli import main
main()
"""
RECIPE = (
    "model.backbone=test_resnet",
    "model.head_channels=16",
    "model.key_channels=4",
    "data.crop_size=[48, 48]",
    "data.train_images=16",
    "data.workers=0",
    "train.steps=300",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.validate_every=75",
    "train.validate_images=2",
    "test.scale=[96, 72]",
)


class Work(NamedTuple):
    """A command to kill.

    Attributes:
        arguments: of `danet`, given the folder to write to.
        progress: grows as the work goes on; None where that cannot be seen from outside.
        seconds: within which it is killed, evenly spread, since progress was first seen.
        check: raises where a finished-looking file is not whole.
        kept: the files that must be the same in the end.
    """

    arguments: Callable[[Path], list[str]]
    progress: Callable[[Path], int] | None
    seconds: float
    check: Callable[[Path], None]
    kept: Callable[[Path], dict[str, str]]


class Outcome(NamedTuple):
    """What was found.

    Attributes:
        broken: files that looked finished and were not, after a kill.
        finished: runs that came to their end, after kills.
        left_over, different: files of those that a run left alone has not, or has otherwise.
    """

    kills: int
    broken: int
    finished: int
    left_over: int
    different: int


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], start_new_session=True, **quiet
    )


def finish(arguments: list[str]) -> None:
    status = start(arguments).wait()
    assert status == 0, f"danet {' '.join(arguments)}: exit status {status}"


def kill_again_and_again(
    work: Work, folder: Path, kills: int, kind: signal.Signals, seed: int
) -> Outcome:
    chance = random.Random(seed)
    alone, killed = folder / "alone", folder / f"killed{kind}"
    if not alone.exists():
        finish(work.arguments(alone))
    expected = work.kept(alone)
    count = Outcome(0, 0, 0, 0, 0)
    while count.kills < kills or killed.exists() or not count.finished:
        before = work.progress(killed) if work.progress else 0
        process = start(work.arguments(killed))
        while process.poll() is None and work.progress and work.progress(killed) == before:
            time.sleep(0.002)
        if count.kills < kills:
            time.sleep(chance.uniform(0, work.seconds))
            if process.poll() is None:
                os.killpg(process.pid, kind)
                count = count._replace(kills=count.kills + 1)
        status = process.wait()
        try:
            work.check(killed)
        except Exception as error:  # whatever it is, it counts
            print(f"broken: {error}")
            count = count._replace(broken=count.broken + 1)
        if status == 0:
            found = work.kept(killed)
            different = sum(found.get(name) != value for name, value in expected.items())
            count = count._replace(
                finished=count.finished + 1,
                left_over=count.left_over + len(names(killed) - names(alone)),
                different=count.different + different,
            )
            shutil.rmtree(killed)
    return count


def names(folder: Path) -> set[str]:
    """Of all files, but for TensorBoard's, which every start adds to."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Training


def train(out: Path) -> list[str]:
    changes = [f"--set={setting}" for setting in RECIPE]
    return ["train", "demo", "--resume", "--out", str(out), *changes]


def logged_lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_run(out: Path) -> None:
    for name in ("last", "before_last", "best"):
        if (path := out / "checkpoints" / f"{name}.ckpt").exists():
            load_checkpoint(path)
    if (out / "model").exists():
        danet.DANet.from_pretrained(out / "model")


def run_results(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("images_per_second", None)
    return {
        "weights": digest(out / "model" / "model.safetensors"),
        "metrics": json.dumps(rows),
    }


# Prediction


def predict(model: Path, photos: Path) -> Callable[[Path], list[str]]:
    return lambda out: ["predict", str(model), str(photos), "--out", str(out), "--overlay"]


def written_files(out: Path) -> int:
    return len(list(out.iterdir())) if out.exists() else 0


def check_pictures(out: Path) -> None:
    for path in [*out.glob("[!.]*.png"), *out.glob("[!.]*.jpg")]:
        Image.open(path).load()


def predicted(out: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in [*out.glob("*.png"), *out.glob("*.jpg")]}


# Evaluation and export


def evaluate(model: Path) -> Callable[[Path], list[str]]:
    return lambda out: [
        *("evaluate", str(model), "--data", "scenes"),
        *("--json", str(out / "scores.json"), "--report", str(out / "report.html")),
    ]


def check_scores(out: Path) -> None:
    if (out / "scores.json").exists():
        json.loads((out / "scores.json").read_text())
    if (out / "report.html").exists():
        assert (out / "report.html").read_text().rstrip().endswith("</html>")


def export(model: Path) -> Callable[[Path], list[str]]:
    return lambda out: ["export", str(model), "--format", "torch", "--out", str(out / "m.pt2")]


def check_export(out: Path) -> None:
    if (out / "m.pt2").exists():
        import torch

        torch.export.load(out / "m.pt2")


def every_file(out: Path) -> dict[str, str]:
    return {name: digest(out / name) for name in names(out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("--kills", type=int, default=30, help="of each kind")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, help="these works")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos, model = folder / "photos", folder / "model"
        photos.mkdir()
        for index in range(PICTURES):
            render(2, index)[0].save(photos / f"{index:03}.png")
        options = {"head_channels": 64, "key_channels": 8, "auxiliary": False}
        danet.DANet(11, "test_resnet", pretrained_backbone=False, **options).save_pretrained(model)
        works = {
            "training": Work(train, logged_lines, 2.0, check_run, run_results),
            "prediction": Work(
                predict(model, photos), written_files, 1.0, check_pictures, predicted
            ),
            "evaluation": Work(evaluate(model), None, 9.0, check_scores, every_file),
            "export": Work(export(model), None, 16.0, check_export, lambda _: {}),
        }
        assert works.keys() == set(WORKS)
        for title in args.only:
            work = works[title]
            for kind in (signal.SIGKILL, signal.SIGTERM):
                few = title in ("evaluation", "export")
                kills = args.kills // 3 if few else args.kills
                (folder / title).mkdir(exist_ok=True)
                found = kill_again_and_again(work, folder / title, kills, kind, seed=1)
                row = {"work": title, "signal": kind.name, **found._asdict(), "commit": commit()}
                print(row, flush=True)
                rows.append(row)
    renew_rows(args.results / "faults.csv", rows, case=("work", "signal"))


if __name__ == "__main__":
    main()
