"""Draws docs/scenes.png: generated scenes, their labels, and a model's predictions.

python docs/picture.py runs/demo
"""

import argparse
from pathlib import Path

from PIL import Image

import danet
from danet.palette import colored

SCENES = (3, 8, 21, 40)
WIDTH, HEIGHT, GAP = 300, 225, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model or run folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("scenes.png"))
    arguments = parser.parse_args()
    predictor = danet.Predictor(arguments.model)
    dataset = danet.data.open_dataset("scenes", split="test")
    size = (len(SCENES) * (WIDTH + GAP) - GAP, 3 * (HEIGHT + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for column, index in enumerate(SCENES):
        scene = dataset[index]
        truth = colored(scene.label, dataset.spec.palette)
        for row, picture in enumerate((scene.image, truth, predictor(scene.image).mask())):
            small = picture.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BOX)
            sheet.paste(small, (column * (WIDTH + GAP), row * (HEIGHT + GAP)))
    sheet.quantize(200).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
