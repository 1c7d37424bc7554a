"""Draws docs/ablation.png: the residual weights' course, and the training loss of each variant.

Reads benchmarks/results/ablation_curves.csv, which `make ablation` writes.
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
from tables import DOCS, rows_of

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = {
    "fcn": "#000000",
    "position": "#0072B2",
    "channel reference": "#D55E00",
    "channel paper": "#E69F00",
    "both": "#009E73",
}


def main() -> None:
    """One row a data set: loss, position attention's weight, channel attention's weight."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    mpl.use("Agg")
    rows = rows_of("ablation_curves")
    sets = list(dict.fromkeys(row["data"] for row in rows))
    columns = {
        "loss_fused": "training loss",
        "residual_position": "alpha of position attention",
        "residual_channel": "beta of channel attention",
    }
    figure, grid = plt.subplots(len(sets), 3, figsize=(12, 3.2 * len(sets)), squeeze=False)
    for data, axes_row in zip(sets, grid, strict=True):
        for (column, label), axes in zip(columns.items(), axes_row, strict=True):
            for variant, color in COLORS.items():
                chosen = [r for r in rows if (r["data"], r["variant"]) == (data, variant)]
                for seed in dict.fromkeys(row["seed"] for row in chosen):
                    points = [
                        (int(row["step"]), float(row[column]))
                        for row in chosen
                        if row["seed"] == seed and row[column]
                    ]
                    if points:
                        name = variant if seed == "0" else None
                        axes.plot(*zip(*points, strict=True), color=color, lw=1.1, label=name)
            axes.set_ylabel(f"{label}, {data}", fontsize="small")
            axes.spines[["top", "right"]].set_visible(False)
            if column == "loss_fused":
                axes.set_yscale("log")
                axes.legend(frameon=False, fontsize="x-small")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(DOCS / "ablation.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
