import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from danet.config import TrainConfig
from danet.errors import (
    TrainingDiverged,
)
from danet.training.checkpoint import RunFolder
from danet.training.launch import launch
from danet.training.log import MetricsLog


def metrics_log(tmp_path: Path, settings: TrainConfig) -> MetricsLog:
    fabric = launch(settings, torch.device("cpu"), bfloat16=False)
    return MetricsLog(fabric, RunFolder(tmp_path), settings, SimpleNamespace(write=lambda _: None))


def test_a_row_has_the_means_of_its_steps(tmp_path: Path) -> None:
    """And the learning rate of the last of them: here 0.1 (1 - 6 / 10)."""
    settings = TrainConfig(lr=0.1, lr_min=0, lr_power=1, steps=10, device="cpu")
    log = metrics_log(tmp_path, settings)
    for total, fused in ((1.0, 0.5), (2.0, 0.5), (6.0, 2.0)):
        log.add({"loss": torch.tensor(total), "loss_fused": torch.tensor(fused)})
    assert log.pending == 3
    log.write_steps(7, {"residual_position": 0.25})
    (row,) = log.run.read_metrics()
    row.pop("images_per_second")
    assert row == pytest.approx(
        {"step": 7, "loss": 3.0, "loss_fused": 1.0, "residual_position": 0.25, "lr": 0.04}
    )
    assert log.pending == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_is_named_whose_loss_is_not_finite(value: float, tmp_path: Path) -> None:
    log = metrics_log(tmp_path, TrainConfig(device="cpu"))
    for loss in (1.0, value, 1.0):
        log.add({"loss": torch.tensor(loss)})
    with pytest.raises(TrainingDiverged, match=f"the loss became {value} at step 6"):
        log.write_steps(7, {})
    assert not log.run.metrics.exists()
