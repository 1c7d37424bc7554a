"""The paper's ablation: which attention helps, and by how much (table 1, arXiv 1809.02983).

Trains and scores every variant with every seed, one process after the other, everything else being
equal. A run that was stopped goes on from its checkpoint, and what has its row is not run again.

    python benchmarks/ablation.py --camvid DIR --results NEW
"""

import argparse
import json
import statistics

from results_file import append_rows, commit
from training_runs import existing_folder, runs_parser, train_and_score, without_rows

VARIANTS = {
    "fcn": ["model.position=false", "model.channel=false"],
    "position": ["model.channel=false"],
    "channel reference": ["model.position=false"],
    "channel paper": ["model.position=false", "model.channel_affinity=paper"],
    "both": [],
    "both, key width 4": ["model.key_channels=4"],
    "both, key width 64": ["model.key_channels=64"],
}
"""What each changes in the recipe, whose key width is 16."""
SPLITS = {"scenes": "test", "camvid": "val"}
"""Where each data set's score is taken: pictures that training never saw."""


def run(data: str, variant: str, seed: int, args: argparse.Namespace) -> None:
    """Trains and scores one variant, and adds its rows to the results."""
    folder = args.out / f"{data}_{variant.replace(', ', '_').replace(' ', '_')}_{seed}"
    settings = [*VARIANTS[variant], f"train.seed={seed}", *args.set]
    settings += [f"data.root={args.camvid}"] if data == "camvid" else []
    scores = train_and_score(f"ablation_{data}", settings, folder, SPLITS[data])
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in logged if "images_per_second" in row]
    case = {"data": data, "variant": variant, "seed": seed}
    row = {"commit": commit(), **case, "steps": logged[-1]["step"], "split": SPLITS[data]}
    row |= {"images_per_second": round(statistics.median(rates), 2)}
    row |= scores
    append_rows(
        args.results / "ablation_curves.csv",
        [
            {
                **case,
                "step": line["step"],
                "loss_fused": round(line["loss_fused"], 4),
                "residual_position": _rounded(line.get("residual_position")),
                "residual_channel": _rounded(line.get("residual_channel")),
            }
            for line in logged
            if "loss_fused" in line and line["step"] % 50 == 0
        ],
    )
    append_rows(args.results / "ablation.csv", [row])
    print(f"{data}, {variant}, seed {seed}: mIoU {row['mIoU']:.4f}", flush=True)


def _rounded(weight: float | None) -> float | str:
    return "" if weight is None else round(weight, 4)


def parse_args() -> argparse.Namespace:
    parser = runs_parser(__doc__.splitlines()[0], VARIANTS, seeds=[0, 1, 2], out="runs/ablation")
    parser.add_argument(
        "--camvid", type=existing_folder, metavar="DIR", help="without it, scenes only"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    runs = [
        (data, variant, seed)
        for seed in args.seeds
        for data in (SPLITS if args.camvid else ["scenes"])
        for variant in args.variants
    ]
    for one in without_rows(runs, args.results / "ablation.csv", "data"):
        run(*one, args)


if __name__ == "__main__":
    main()
