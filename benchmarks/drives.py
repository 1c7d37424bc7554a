"""What helps on a drive that training has not seen: CamVid with one drive left out.

Every variant of the recipe `ablation_camvid` trains on the training pictures of the other drives
and is scored on all labelled pictures of the one left out, by a small network, for many runs tell
more than few. A run that was stopped goes on from its checkpoint, and what has its row is not run
again.

    python benchmarks/drives.py --camvid DIR
"""

import argparse
from pathlib import Path

from results_file import append_rows, commit
from training_runs import existing_folder, runs_parser, train_and_score, without_rows

DRIVES = ("0006R0", "0016E5")
SCENES = "data.extra=[{name: scenes, images: 150}]"
VARIANTS = {
    "recipe": [],
    "no photometric distortion": ["data.photometric_distortion=false"],
    "degradation 0.5": ["data.degradation=0.5"],
    "ClassMix 0.5": ["data.class_mix=0.5"],
    "150 scenes": [SCENES],
    "scale 0.5 to 2": ["data.scale_range=[0.5, 2.0]"],
    "weight decay 0.1": ["train.weight_decay=0.1"],
    "all data settings": [
        "data.degradation=0.5",
        "data.class_mix=0.5",
        SCENES,
        "data.scale_range=[0.5, 2.0]",
    ],
    "3000 steps": ["train.steps=3000"],
    "no attention": ["model.position=false", "model.channel=false"],
}
"""What each changes in the recipe."""


def leave_out(drive: str, camvid: Path, folder: Path) -> Path:
    """A data set of links: to the training pictures of the other drives, and to all of this one."""
    kinds = ("train", "trainannot", "val", "valannot")
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        for file in sorted((camvid / kind).iterdir()):
            left_out = file.name.startswith(drive)
            if left_out or kind.startswith("train"):
                link = folder / (kind.replace("train", "val") if left_out else kind) / file.name
                link.unlink(missing_ok=True)
                link.symlink_to(file.resolve())
    return folder


def run(drive: str, variant: str, seed: int, args: argparse.Namespace) -> None:
    """Trains one variant without the drive, scores it there, and adds its row to the results."""
    root = leave_out(drive, args.camvid, args.out / f"without_{drive}")
    folder = args.out / f"{drive}_{variant.replace(' ', '_')}_{seed}"
    settings = [*VARIANTS[variant], f"data.root={root}", f"train.seed={seed}", *args.set]
    row = {"commit": commit(), "drive": drive, "variant": variant, "seed": seed}
    row |= train_and_score("ablation_camvid", settings, folder, "val")
    append_rows(args.results / "drives.csv", [row])
    print(f"{drive} left out, {variant}, seed {seed}: mIoU {row['mIoU']:.4f}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = runs_parser(__doc__.splitlines()[0], VARIANTS, seeds=[0], out="runs/drives")
    parser.add_argument("--camvid", type=existing_folder, metavar="DIR", required=True)
    parser.add_argument("--drives", nargs="+", choices=DRIVES, default=list(DRIVES))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    runs = [
        (drive, variant, seed)
        for seed in args.seeds
        for variant in args.variants
        for drive in args.drives
    ]
    for one in without_rows(runs, args.results / "drives.csv", "drive"):
        run(*one, args)


if __name__ == "__main__":
    main()
