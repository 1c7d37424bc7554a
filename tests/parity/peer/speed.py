"""Time and memory of the peer's prediction, evaluation, training step and augmentation."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmseg.evaluation import IoUMetric
from mmseg.models import SegTTAModel
from mmseg.registry import TRANSFORMS
from mmseg.utils import register_all_modules
from network import build_model, total_loss
from prediction import view_samples

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def resident_bytes(field: str) -> int:
    """VmRSS, what is held now, or VmHWM, the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {field}")


def precision(args: argparse.Namespace) -> AbstractContextManager[None]:
    """The autocast context that was asked for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=args.autocast)


def prediction(args: argparse.Namespace) -> Callable[[], None]:
    """A picture already normalised to its label map."""
    model = build_model(50)[0].eval()
    model.test_cfg = ConfigDict({"mode": "whole"})
    width, height = args.size
    images = torch.rand(args.batch, 3, height, width)
    meta = {"img_shape": (height, width), "ori_shape": (height, width), "img_path": ""}

    def run() -> None:
        with torch.no_grad(), precision(args):
            logits = model.inference(images, [meta] * args.batch)
            model.postprocess_result(logits.float())

    return run


def evaluation(args: argparse.Namespace) -> Callable[[], None]:
    """A picture's file and its label's, at six scales and mirrored, to areas per class."""
    model = build_model(50)[0].eval()
    model.test_cfg = ConfigDict({"mode": "whole"})
    metric = IoUMetric(iou_metrics=["mIoU"])

    def run() -> None:
        image = mmcv.imread(args.image, channel_order="rgb")
        label = torch.from_numpy(mmcv.imread(args.label, flag="unchanged"))
        with precision(args):
            samples = [
                view_samples(model, image, ratio, flip)[0]
                for ratio in RATIOS
                for flip in (False, True)
            ]
        for sample in samples:
            sample.seg_logits.data = sample.seg_logits.data.float()
        merged = SegTTAModel.merge_preds(argparse.Namespace(module=model), [samples])[0]
        metric.intersect_and_union(merged.pred_sem_seg.data[0], label, 19, 255)

    return run


def training(args: argparse.Namespace) -> Callable[[], None]:
    """A training step."""
    model = build_model(50)[0].train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    width, height = args.size
    images = torch.rand(args.batch, 3, height, width)
    labels = torch.zeros(args.batch, height, width, dtype=torch.uint8)

    def run() -> None:
        optimizer.zero_grad()
        with precision(args):
            loss, _ = total_loss(model, images, labels)
        loss.backward()
        optimizer.step()

    return run


def augmentation(args: argparse.Namespace) -> Callable[[], None]:
    """A decoded picture and its label to a normalised crop."""
    register_all_modules()
    width, height = args.size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    blocks = np.random.default_rng(0).integers(
        0, 19, (-(-height // 64), -(-width // 64)), dtype=np.uint8
    )
    label = blocks.repeat(64, 0).repeat(64, 1)[:height, :width]
    crop = tuple(reversed(args.crop))
    scale = {"scale": (width, height), "ratio_range": (0.5, 2.0), "keep_ratio": True}
    steps = [
        TRANSFORMS.build(step)
        for step in (
            {"type": "RandomResize", **scale},
            {"type": "RandomCrop", "crop_size": crop, "cat_max_ratio": 0.75},
            {"type": "RandomFlip", "prob": 0.5},
            {"type": "PhotoMetricDistortion"},
        )
    ]
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])

    def run() -> None:
        results = {"img": image, "gt_seg_map": label, "seg_fields": ["gt_seg_map"]}
        results["img_shape"] = image.shape[:2]
        for step in steps:
            results = step(results)
        pixels = mmcv.imnormalize(results["img"], mean, std, to_rgb=True)
        pixels = mmcv.impad(pixels, shape=crop, pad_val=0)
        mmcv.impad(results["gt_seg_map"], shape=crop, pad_val=255)
        torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    return run


TASKS = {
    "prediction": prediction,
    "evaluation": evaluation,
    "training": training,
    "augmentation": augmentation,
}


def time_task(args: argparse.Namespace) -> None:
    """Print the median seconds of a run and the peak memory above the start, as JSON."""
    if args.threads:
        torch.set_num_threads(args.threads)
    np.random.seed(0)
    before = resident_bytes("VmRSS")
    run = TASKS[args.task](args)
    run()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = resident_bytes("VmHWM") - before
    json.dump({"seconds": statistics.median(seconds), "peak_bytes": peak}, sys.stdout)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add this module's subcommands."""
    speed = commands.add_parser("time", help="time a task on random weights")
    speed.add_argument("task", choices=TASKS)
    speed.add_argument("--size", type=int, nargs=2, default=(512, 512), help="width, height")
    speed.add_argument("--crop", type=int, nargs=2, default=(1024, 512), help="width, height")
    speed.add_argument("--batch", type=int, default=1)
    speed.add_argument("--repeats", type=int, default=3)
    speed.add_argument("--threads", type=int, help="torch's default unless given")
    speed.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    speed.add_argument("--image", type=Path, help="for evaluation")
    speed.add_argument("--label", type=Path, help="for evaluation")
    speed.set_defaults(command=time_task)
