import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from danet.bench import cost
from danet.bench.workload import Workload
from danet.data.loader import Batch
from danet.errors import (
    OutOfMemory,
    TrainingDiverged,
    TrainingStopped,
    UserError,
)
from danet.recipes import load_recipe
from danet.training import loop
from danet.training.checkpoint import RunFolder, load_checkpoint
from danet.training.launch import StopSignal
from danet.training.state import TrainingState
from tiny_runs import (
    FEW_SCENES,
    TINY,
    logged_steps,
    run,
    saved_step,
    start,
    weights,
)


@pytest.mark.slow
def test_40_steps_killed_at_several_moments(tmp_path: Path) -> None:
    """SIGKILL to a real process, each time as soon as it has logged a step; then left to finish."""
    settings = ("train.steps=40", "train.checkpoint_every=5")
    alone, killed = RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "killed")
    assert start(alone, *settings).wait().status == 0
    for moment in (1, 8, 15, 23, 39):
        process = start(killed, *settings, until=moment)
        process.kill()
        assert process.wait().status == -signal.SIGKILL
        assert not killed.model.exists()
    assert start(killed, *settings).wait().status == 0
    assert weights(killed) == weights(alone)


def test_nan_stops_with_a_checkpoint_from_before(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d.*last\.ckpt.*Lower train\.lr"):
        run(tmp_path / "run", "train.optimizer=sgd", "train.lr=1e30", "train.warmup_steps=0")
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert not (tmp_path / "run/model").exists()


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    expected = weights(folder)
    folder.last.replace(folder.before_last)
    assert weights(run(tmp_path / "run", resume=True)) == expected


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "train.steps=1")
    lock = folder.lock()
    try:
        with pytest.raises(UserError, match="another process is training in this folder"):
            run(tmp_path / "run", resume=True)
    finally:
        lock.release()
    run(tmp_path / "run", "train.steps=2", resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_the_step_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = f"data.workers={workers}"
    expected = weights(run(tmp_path / "alone", setting))
    real = loop.take_step

    def told_in_step_2(trained: TrainingState, step: int, batch: Batch) -> dict[str, torch.Tensor]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trained, step, batch)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "take_step", told_in_step_2)
    with pytest.raises(TrainingStopped, match=r"after step 3, which is saved in .*last\.ckpt"):
        run(tmp_path / "run", setting, "train.log_every=4")
    assert signal.getsignal(signal.SIGTERM) == before
    assert load_checkpoint(RunFolder(tmp_path / "run").last)["step"] == 3
    monkeypatch.undo()
    monkeypatch.setattr("danet.data.catalog.scenes._LENGTHS", FEW_SCENES)
    folder = run(tmp_path / "run", setting, "train.log_every=4", resume=True)
    assert weights(folder) == expected
    assert logged_steps(folder) == [2, 3, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group(tmp_path: Path, number: signal.Signals) -> None:
    settings = ("train.steps=500", "train.checkpoint_every=500", "data.workers=2")
    folder = RunFolder(tmp_path / "run")
    process = start(folder, *settings, until=3)
    process.kill(number)
    status, _, said = process.wait(60)
    assert status == 1
    assert f"stopped by {number.name} after step" in said
    assert "Traceback" not in said
    assert load_checkpoint(folder.last)["step"] >= 3


@pytest.mark.slow
def test_a_data_worker_that_dies_is_explained(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(folder, "train.steps=5000", "data.workers=1", until=3)
    pid = process.processes[0].pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    status, _, said = process.wait(60)
    assert status == 1
    assert "a data worker died" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_data_worker_that_dies_handing_over_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "take_step", breaks)
    with pytest.raises(TrainingStopped, match="a data worker died"):
        run(tmp_path / "workers", "data.workers=1")
    with pytest.raises(type(error)):
        run(tmp_path / "none")


def test_a_full_disk_is_told_and_the_last_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "run", "train.steps=2")
    before = folder.last.read_bytes()
    real = torch.save

    def full(checkpoint: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written"):
        run(tmp_path / "run", "train.steps=4", resume=True)
    assert folder.last.read_bytes() == before
    assert not list(folder.last.parent.glob(".*"))
    monkeypatch.setattr(torch, "save", real)
    run(tmp_path / "run", "train.steps=4", resume=True)


def test_memory_that_runs_out_is_told_with_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", runs_out)
        with pytest.raises(OutOfMemory, match=r"training: out of memory; .* is as last saved"):
            run(tmp_path / "run")
    config = load_recipe("demo", [*TINY, "train.batch_size=8", "train.precision=fp32"])
    sizes = {1: 100, 2: 60, 4: 40, 8: 30}

    def estimate(workload: Workload, device: str, *, bfloat16: bool) -> int:
        return sizes[8 // workload.batch] * 2**30

    monkeypatch.setattr(cost, "estimate_peak_bytes", estimate)
    monkeypatch.setattr(cost, "memory_limit", lambda device: 50 * 2**30)
    assert cost.advise_after_running_out(config, processes=1) == (
        "8 crops of 48x48 need about 100.7 GiB by estimate, and 50.0 GiB may be filled; "
        "set train.accumulate=4, which needs about 40.7 GiB"
    )
    monkeypatch.setattr(cost, "memory_limit", lambda device: 20 * 2**30)
    assert "lower data.crop_size" in cost.advise_after_running_out(config, processes=1)


@pytest.mark.slow
def test_a_memory_limit_is_explained_and_the_advice_fits(tmp_path: Path) -> None:
    """The limit is on the address space, of which libraries take several GiB without using it."""
    settings = (*TINY, "train.batch_size=32", "train.steps=1", "train.precision=fp32")
    settings += ("data.crop_size=[384, 384]", "data.train_images=2")

    def limited(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, "train", "demo", "--resume"]
        command += ["--out", str(tmp_path / "run")]
        command += [f"--set={item}" for item in (*settings, *more)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = limited()
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    advised = re.search(r"set (train\.accumulate=\d+), which needs about", refused.stderr)
    assert advised is not None, refused.stderr
    assert limited(advised[1]).returncode == 0


LIMITED = """
import resource
import danet.training.loop
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30,) * 2)
import danet.data.catalog.scenes as scenes
scenes._LENGTHS = {"train": 8, "val": 1, "test": 2}
from danet.cli import main
main()
"""


def test_a_second_interrupt_stops_at_once() -> None:
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.received == name
            with pytest.raises(KeyboardInterrupt) if name == "SIGINT" else nullcontext():
                os.kill(os.getpid(), number)


def test_a_broken_training_picture_does_not_cost_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = loop._Trainer._batches

    def then_broken(trainer: loop._Trainer) -> Iterator[object]:
        yield from itertools.islice(batches(trainer), 4)
        raise UserError("c.png: not a picture")

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_batches", then_broken)
        with pytest.raises(UserError, match=r"c\.png.*step 4 is saved: .* continue with --resume"):
            run(tmp_path / "run", "train.checkpoint_every=1000", "train.log_every=3")
    assert saved_step(RunFolder(tmp_path / "run")) == 4
    assert logged_steps(RunFolder(tmp_path / "run")) == [3, 4]
    resumed = run(tmp_path / "run", "train.checkpoint_every=1000", resume=True)
    assert weights(resumed) == weights(run(tmp_path / "alone"))


def test_a_process_lost_while_a_run_is_set_up_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr(loop, "training_samples", lost)
    with pytest.raises(TrainingStopped, match="another process of this run was lost"):
        run(tmp_path / "run")
