"""The run folder, and checkpoints that appear whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from danet.atomic import explaining_write_errors, fsync, replacing
from danet.errors import UserError, explaining_lookup, why_not_read
from danet.jsonl import read_metrics
from danet.model_folder import (
    BEST_CHECKPOINT,
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    WEIGHTS_FILE,
)

_NO_OTHER = "there is no other checkpoint, so start a new run with another --out"
_KEYS = {"step", "model", "average", "optimizer", "optimizer_name", "best", "validated_step"}


class RunFolder:
    """Paths of a run's files, and how they are read and written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / RECIPE_FILE
        self.metrics = path / METRICS_FILE
        self.model = path / MODEL_FOLDER
        self.last = path / "checkpoints" / "last.ckpt"
        self.before_last = path / "checkpoints" / "before_last.ckpt"
        self.best = path / BEST_CHECKPOINT

    def exists(self) -> bool:
        with explaining_lookup(self.path):
            return self.recipe.exists() or self.last.exists()

    def file_of_another_kind(self) -> Path | None:
        """A file that a new run would write over or hide: a model folder's, or other metrics."""
        others = (self.metrics, self.model, self.path / CONFIG_FILE, self.path / WEIGHTS_FILE)
        return next((path for path in others if path.exists()), None)

    def lock(self) -> FileLock:
        """Keeps other processes from writing to this run until it is released, or this one ends.

        Raises:
            UserError: another process has it.
        """
        lock = FileLock(self.path / ".lock", blocking=False)
        with explaining_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise UserError(
                    f"{self.path}: another process is training in this folder; wait for it, or "
                    "choose another folder with --out"
                ) from error
        return lock

    def last_checkpoint(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The last checkpoint, or the one before where a crash or the disk damaged it.

        Raises:
            UserError: there are only damaged ones.
        """
        if not (self.last.exists() or self.before_last.exists()):
            return None
        try:
            return load_checkpoint(self.last)
        except UserError as error:
            if not self.before_last.exists():
                raise UserError(f"{error}; {_NO_OTHER}") from error
            try:
                checkpoint = load_checkpoint(self.before_last)
            except UserError as other:
                raise UserError(f"{error}; {other}; {_NO_OTHER}") from other
            say(f"note: {error}; continuing from the one before, step {checkpoint['step']}")
            return checkpoint

    def save_last(self, checkpoint: dict[str, Any]) -> None:
        """Writes the last checkpoint and keeps the one before."""
        save_checkpoint(self.last, checkpoint, former=self.before_last)

    def renew_last(self, checkpoint: dict[str, Any]) -> None:
        """Writes more of the last checkpoint's step in its place."""
        save_checkpoint(self.last, checkpoint)

    def drop_last(self) -> None:
        """Puts the checkpoint before, if there is one, in place of the last, which is of no use."""
        if self.before_last.exists():
            self.before_last.replace(self.last)

    def append_metrics(self, row: dict[str, float]) -> None:
        with (
            explaining_write_errors(self.metrics),
            self.metrics.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.metrics)

    def forget_metrics_after(self, step: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from."""
        if not self.metrics.exists():
            return
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def save_checkpoint(path: Path, checkpoint: dict[str, Any], former: Path | None = None) -> None:
    """Writes plain tensors and numbers.

    Args:
        former: where the file that is replaced goes, once the new one is on the disk.

    Raises:
        UserError: it cannot be written there.
    """
    with replacing(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        # How torch tells of a full disk, in words of its own.
        except RuntimeError as error:
            raise OSError("the disk may be full") from error
        if former is not None and path.exists():
            fsync(temporary)
            path.replace(former)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads plain tensors and numbers; executes nothing.

    Raises:
        UserError: damaged, or no checkpoint of this program.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader and its unpickler raise many types on a damaged file.
    except Exception as error:
        reason = why_not_read(error)
        raise UserError(f"{path}: damaged, or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _KEYS:
        raise UserError(f"{path}: not a checkpoint of danet train")
    return checkpoint


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that count: the average where the run keeps one."""
    average: dict[str, Tensor] | None = checkpoint["average"]
    weights: dict[str, Tensor] = checkpoint["model"]
    return weights if average is None else average
