"""The peers' tables of classes, colours and label ids, and the official Cityscapes scores."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import mmseg
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official  # noqa: N813
from cityscapesscripts.helpers.labels import labels as cityscapes_labels
from mmseg.datasets import (
    ADE20KDataset,
    CityscapesDataset,
    COCOStuffDataset,
    PascalContextDataset,
    PascalContextDataset59,
    PascalVOCDataset,
)


def converted_ids(converter: str) -> dict[int, int]:
    """The table of label ids to train ids in one of mmsegmentation's dataset converters."""
    path = Path(mmseg.__file__).parent / ".mim" / "tools" / "dataset_converters" / converter
    table: dict[int, int] = runpy.run_path(str(path))["clsID_to_trID"]
    return table


def list_tables(args: argparse.Namespace) -> None:
    """Print the classes, colours and label ids of the datasets as one JSON object."""
    datasets = {
        "cityscapes": CityscapesDataset,
        "ade20k": ADE20KDataset,
        "voc": PascalVOCDataset,
        "pascal_context": PascalContextDataset,
        "pascal_context_59": PascalContextDataset59,
        "coco_stuff": COCOStuffDataset,
    }
    tables = {
        "specs": {
            name: {"classes": dataset.METAINFO["classes"], "palette": dataset.METAINFO["palette"]}
            for name, dataset in datasets.items()
        },
        "coco_stuff_164k": converted_ids("coco_stuff164k.py"),
        "coco_stuff_10k": converted_ids("coco_stuff10k.py"),
        "cityscapes": {label.id: label.trainId for label in cityscapes_labels if label.id >= 0},
    }
    json.dump(tables, sys.stdout)


def score_cityscapes(args: argparse.Namespace) -> None:
    """Print the official evaluator's IoU of each class as a JSON object."""
    settings = official.args
    settings.predictionPath = str(args.predictions)
    settings.evalInstLevelScore = settings.JSONOutput = False
    settings.quiet = True
    truths = sorted(map(str, args.root.glob("gtFine/val/*/*_gtFine_labelIds.png")))
    predictions = [official.getPrediction(settings, truth) for truth in truths]
    results = official.evaluateImgLists(predictions, truths, settings)
    json.dump({name: float(score) for name, score in results["classScores"].items()}, sys.stdout)


def add_commands(commands: Any) -> None:
    """Add this module's subcommands."""
    cityscapes = commands.add_parser("cityscapes", help="score label files officially")
    cityscapes.add_argument("--root", type=Path, required=True, help="holds gtFine/")
    cityscapes.add_argument("--predictions", type=Path, required=True, help="a submission's files")
    cityscapes.set_defaults(command=score_cityscapes)

    tables = commands.add_parser("tables", help="list the datasets' classes and label ids")
    tables.set_defaults(command=list_tables)
