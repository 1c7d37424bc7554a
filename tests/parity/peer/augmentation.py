"""The peer's training pipeline."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.datasets.transforms import transforms
from mmseg.models import SegDataPreProcessor
from mmseg.registry import TRANSFORMS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from safetensors.torch import load_file, save_file


def run_augmentation(args: argparse.Namespace) -> None:
    """Write what the training pipeline draws for a picture and, at first, what it makes of it."""
    register_all_modules()
    np.random.seed(0)
    sample = load_file(args.sample)
    width, height = args.crop
    base = tuple(args.base)
    resize = TRANSFORMS.build(
        {
            "type": "RandomResize",
            "scale": base,
            "ratio_range": (0.5, 2.0),
            "keep_ratio": True,
        }
    )
    crop = transforms.RandomCrop(crop_size=(height, width), cat_max_ratio=0.75)
    flip = transforms.RandomFlip(prob=0.5)
    preprocessor = SegDataPreProcessor(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(height, width),
        pad_val=0,
        seg_pad_val=255,
    )
    draws, images, labels = [], [], []
    for number in range(args.count):
        image = np.ascontiguousarray(sample["image"].numpy()[..., ::-1])
        results = {"img": image, "gt_seg_map": sample["label"].numpy()}
        results |= {"seg_fields": ["gt_seg_map"], "img_shape": image.shape[:2]}
        results = resize(results)
        with mock.patch.object(crop, "crop", wraps=crop.crop) as cropped:
            results = flip(crop(results))
        top, _, left, _ = cropped.call_args.args[1]
        draws.append([*results["scale"], left, top, results["flip"]])
        if number < args.kept:
            truth = SegDataSample()
            truth.gt_sem_seg = PixelData(data=torch.from_numpy(results["gt_seg_map"].copy())[None])
            pixels = torch.from_numpy(results["img"].transpose(2, 0, 1).copy())
            batch = preprocessor({"inputs": [pixels], "data_samples": [truth]}, training=True)
            images.append(batch["inputs"][0])
            labels.append(batch["data_samples"][0].gt_sem_seg.data[0])
    save_file(
        {
            "draws": torch.tensor(draws, dtype=torch.int64),
            "images": torch.stack(images),
            "labels": torch.stack(labels),
        },
        args.out,
    )


def run_distortion(args: argparse.Namespace) -> None:
    """Write the photometric distortions of an RGB picture, each made with given draws."""
    image = load_file(args.sample)["image"].numpy()
    results = {}
    for name, answers in json.loads(args.draws.read_text()).items():
        draw = iter(answers)
        scripted = SimpleNamespace(
            randint=lambda *_, draw=draw: next(draw), uniform=lambda *_, draw=draw: next(draw)
        )
        with mock.patch.object(transforms, "random", scripted):
            distorted = transforms.PhotoMetricDistortion()({"img": image[..., ::-1].copy()})["img"]
        assert next(draw, None) is None
        results[name] = torch.from_numpy(distorted[..., ::-1].copy())
    save_file(results, args.out)


def add_commands(commands: Any) -> None:
    """Add this module's subcommands."""
    augmentation = commands.add_parser("augment", help="augment a picture many times")
    augmentation.add_argument("--sample", type=Path, required=True, help="image HW3, label HW")
    augmentation.add_argument("--base", type=int, nargs=2, required=True, help="width height")
    augmentation.add_argument("--crop", type=int, nargs=2, required=True, help="width height")
    augmentation.add_argument("--count", type=int, required=True, help="how often to draw")
    augmentation.add_argument("--kept", type=int, required=True, help="how many pictures to write")
    augmentation.add_argument("--out", type=Path, required=True, help="gets draws and pictures")
    augmentation.set_defaults(command=run_augmentation)

    distortion = commands.add_parser("distort", help="distort a picture's colours")
    distortion.add_argument("--sample", type=Path, required=True, help="one tensor 'image', HW3")
    distortion.add_argument("--draws", type=Path, required=True, help="JSON, name to draws")
    distortion.add_argument("--out", type=Path, required=True, help="gets a picture per name")
    distortion.set_defaults(command=run_distortion)
