"""The first 50 losses of a small run: a change that should not change numbers shows that here.

python tests/golden/losses.py            # compare with losses.csv
python tests/golden/losses.py --write    # after a change that should
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import torch

from danet.recipes import load_recipe
from danet.training.loop import train

RECORD = Path(__file__).with_name("losses.csv")
RELATIVE_TOLERANCE = 0.02
"""What other processors' roundings come to after 50 steps; on one machine the losses are equal."""
SETTINGS = (
    "model.head_channels=16",
    "model.key_channels=4",
    "model.auxiliary=true",
    "data.crop_size=[64, 64]",
    "data.train_images=8",
    "data.workers=0",
    "data.photometric_distortion=true",
    "train.steps=50",
    "train.optimizer=sgd",
    "train.lr=0.005",
    "train.weight_decay=5e-4",
    "train.precision=fp32",
    "train.device=cpu",
    "train.log_every=1",
    "train.validate_images=1",
    "test.scale=[96, 72]",
)
COLUMNS = ("loss", "loss_fused", "loss_position", "loss_channel", "loss_auxiliary")


def measured() -> list[dict[str, float]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = train(load_recipe("demo", SETTINGS), Path(folder) / "run")
        return [row for row in run.read_metrics() if "loss" in row]


def recorded() -> list[dict[str, float]]:
    with RECORD.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def largest_difference(rows: list[dict[str, float]], record: list[dict[str, float]]) -> float:
    """The largest relative difference of any loss at any step."""
    return max(
        abs(row[column] / reference[column] - 1)
        for row, reference in zip(rows, record, strict=True)
        for column in COLUMNS
    )


def write(rows: list[dict[str, float]]) -> None:
    with RECORD.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", *COLUMNS))
        for row in rows:
            writer.writerow((int(row["step"]), *(f"{row[column]:.7g}" for column in COLUMNS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the losses anew")
    rows = measured()
    if parser.parse_args().write:
        write(rows)
        return 0
    difference = largest_difference(rows, recorded())
    print(f"largest relative difference of 50 steps: {difference:.2e}")
    return int(difference > RELATIVE_TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
