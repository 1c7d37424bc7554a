"""Runs of tiny networks on generated scenes, in this process or in others."""

import time
from pathlib import Path

import pytest
import torch

import forked
from danet.evaluation.metrics import Scores
from danet.recipes import load_recipe
from danet.training import validation
from danet.training.checkpoint import RunFolder, load_checkpoint
from danet.training.loop import train
from networks import TINY_RUN

FEW_SCENES = {"train": 8, "val": 2, "test": 2}
TINY = (*TINY_RUN, "train.steps=6", "train.checkpoint_every=2")


def run(out: Path, *overrides: str, resume: bool = False) -> RunFolder:
    return train(load_recipe("demo", [*TINY, *overrides]), out, resume=resume)


def weights(folder: RunFolder) -> bytes:
    return (folder.model / "model.safetensors").read_bytes()


def start(folder: RunFolder, *settings: str, until: int = 0) -> forked.Running:
    """Starts or goes on with a run in a process of its own, and waits until it logs that step."""
    changes = [f"--set={item}" for item in (*TINY, *settings)]
    arguments = ["train", "demo", "--resume", f"--out={folder.path}", *changes]
    process = forked.start(folder.path.parent, *arguments, scenes=FEW_SCENES)
    while process.is_alive() and last_step(folder) < until:
        time.sleep(0.002)
    return process


def last_step(folder: RunFolder) -> float:
    rows = folder.read_metrics() if folder.metrics.is_file() else []
    return rows[-1]["step"] if rows else 0


def saved_step(folder: RunFolder) -> int:
    return load_checkpoint(folder.last)["step"]


def logged_steps(folder: RunFolder) -> list[float]:
    return [row["step"] for row in folder.read_metrics() if "loss" in row]


def validated_steps(folder: RunFolder) -> list[float]:
    return [row["step"] for row in folder.read_metrics() if "val/aAcc" in row]


def validate_with(monkeypatch: pytest.MonkeyPatch, *mean_ious: float) -> list[int]:
    """Has one validation after the other score so; returns of how many pixels each was."""
    left, pixels = iter(mean_ious), list[int]()
    real = validation.scores

    def scores(confusion: torch.Tensor) -> Scores:
        pixels.append(int(confusion.sum()))
        return real(confusion)._replace(mean_iou=next(left))

    monkeypatch.setattr(validation, "scores", scores)
    return pixels
