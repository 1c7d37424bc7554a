"""The peer's predictions for whole pictures, and its metric."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmseg.evaluation import IoUMetric
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample
from network import load_model
from safetensors.torch import load_file, save_file


def view_samples(
    model: torch.nn.Module, image: np.ndarray, ratio: float, flip: bool
) -> list[SegDataSample]:
    """One pass over an RGB picture as the test pipeline and the model do it."""
    height, width = image.shape[:2]
    resized = mmcv.imrescale(image, (int(width * ratio), int(height * ratio)))
    resized = mmcv.imflip(resized) if flip else resized
    mean = np.array([123.675, 116.28, 103.53])
    std = np.array([58.395, 57.12, 57.375])
    pixels = mmcv.imnormalize(resized, mean, std, to_rgb=False)
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    meta = {
        "img_shape": resized.shape[:2],
        "ori_shape": (height, width),
        "img_path": "",
        "flip": flip,
        "flip_direction": "horizontal",
    }
    sample = SegDataSample(metainfo=meta)
    with torch.no_grad():
        return model.postprocess_result(model.inference(tensor, [meta]), [sample])


TESTS = {
    "whole": ({"mode": "whole"}, [(1.0, False)]),
    "slide": ({"mode": "slide", "crop_size": (96, 128), "stride": (64, 80)}, [(1.0, False)]),
    "augmented": (
        {"mode": "whole"},
        [(ratio, flip) for ratio in (0.5, 1.0, 1.75) for flip in (False, True)],
    ),
}
"""The test configuration, and the ratio and flip of each pass."""


def run_prediction(args: argparse.Namespace) -> None:
    """Write a picture's label map and averaged scores."""
    model = load_model(args.checkpoint, args.depth)
    image = load_file(args.image)["image"].numpy()
    test_cfg, views = TESTS[args.test]
    model.align_corners = model.decode_head.align_corners = args.align_corners
    model.test_cfg = ConfigDict(test_cfg)
    samples = [view_samples(model, image, *view)[0] for view in views]
    scores = torch.stack([s.seg_logits.data.softmax(0) for s in samples]).mean(0)
    merged = SegTTAModel.merge_preds(SimpleNamespace(module=model), [samples])[0]
    labels = merged.pred_sem_seg.data[0]
    save_file({"scores": scores.contiguous(), "labels": labels.contiguous()}, args.out)


def run_metric(args: argparse.Namespace) -> None:
    """Print IoUMetric's scores of label maps."""
    maps = load_file(args.maps)
    metric = IoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": [str(index) for index in range(args.num_classes)]}
    areas = [
        metric.intersect_and_union(prediction.long(), truth.long(), args.num_classes, 255)
        for prediction, truth in zip(maps["predictions"], maps["truths"], strict=True)
    ]
    total = [sum(area) for area in zip(*areas, strict=True)]
    scores = metric.total_area_to_metrics(*total, metrics=["mIoU"])
    json.dump({name: np.atleast_1d(values).tolist() for name, values in scores.items()}, sys.stdout)


def add_commands(commands: Any) -> None:
    """Add this module's subcommands."""
    prediction = commands.add_parser("predict", help="segment a picture")
    prediction.add_argument("--test", choices=TESTS, default="whole")
    prediction.add_argument("--align-corners", action="store_true")
    prediction.add_argument("--depth", type=int, choices=[50, 101], default=50)
    prediction.add_argument("--checkpoint", type=Path, required=True)
    prediction.add_argument("--image", type=Path, required=True, help="one tensor 'image', [H,W,3]")
    prediction.add_argument("--out", type=Path, required=True, help="gets labels and scores")
    prediction.set_defaults(command=run_prediction)

    metric = commands.add_parser("metric", help="score label maps")
    metric.add_argument("--maps", type=Path, required=True, help="predictions and truths, [N,H,W]")
    metric.add_argument("--num-classes", type=int, default=19)
    metric.set_defaults(command=run_metric)
