"""Draws what docs/street.md and docs/gallery.md show of the shipped model, on generated scenes.

calibration.png from benchmarks/results/street_calibration.csv; best_and_worst.png, gallery.png and
explained.png from the model itself.
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from tables import DOCS, rows_of

import danet
from danet.attention_overlay import attention_overlay
from danet.figure import draw_explanation
from danet.inspection import Inspection
from danet.palette import colored

MODEL = "street-small"
SCENES = 100
SHOWN = 3
GALLERY = {
    71: ((240, 270), (200, 170)),
    24: ((240, 300), (60, 60)),
    15: ((120, 250), (240, 60)),
    4: ((240, 270), (400, 150)),
}
"""Scenes of the test stream, and pixels of them."""


def draw_calibration() -> None:
    """How often pixels of each probability are right, and how many there are."""
    rows = rows_of("street_calibration")
    pixels = np.array([float(row["pixels"]) for row in rows])
    probability = np.array([float(row["probability"]) for row in rows])
    accuracy = np.array([float(row["accuracy"]) for row in rows])
    error = float((pixels * np.abs(probability - accuracy)).sum() / pixels.sum())
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(5, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    above.plot([0, 1], [0, 1], color="#999999", lw=1, label="perfect")
    above.plot(probability, accuracy, "o-", color="#0072B2", ms=4, label=MODEL)
    above.set_ylabel("share that is right")
    above.set_title(f"CamVid validation: expected calibration error {100 * error:.1f} %")
    above.legend(frameon=False)
    below.bar(probability, 100 * pixels / pixels.sum(), width=0.04, color="#0072B2")
    below.set_yscale("log")
    below.set_ylabel("% of pixels")
    below.set_xlabel("probability of the predicted class")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "calibration.png", dpi=110, metadata={"Software": None})


def draw_best_and_worst(predictor: danet.Predictor) -> None:
    """The generated scenes that go best and worst: picture, labels, prediction."""
    scenes = danet.data.open_dataset("scenes", split="test")
    ranked = []
    for scene in scenes:
        found = predictor(scene.image).classes
        ranked.append(((found == scene.label)[scene.label != 255].mean(), scene, found))
    ranked.sort(key=lambda entry: entry[0])
    chosen = [*ranked[-SHOWN:][::-1], *ranked[:SHOWN]]
    figure, grid = plt.subplots(len(chosen), 3, figsize=(9, 2.35 * len(chosen)))
    for (accuracy, scene, found), axes in zip(chosen, grid, strict=True):
        maps = (colored(labels, scenes.spec.palette) for labels in (scene.label, found))
        for panel, shown in zip(axes, (scene.image, *maps), strict=True):
            panel.imshow(shown)
            panel.axis("off")
        axes[0].set_title(f"{scene.name}: {100 * accuracy:.1f} % of pixels right", fontsize="small")
    figure.tight_layout()
    figure.savefig(DOCS / "best_and_worst.png", dpi=80, metadata={"Software": None})


def draw_gallery(predictor: danet.Predictor) -> None:
    """For some scenes: two pixels and where they look, and where all pixels look."""
    scenes = danet.data.open_dataset("scenes", split="test")
    figure, grid = plt.subplots(len(GALLERY), 4, figsize=(12, 2.4 * len(GALLERY)))
    for (index, points), axes in zip(GALLERY.items(), grid, strict=True):
        seen = Inspection(predictor, scenes[index].image)
        axes[0].imshow(seen.segmentation().overlay(seen.image))
        axes[0].set_title("classes", fontsize="small")
        for panel, point in zip(axes[1:3], points, strict=True):
            name = seen.metadata.classes[seen.score(point).class_id]
            panel.imshow(attention_overlay(seen.image, seen.attention(point), point))
            panel.set_title(f"a pixel of {name}", fontsize="small")
        axes[3].imshow(attention_overlay(seen.image, seen.received_attention(), None))
        axes[3].set_title("all pixels", fontsize="small")
        for panel in axes:
            panel.axis("off")
    figure.tight_layout()
    figure.savefig(DOCS / "gallery.png", dpi=80, metadata={"Software": None})


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    mpl.use("Agg")
    draw_calibration()
    predictor = danet.Predictor(MODEL)
    draw_best_and_worst(predictor)
    draw_gallery(predictor)
    image = danet.data.open_dataset("scenes", split="test")[71].image
    point = (image.width // 2, image.height * 3 // 4)
    figure = draw_explanation(danet.explain(predictor, image, point))
    figure.savefig(DOCS / "explained.png", dpi=75, metadata={"Software": None})


if __name__ == "__main__":
    main()
