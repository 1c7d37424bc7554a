"""Training runs of several variants and seeds: one after the other, resumable, a row each."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results_file import add_results_option, read_rows

from danet.bench.report import hardware
from danet.devices import choose_device


def runs_parser(
    description: str, variants: Mapping[str, Sequence[str]], seeds: Sequence[int], out: str
) -> argparse.ArgumentParser:
    """The options of every script of such runs, with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--out", type=Path, default=Path(out), help="run folders")
    add_results_option(
        parser, "where rows go; runs that have theirs there are not run again; %(default)s"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe's key"
    )
    return parser


def existing_folder(text: str) -> Path:
    """An option's folder, which must be there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def without_rows(
    runs: Sequence[tuple[str, str, int]], results: Path, kind: str
) -> list[tuple[str, str, int]]:
    """Of runs (a column `kind`, variant, seed) those without a row; says how many have one."""
    finished = {(row[kind], row["variant"], int(row["seed"])) for row in read_rows(results)}
    found = [run for run in runs if run not in finished]
    if len(found) < len(runs):
        print(
            f"{len(runs) - len(found)} of {len(runs)} runs have their rows in {results}; "
            "to run them again, write to another folder: --results DIR",
            flush=True,
        )
    return found


def train_and_score(
    recipe: str, settings: Sequence[str], folder: Path, split: str
) -> dict[str, Any]:
    """Trains, going on where the run was stopped; returns hardware and scores for its row."""
    options = [part for setting in settings for part in ("--set", setting)]
    _danet("train", recipe, *options, "--out", str(folder), "--resume")
    _danet("evaluate", str(folder), "--split", split, "--json", str(folder / "scores.json"))
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"hardware": hardware(str(choose_device("auto")))}
    row |= {name: round(found[name], 5) for name in ("mIoU", "mAcc", "aAcc")}
    return row | {name: round(score["IoU"], 5) for name, score in found["per_class"].items()}


def _danet(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "danet", *arguments], check=True)
