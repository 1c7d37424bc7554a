"""A run's metrics: rows of its file and TensorBoard's events."""

import math
import time

import torch
from lightning_fabric import Fabric
from torch import Tensor

from danet.config import TrainConfig
from danet.errors import TrainingDiverged
from danet.training.checkpoint import RunFolder
from danet.training.events import Events
from danet.training.launch import reduce_over_processes
from danet.training.schedule import learning_rate


class MetricsLog:
    """Gathers the losses of steps, and writes their means from time to time.

    Losses stay on the device until then, so that no step waits until it has computed them. One
    process writes, but all must call `write_steps`, which averages over processes.

    Args:
        events: None in the processes that do not write.
    """

    def __init__(
        self, fabric: Fabric, run: RunFolder, settings: TrainConfig, events: Events | None
    ) -> None:
        self.fabric = fabric
        self.run = run
        self.settings = settings
        self.events = events
        self._losses: list[dict[str, Tensor]] = []
        self._since = time.monotonic()
        self.loss = math.nan
        """The mean of the row that was written last."""

    @property
    def pending(self) -> int:
        """Steps that are not written yet."""
        return len(self._losses)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Notes the losses of one more step."""
        self._losses.append(losses)

    def restart_clock(self) -> None:
        """Times the next row's steps from now on."""
        self._since = time.monotonic()

    def write_steps(self, done: int, residual_weights: dict[str, float]) -> str:
        """Writes the means of the pending steps, at least one, the last of which was step `done`.

        Returns:
            A summary for the progress report.

        Raises:
            TrainingDiverged: a loss was not finite.
        """
        history = self._losses
        losses = {
            name: reduce_over_processes(
                self.fabric, torch.stack([step[name] for step in history]), "mean"
            ).tolist()
            for name in history[0]
        }
        for offset, loss in enumerate(losses["loss"]):
            if not math.isfinite(loss):
                step = done - len(history) + offset + 1
                finding = f"the loss became {loss} at step {step}"
                raise TrainingDiverged.after(self.run.last, finding, self.settings.lr)
        rate = learning_rate(done - 1, self.settings)
        images = len(history) * self.settings.batch_size
        images_per_second = images / max(time.monotonic() - self._since, 1e-9)
        row = {
            "step": done,
            **{name: sum(values) / len(values) for name, values in losses.items()},
            **residual_weights,
            "lr": rate,
            "images_per_second": images_per_second,
        }
        self.write(row)
        self.loss = row["loss"]
        self._losses = []
        self.restart_clock()
        return f"loss {row['loss']:.3f}  lr {rate:.4g}  {images_per_second:.1f} images/s"

    def write(self, row: dict[str, float]) -> None:
        """Writes a row, `step` among it, without the values that are undefined."""
        if self.events is not None:
            row = {name: value for name, value in row.items() if not math.isnan(value)}
            self.run.append_metrics(row)
            self.events.write(row)
