"""Draws docs/parity_losses.png: 50 training steps here and in mmsegmentation.

Reads benchmarks/results/parity_losses_*.csv, which `DANET_RECORD=benchmarks/results make parity`
writes.
"""

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = {"float32": "#D55E00", "float64": "#0072B2"}


def losses(dtype: str) -> tuple[list[float], list[float]]:
    """Every step's loss, mmsegmentation's and ours."""
    with (RESULTS / f"parity_losses_{dtype}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    theirs, ours = ([float(row[name]) for row in rows] for name in ("mmsegmentation", "danet"))
    return theirs, ours


def main() -> None:
    """Draw both curves, and their difference below."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    mpl.use("Agg")
    figure, (curves, differences) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    theirs, ours = losses("float64")
    steps = range(1, len(ours) + 1)
    curves.plot(steps, theirs, color="#999999", linewidth=5, label="mmsegmentation 1.2.2")
    curves.plot(steps, ours, color="black", linewidth=1.2, label="danet")
    curves.set_ylabel("training loss (float64)")
    curves.legend(frameon=False)
    for dtype, color in COLORS.items():
        theirs, ours = losses(dtype)
        relative = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
        differences.plot(steps, relative, "o-", color=color, markersize=3, label=dtype)
    differences.set_yscale("symlog", linthresh=1e-14)  # the first differences are 0
    differences.set_xlabel("step")
    differences.set_ylabel("relative difference")
    differences.legend(frameon=False)
    for axes in (curves, differences):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "parity_losses.png", dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
