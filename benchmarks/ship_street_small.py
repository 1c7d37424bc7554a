"""Makes models/street-small from a finished run, averaged with the weights that it went on from.

docs/street.md has the runs and their shares.

    python benchmarks/ship_street_small.py runs/street_small_more_scenes --root DIR \
        --former street-small --share 0.5
"""

import argparse
from pathlib import Path

from street import evaluate

import danet
from danet.data import open_dataset
from danet.model_card import PICTURE_FILE, write_model_card

NAME = "street-small"
FOLDER = Path(__file__).parent.parent / "models" / NAME
NOTE = """\
Street scenes in the 11 classes of CamVid, small enough for a CPU. Trained from scratch:
generated street scenes first, then the 367 training pictures of CamVid (Brostow et al.,
University of Cambridge) in the split of the SegNet tutorial, at 480x360, then both together,
at last with noise added. The weights are an average of those that the last runs came to.
No other pictures and no other weights went in.

**Licence.** CamVid is for research; use this model for research too. The code is under the
project's own licence.

**Limits.** Daylight and dusk in one city, from one car, traffic on the left, a low resolution.
It has not seen night, snow, other cameras or other countries, and is not fit for driving.
Poles, signs and people that are a few pixels wide are often missed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--former", type=Path, required=True, help="the model it went on from")
    parser.add_argument("--root", type=Path, required=True, help="the folder of CamVid")
    parser.add_argument("--share", type=float, default=0.6, help="of the run's weights")
    args = parser.parse_args()
    run = args.run
    model = danet.DANet.from_pretrained(run)
    former = danet.DANet.from_pretrained(args.former).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(former[name], 1 - args.share)
    model.save_pretrained(FOLDER, half=True)
    scene = open_dataset("scenes", split="test")[71].image
    predictor = danet.Predictor(model, device="cpu", precision="fp32")
    predictor(scene).overlay(scene).save(FOLDER / PICTURE_FILE, quality=88)
    found = evaluate(argparse.Namespace(model=str(FOLDER), root=args.root), [])
    scores = {name: round(100 * found[name], 2) for name in ("mIoU", "mAcc", "aAcc")}
    write_model_card(FOLDER, NAME, model.config, model.metadata, run=run, scores=scores, note=NOTE)
    print(
        *(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in FOLDER.iterdir()), sep="\n"
    )


if __name__ == "__main__":
    main()
