"""Several processes on one machine, as torchrun starts them, over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SETTINGS = (
    "model.backbone=test_resnet",
    "model.head_channels=16",
    "model.key_channels=4",
    "data.crop_size=[48, 48]",
    "data.train_images=16",
    "data.workers=0",
    "data.cache=true",
    "train.batch_size=8",
    "train.steps=50",
    "train.optimizer=sgd",
    "train.precision=fp32",
    "train.log_every=1",
    "train.lr=0.002",
    "train.validate_images=5",
    "train.device=cpu",
    "test.scale=[96, 72]",
)
TRAIN = """
import danet.data.catalog.scenes as scenes, sys
scenes._LENGTHS = {"train": 16, "val": 5, "test": 2}
from danet.cli import main
main()
"""


def train(out: Path, processes: int, *settings: str) -> list[dict[str, float]]:
    script = out.with_suffix(".py")
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(script), "train", "demo", "--out", str(out)]
    command += [f"--set={setting}" for setting in (*SETTINGS, *settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_global_batch_is_the_same_run_on_any_number_of_processes(tmp_path: Path) -> None:
    rows = {count: train(tmp_path / f"run{count}", count) for count in (1, 2, 4)}
    losses = {count: [r["loss"] for r in found if "loss" in r] for count, found in rows.items()}
    assert len(losses[1]) == 50
    for count in (2, 4):
        np.testing.assert_allclose(losses[count][:5], losses[1][:5], rtol=1e-4)
        np.testing.assert_allclose(losses[count], losses[1], rtol=2e-2)
        scores = [rows[n][-1] for n in (1, count)]
        assert scores[0]["val/aAcc"] == pytest.approx(scores[1]["val/aAcc"], abs=0.01)


@pytest.mark.slow
def test_checkpointed_activations_in_two_processes(tmp_path: Path) -> None:
    rows = [
        train(tmp_path / str(flag), 2, "train.steps=4", f"train.activation_checkpointing={flag}")
        for flag in ("false", "true")
    ]
    losses = [[row["loss"] for row in found if "loss" in row] for found in rows]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
