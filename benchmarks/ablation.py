"""The paper's ablation: which attention helps, and by how much (table 1, arXiv 1809.02983).

Trains and scores every variant with every seed, one process after the other, everything else being
equal. A run that was stopped goes on from its checkpoint, and what has its row is not run again.

    python benchmarks/ablation.py --camvid DIR
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from results_file import RESULTS, append_rows, commit, read_rows

from danet.bench.report import hardware
from danet.devices import choose_device

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
    options = [part for setting in settings for part in ("--set", setting)]
    _danet("train", f"ablation_{data}", *options, "--out", str(folder), "--resume")
    _danet("evaluate", str(folder), "--split", SPLITS[data], "--json", str(folder / "scores.json"))
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in logged if "images_per_second" in row]
    case = {"data": data, "variant": variant, "seed": seed}
    row = {"commit": commit(), **case, "steps": logged[-1]["step"], "split": SPLITS[data]}
    row |= {"images_per_second": round(statistics.median(rates), 2)}
    row |= {"hardware": hardware(str(choose_device("auto")))}
    row |= {name: round(found[name], 5) for name in ("mIoU", "mAcc", "aAcc")}
    row |= {name: round(score["IoU"], 5) for name, score in found["per_class"].items()}
    append_rows(
        RESULTS / "ablation_curves.csv",
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
    append_rows(RESULTS / "ablation.csv", [row])
    print(f"{data}, {variant}, seed {seed}: mIoU {found['mIoU']:.4f}", flush=True)


def _danet(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "danet", *arguments], check=True)


def _rounded(weight: float | None) -> float | str:
    return "" if weight is None else round(weight, 4)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="without it, scenes only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="run folders")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe's key"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    finished = {
        (row["data"], row["variant"], int(row["seed"]))
        for row in read_rows(RESULTS / "ablation.csv")
    }
    for seed in args.seeds:
        for data in SPLITS if args.camvid else ["scenes"]:
            for variant in args.variants:
                if (data, variant, seed) not in finished:
                    run(data, variant, seed, args)


if __name__ == "__main__":
    main()
