"""Draws what docs/street.md shows of the shipped model, on generated scenes.

calibration.png from benchmarks/results/street_calibration.csv; best_and_worst.png and explained.png
from the model itself.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from tables import DOCS, rows_of

import danet
from danet.figure import draw_explanation

MODEL = "street-small"
SCENES = 100
SHOWN = 3


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
    palette = np.array(scenes.spec.palette, dtype=np.uint8)
    ranked = []
    for scene in scenes:
        found = predictor(scene.image).classes
        ranked.append(((found == scene.label)[scene.label != 255].mean(), scene, found))
    ranked.sort(key=lambda entry: entry[0])
    chosen = [*ranked[-SHOWN:][::-1], *ranked[:SHOWN]]
    figure, grid = plt.subplots(len(chosen), 3, figsize=(9, 2.35 * len(chosen)))
    for (accuracy, scene, found), axes in zip(chosen, grid, strict=True):
        labels = np.where(scene.label == 255, 0, scene.label)
        truth = palette[labels]
        truth[scene.label == 255] = 0
        for panel, picture in zip(axes, (scene.image, truth, palette[found]), strict=True):
            panel.imshow(picture)
            panel.axis("off")
        axes[0].set_title(f"{scene.name}: {100 * accuracy:.1f} % of pixels right", fontsize="small")
    figure.tight_layout()
    figure.savefig(DOCS / "best_and_worst.png", dpi=80, metadata={"Software": None})


def main() -> None:
    mpl.use("Agg")
    draw_calibration()
    predictor = danet.Predictor(MODEL)
    draw_best_and_worst(predictor)
    image = danet.data.open_dataset("scenes", split="test")[71].image
    point = (image.width // 2, image.height * 3 // 4)
    figure = draw_explanation(danet.explain(predictor, image, point))
    figure.savefig(DOCS / "explained.png", dpi=75, metadata={"Software": None})


if __name__ == "__main__":
    main()
