"""Draws docs/ablation_scenes.png: where both attentions gain most on the plain network, and lose.

python docs/ablation_pictures.py runs/ablation
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from tables import DOCS

import danet
from danet.palette import colored

SHOWN = 3
"""Scenes of each kind."""


def main() -> None:
    """A row a scene: picture, labels, plain network, both attentions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="run folders of benchmarks/ablation.py")
    folder = parser.parse_args().runs
    mpl.use("Agg")
    plain, both = (danet.Predictor(folder / f"scenes_{name}_0") for name in ("fcn", "both"))
    dataset = danet.data.open_dataset("scenes", split="test")
    compared = []
    for scene in dataset:
        labelled = scene.label != 255
        found = [predictor(scene.image).classes for predictor in (plain, both)]
        right = [(classes == scene.label)[labelled].mean() for classes in found]
        compared.append((right[1] - right[0], scene, found))
    compared.sort(key=lambda entry: -entry[0])
    chosen = [*compared[:SHOWN], *compared[-SHOWN:]]
    figure, grid = plt.subplots(len(chosen), 4, figsize=(12, 2.4 * len(chosen)))
    for (gain, scene, found), axes in zip(chosen, grid, strict=True):
        maps = [colored(labels, dataset.spec.palette) for labels in (scene.label, *found)]
        titles = (scene.name, "labels", "plain", f"both attentions, {100 * gain:+.1f} points")
        for panel, shown, title in zip(axes, (scene.image, *maps), titles, strict=True):
            panel.imshow(shown)
            panel.set_title(title, fontsize="small")
            panel.axis("off")
    figure.tight_layout()
    figure.savefig(DOCS / "ablation_scenes.png", dpi=70, metadata={"Software": None})


if __name__ == "__main__":
    main()
