import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import danet
import forked
from danet.bench import cost
from danet.bench.workload import Workload
from danet.config import TrainConfig
from danet.data.loader import Batch
from danet.errors import (
    LogitsNotFinite,
    OutOfMemory,
    TrainingDiverged,
    TrainingStopped,
    UserError,
)
from danet.evaluation.metrics import Scores
from danet.recipes import load_recipe
from danet.training import loop, state
from danet.training.checkpoint import RunFolder, load_checkpoint
from danet.training.launch import StopSignal, launch
from danet.training.log import MetricsLog
from danet.training.loop import train
from danet.training.state import TrainingState
from networks import TINY_RUN, tiny_danet

FEW_SCENES = {"train": 8, "val": 2, "test": 2}
TINY = (*TINY_RUN, "train.steps=6", "train.checkpoint_every=2")


@pytest.fixture(autouse=True)
def small_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danet.data.catalog.scenes._LENGTHS", FEW_SCENES)


def run(out: Path, *overrides: str, resume: bool = False) -> RunFolder:
    return train(load_recipe("demo", [*TINY, *overrides]), out, resume=resume)


def weights(folder: RunFolder) -> bytes:
    return (folder.model / "model.safetensors").read_bytes()


def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    names = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")}
    assert {
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model/config.json",
        "model/model.safetensors",
    } <= names
    assert any("tfevents" in name for name in names)
    rows = folder.read_metrics()
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert {"loss_fused", "loss_position", "loss_channel", "lr", "images_per_second"} <= set(
        training[0]
    )
    assert rows[-1]["val/mIoU"] >= 0
    model = danet.DANet.from_pretrained(folder.model)
    assert model.metadata.dataset == "scenes"
    assert model.metadata.classes == danet.data.dataset_spec("scenes").classes


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.optimizer=sgd", "train.ema_decay=null"),
        ("train.optimizer=adamw", "data.workers=1", "train.accumulate=2"),
    ],
)
def test_stopped_and_resumed_is_the_same_to_the_bit(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(tmp_path / "alone", *overrides)
    original = loop.take_step

    class Killed(Exception):
        pass

    def stops(trained: TrainingState, step: int, batch: Batch) -> dict[str, torch.Tensor]:
        if step == 5:
            raise Killed
        return original(trained, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stops)
        with pytest.raises(Killed):
            run(tmp_path / "killed", *overrides)
    assert load_checkpoint(RunFolder(tmp_path / "killed").last)["step"] == 4
    resumed = run(tmp_path / "killed", *overrides, resume=True)
    assert weights(resumed) == weights(alone)
    kept = ("step", "loss", "lr")
    assert [[row.get(k) for k in kept] for row in resumed.read_metrics()] == [
        [row.get(k) for k in kept] for row in alone.read_metrics()
    ]


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


def test_nan_stops_with_a_checkpoint_from_before(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d.*last\.ckpt.*Lower train\.lr"):
        run(tmp_path / "run", "train.optimizer=sgd", "train.lr=1e30", "train.warmup_steps=0")
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert not (tmp_path / "run/model").exists()


def test_logits_that_are_not_finite_stop_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is of the weights before an update, so the validation after it sees it first."""
    real = state.build_optimizer

    def damaging(model: danet.DANet, settings: TrainConfig) -> torch.optim.Optimizer:
        optimizer = real(model, settings)
        weight = model.head.fused_classifier[1].weight
        optimizer.register_step_post_hook(lambda *_: weight.data.fill_(float("nan")))
        return optimizer

    monkeypatch.setattr(state, "build_optimizer", damaging)
    with pytest.raises(TrainingDiverged, match=r"validation after step 1;.*last\.ckpt.*train\.lr"):
        run(tmp_path / "run", "train.steps=1")
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


@pytest.mark.parametrize("setting", ["data.crop_size=[8, 6]", "model.backbone=skresnet18"])
def test_a_single_value_for_batch_norm_is_refused_at_once(setting: str, tmp_path: Path) -> None:
    """Of a feature map of one pixel, or after global pooling."""
    with pytest.raises(UserError, match="more crops a pass"):
        run(tmp_path / "run", setting, "train.batch_size=1")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "train.steps=1")
    before = weights(folder)
    with pytest.raises(UserError, match="--resume"):
        run(tmp_path / "run", "train.steps=1")
    assert weights(folder) == before


def test_resuming_with_another_network_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", "train.steps=1")
    with pytest.raises(UserError, match="does not fit"):
        run(tmp_path / "run", "train.steps=2", "model.head_channels=8", resume=True)


def test_a_resumed_run_goes_by_its_new_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", "train.optimizer=sgd", "train.steps=1")
    changes = ("train.weight_decay=0", "train.momentum=0.5", "train.head_lr_factor=7")
    folder = run(tmp_path / "run", "train.optimizer=sgd", "train.steps=2", *changes, resume=True)
    for group in load_checkpoint(folder.last)["optimizer"]["param_groups"]:
        assert (group["weight_decay"], group["momentum"]) == (0, 0.5)
    said = " ".join(capsys.readouterr().err.split())
    expected = "train.steps, train.head_lr_factor, train.momentum, train.weight_decay: not as"
    assert f"note: {expected} in {folder.recipe}; the remaining steps" in said
    assert load_recipe(folder.recipe).train.momentum == 0.5
    rates = [group["lr"] for group in load_checkpoint(folder.last)["optimizer"]["param_groups"]]
    assert rates[1] == pytest.approx(7 * rates[0])


@pytest.mark.parametrize("before", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("after", ["sgd", "adamw", "muon"])
def test_resuming_with_another_optimizer_is_refused(
    before: str, after: str, tmp_path: Path
) -> None:
    folder = run(tmp_path / "run", f"train.optimizer={before}", "train.steps=1")
    change = f"train.optimizer={after}"
    if before == after:
        run(folder.path, change, "train.steps=2", resume=True)
        return
    saved = folder.last.read_bytes()
    with pytest.raises(UserError, match=rf"{change} cannot .* set train\.optimizer={before}, or"):
        run(folder.path, change, "train.steps=2", resume=True)
    assert folder.last.read_bytes() == saved


@pytest.mark.parametrize("damage", [b"", b"garbage" * 50, None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = weights(run(tmp_path / "alone"))
    folder = run(tmp_path / "run")
    (folder.model / "model.safetensors").unlink()
    folder.last.write_bytes(folder.last.read_bytes()[:-2000] if damage is None else damage)
    assert weights(run(tmp_path / "run", resume=True)) == expected
    said = " ".join(capsys.readouterr().err.split())
    assert "last.ckpt: damaged" in said
    assert "weights_only" not in said
    assert "continuing from the one before, step 4" in said
    assert load_checkpoint(folder.before_last)["step"] == 4
    for path in (folder.last, folder.before_last):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt: dam.*before_last\.ckpt: dam.*another --out"):
        run(tmp_path / "run", resume=True)


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


def test_accumulated_gradients_are_those_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without batch statistics and dropout, splitting a batch changes nothing but rounding."""
    for layer in (torch.nn.BatchNorm2d, torch.nn.Dropout2d):
        monkeypatch.setattr(layer, "forward", lambda self, features: features)
    options = (
        "model.backbone=test_vit",
        "train.steps=1",
        "train.batch_size=4",
        "train.optimizer=sgd",
        "train.lr=1",
        "train.precision=fp32",
        "train.loss_divisor=valid",
        "train.warmup_steps=0",
        "train.ema_decay=null",
    )
    runs = [
        run(tmp_path / name, *options, *more)
        for name, more in (
            ("initial", ["train.lr=1e-30"]),
            ("whole", []),
            ("split", ["train.accumulate=4"]),
        )
    ]
    initial, whole, split = (load_file(each.model / "model.safetensors") for each in runs)
    for name, tensor in whole.items():
        update = (tensor - initial[name]).abs().max()
        assert (tensor - split[name]).abs().max() <= 1e-4 * update + 1e-7
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in whole.items())
    losses = [each.read_metrics()[0]["loss"] for each in runs]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_average_follows_the_first_steps_closely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: after s steps its decay is 1 - s^(-2/3), here up to 0.4 from the third on."""
    after: list[torch.Tensor] = []
    real = loop.take_step

    def noted(trained: TrainingState, step: int, batch: Batch) -> dict[str, torch.Tensor]:
        losses = real(trained, step, batch)
        after.append(trained.model.head.fused_classifier[1].weight.detach().clone())
        return losses

    monkeypatch.setattr(loop, "take_step", noted)
    settings = ("train.ema_decay=0.4", "train.warmup_steps=0")
    found = load_file(run(tmp_path / "run", *settings).model / "model.safetensors")
    average = after[0]
    for steps, weight in enumerate(after[1:], start=1):
        decay = min(1 - steps ** (-2 / 3), 0.4)
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(found["head.fused_classifier.1.weight"], average)
    assert not torch.allclose(average, after[-1], rtol=1e-3)


def test_after_a_validation_batch_norms_go_on_learning(tmp_path: Path) -> None:
    """Without an average, it is the network in training that is scored."""
    settings = ("train.steps=3", "train.validate_every=1", "train.ema_decay=null")
    trained = load_checkpoint(run(tmp_path / "run", *settings).last)["model"]
    counts = {int(t) for name, t in trained.items() if name.endswith("num_batches_tracked")}
    assert counts == {3}


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


def test_a_second_interrupt_stops_at_once() -> None:
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.received == name
            with pytest.raises(KeyboardInterrupt) if name == "SIGINT" else nullcontext():
                os.kill(os.getpid(), number)


def test_the_batch_must_divide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=2 does not divide by 3"):
        run(tmp_path / "run", "train.accumulate=3")


def test_there_is_a_weight_for_each_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"class_weights: 2 weights, but scenes has 11 classes"):
        run(tmp_path / "run", "train.class_weights=[1, 2]")
    assert not (tmp_path / "run").exists()


def test_best_weights_can_be_kept(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "train.validate_every=2", "train.keep=best")
    best = load_checkpoint(folder.best)
    stored = load_file(folder.model / "model.safetensors")
    scored = {row["step"]: row["val/mIoU"] for row in folder.read_metrics() if "val/mIoU" in row}
    assert set(scored) == {2, 4, 6}
    assert best["best"]["mIoU"] == max(scored.values())
    assert all(torch.equal(stored[name], tensor) for name, tensor in best["average"].items())


def test_the_best_weights_are_chosen_by_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures are there and one is scored, after the last step too; no labels, no score."""
    scored = []
    results = iter([math.nan, 0.3, 0.2])
    real = loop.scores

    def noted(confusion: torch.Tensor) -> Scores:
        scored.append(int(confusion.sum()))
        return real(confusion)._replace(mean_iou=next(results))

    monkeypatch.setattr(loop, "scores", noted)
    folder = run(tmp_path / "run", "train.validate_every=2", "train.keep=best")
    assert len(scored) == 3
    assert len(set(scored)) == 1
    assert load_checkpoint(folder.best)["best"] == {"step": 4, "mIoU": 0.3}
    assert "NaN" not in folder.metrics.read_text()


class TestInitFrom:
    def test_same_classes_take_every_weight(self, tmp_path: Path) -> None:
        source = run(tmp_path / "source")
        target = run(
            tmp_path / "target",
            f"model.init_from={source.model}",
            "train.steps=1",
            "train.lr=1e-12",
            "train.ema_decay=null",
        )
        before = load_file(source.model / "model.safetensors")
        after = load_file(target.model / "model.safetensors")
        names = [name for name in before if name.endswith(("weight", "bias"))]
        for name in names:
            torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)

    def test_other_classes_leave_out_the_classifiers(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.manual_seed(0)
        source = danet.DANet(
            3, "test_resnet", pretrained_backbone=False, head_channels=16, key_channels=4,
            auxiliary=False,
        )  # fmt: skip
        source.save_pretrained(tmp_path / "source")
        settings = (f"model.init_from={tmp_path / 'source'}", "train.steps=1", "train.lr=1e-12")
        target = run(tmp_path / "target", *settings, "train.ema_decay=null")
        assert "all but the classifiers" in capsys.readouterr().err
        after = load_file(target.model / "model.safetensors")
        assert after["head.fused_classifier.1.weight"].shape[0] == 11
        name = "head.position_branch.reduce.0.weight"
        torch.testing.assert_close(after[name], source.state_dict()[name], rtol=1e-4, atol=1e-6)

    def test_as_many_other_classes_leave_out_the_classifiers(self, tmp_path: Path) -> None:
        source = tiny_danet(11, auxiliary=False)
        source.save_pretrained(tmp_path / "source")
        settings = (f"model.init_from={tmp_path / 'source'}", "train.steps=1", "train.lr=1e-12")
        target = run(tmp_path / "target", *settings, "train.ema_decay=null")
        after = load_file(target.model / "model.safetensors")
        convolutions = {name: t for name, t in source.state_dict().items() if t.ndim == 4}
        taken = {name for name, t in convolutions.items() if torch.allclose(after[name], t)}
        assert taken == {name for name in convolutions if "classifier" not in name}

    def test_another_network_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = run(tmp_path / "source", "train.steps=1", "model.channel=false")
        given = (f"model.init_from={source.model}", "model.channel=false")
        with pytest.raises(UserError, match="another network"):
            run(tmp_path / "target", *given, "model.head_channels=8")
        with pytest.raises(
            UserError, match=r"\d tensors do not fit, first: head\.channel.* missing"
        ):
            run(tmp_path / "target", *given, "model.channel=true")
        assert "weights from" not in capsys.readouterr().err

    @pytest.mark.parametrize("auxiliary", [False, True])
    def test_an_auxiliary_head_that_one_lacks_is_left_out(
        self, auxiliary: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = run(tmp_path / "source", "train.steps=1", f"model.auxiliary={auxiliary}".lower())
        other = f"model.auxiliary={not auxiliary}".lower()
        run(tmp_path / "target", f"model.init_from={source.model}", "train.steps=1", other)
        said = capsys.readouterr().err
        assert "all but the auxiliary head, which only one of both has" in said


def test_the_only_checkpoint_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_last({"step": 1})
    folder.drop_last()
    assert folder.last.exists()
    folder.save_last({"step": 2})
    folder.drop_last()
    assert torch.load(folder.last)["step"] == 1


def test_an_unfinished_line_of_metrics_is_skipped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": 2.0})
    folder.metrics.write_text(folder.metrics.read_text() + '{"step": 2, "lo')
    assert folder.read_metrics() == [{"step": 1, "loss": 2.0}]
    folder.forget_metrics_after(0)
    assert folder.metrics.read_text() == ""


@pytest.mark.parametrize(
    "line",
    ['{"loss": 1.0}', '{"step": 1, "loss": "bad"}', "[" * 100_000, f'{{"step": {"9" * 5000}}}'],
)
def test_a_line_of_metrics_that_is_none_is_skipped(line: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(f'{line}\n{{"step": 2, "loss": 0.5}}\n')
    assert folder.read_metrics() == [{"step": 2, "loss": 0.5}]
    folder.forget_metrics_after(1)
    assert folder.read_metrics() == []


def saved_step(folder: RunFolder) -> int:
    return load_checkpoint(folder.last)["step"]


def logged_steps(folder: RunFolder) -> list[float]:
    return [row["step"] for row in folder.read_metrics() if "loss" in row]


def validated_steps(folder: RunFolder) -> list[float]:
    return [row["step"] for row in folder.read_metrics() if "val/aAcc" in row]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            UserError("b.png: not a picture"),
            "not a picture; .* after step 6, .* continue with --resume",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "in the validation after step 6, .* saved"),
    ],
)
def test_a_validation_that_fails_costs_no_steps_and_is_done_on_resuming(
    failure: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    settings = ("train.checkpoint_every=1000", "train.keep=best")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", fail)
        with pytest.raises((UserError, OutOfMemory), match=told):
            run(tmp_path / "run", *settings)
    folder = RunFolder(tmp_path / "run")
    assert saved_step(folder) == 6
    assert not folder.model.exists()
    run(tmp_path / "run", *settings, resume=True)
    assert validated_steps(folder) == [6]
    assert weights(folder) == weights(run(tmp_path / "alone", *settings))


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


def test_training_without_a_label_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = loop._Trainer._batches

    def unlabelled(trainer: loop._Trainer) -> Iterator[Batch]:
        for batch in batches(trainer):
            yield batch._replace(labels=torch.full_like(batch.labels, 255))

    run(tmp_path / "labelled")
    assert "no pixel of their crops has a class" not in capsys.readouterr().err
    monkeypatch.setattr(loop._Trainer, "_batches", unlabelled)
    run(tmp_path / "run")
    assert capsys.readouterr().err.count("no pixel of their crops has a class") == 1


def test_validations_do_not_count_as_time_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, evaluate = loop.take_step, loop.evaluate
    now = 0.0

    def step_of_a_second(*args: object) -> dict[str, torch.Tensor]:
        nonlocal now
        now += 1
        return take_step(*args)

    def evaluate_for_an_hour(*args: object, **kwargs: object) -> object:
        nonlocal now
        now += 3600
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("danet.training.log.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(loop, "take_step", step_of_a_second)
    monkeypatch.setattr(loop, "evaluate", evaluate_for_an_hour)
    folder = run(tmp_path / "run", "train.validate_every=2", "train.log_every=3")
    rows = [row for row in folder.read_metrics() if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["images_per_second"] for row in rows] == [2, 2, 2, 2]


def test_a_validation_is_stopped_by_sigterm_and_done_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.evaluate

    def interrupted(*args: object, **kwargs: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(TrainingStopped, match="SIGTERM after step 3, which is saved"):
            run(tmp_path / "run", "train.validate_every=3")
    folder = RunFolder(tmp_path / "run")
    assert validated_steps(folder) == []
    run(tmp_path / "run", "train.validate_every=3", resume=True)
    assert validated_steps(folder) == [3, 6]


def test_weights_that_diverged_do_not_replace_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LogitsNotFinite("the network's logits are not finite")

    monkeypatch.setattr(loop, "evaluate", fail)
    with pytest.raises(
        TrainingDiverged, match=r"validation after step 6.* delete that file to resume"
    ):
        run(tmp_path / "run", "train.checkpoint_every=4")
    assert saved_step(RunFolder(tmp_path / "run")) == 4


def test_settings_changed_before_the_first_step_become_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("a.png: not a picture")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", fail)
        with pytest.raises(UserError):
            run(tmp_path / "run", "train.lr=0.5")
    folder = run(tmp_path / "run", "train.lr=0.01", "model.init_from=gone", resume=True)
    said = capsys.readouterr().err
    assert "note: train.lr: not as in" in said
    assert "note: model.init_from: without effect" in said
    assert load_recipe(str(folder.recipe)).train.lr == 0.01


@pytest.mark.parametrize("setting", ["model.channel_affinity=paper", "model.output_stride=32"])
def test_a_run_does_not_go_on_with_another_network(setting: str, tmp_path: Path) -> None:
    """Whose weights have the same shapes."""
    folder = run(tmp_path / "run", "train.steps=2")
    before = folder.recipe.read_bytes()
    with pytest.raises(UserError, match=r"^model\.\w+: not as in .* weights belong to"):
        run(tmp_path / "run", "train.steps=2", setting, resume=True)
    assert folder.recipe.read_bytes() == before


@pytest.mark.parametrize("other", ["test.flip=true", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"])
def test_scores_of_another_protocol_do_not_count(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.validate_every=2", "train.keep=best")
    found = iter([0.9, 0.2, 0.3, 0.3])
    real = loop.scores
    monkeypatch.setattr(
        loop, "scores", lambda confusion: real(confusion)._replace(mean_iou=next(found))
    )
    folder = run(tmp_path / "run", "train.steps=2", *settings)
    assert load_checkpoint(folder.best)["best"] == {"step": 2, "mIoU": 0.9}
    run(tmp_path / "run", "train.steps=2", other, *settings, resume=True)
    assert load_checkpoint(folder.best)["best"] == {"step": 2, "mIoU": 0.2}
    run(tmp_path / "run", "train.steps=6", other, *settings, resume=True)
    # The first of two that are equally good.
    assert load_checkpoint(folder.best)["best"] == {"step": 4, "mIoU": 0.3}


@pytest.mark.parametrize(("again", "best"), [(0.4, 4), (0.2, 2)])
def test_scores_of_few_pictures_do_not_count_beside_those_of_all(
    again: float, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last score is of all pictures unless the best weights are kept."""
    found = iter([0.3, 0.9, again])
    real = loop.scores
    monkeypatch.setattr(
        loop, "scores", lambda confusion: real(confusion)._replace(mean_iou=next(found))
    )
    settings = ("train.validate_every=2", "train.validate_images=1", "train.steps=4")
    folder = run(tmp_path / "run", *settings, "train.keep=last")
    assert load_checkpoint(folder.best)["best"] == {"step": 2, "mIoU": 0.3}
    run(tmp_path / "run", *settings, "train.keep=best", resume=True)
    assert load_checkpoint(folder.best)["step"] == best


def test_the_best_weights_of_a_finished_run_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.3, 0.2])
    real = loop.scores
    monkeypatch.setattr(
        loop, "scores", lambda confusion: real(confusion)._replace(mean_iou=next(found))
    )
    settings = ("train.validate_every=2", "train.validate_images=null", "train.steps=4")
    run(tmp_path / "run", *settings, "train.keep=last")
    folder = run(tmp_path / "run", *settings, "train.keep=best", resume=True)
    stored = load_file(folder.model / "model.safetensors")
    average = load_checkpoint(folder.best)["average"]
    assert load_checkpoint(folder.best)["step"] == 2
    assert all(torch.equal(stored[name], tensor) for name, tensor in average.items())


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "train.steps=2")
    before = weights(folder)
    shutil.rmtree(folder.last.parent)
    with pytest.raises(UserError, match=r"holds metrics\.jsonl but no checkpoint to continue from"):
        run(tmp_path / "run", "train.steps=2", resume=True)
    assert weights(folder) == before
    assert folder.read_metrics()


@pytest.mark.parametrize("name", ["gloo_test", "DataLoader worker"])
def test_a_folders_name_is_no_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object) -> None:
        raise TrainingDiverged.after(tmp_path / name, "the loss was not finite", 0.1)

    monkeypatch.setattr(loop, "take_step", diverged)
    with pytest.raises(TrainingDiverged, match=r"Lower train\.lr"):
        run(tmp_path / name)


def test_a_process_lost_while_a_run_is_set_up_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr(loop, "training_samples", lost)
    with pytest.raises(TrainingStopped, match="another process of this run was lost"):
        run(tmp_path / "run")


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"train\.devices=2 .* sees 1 devices of type cuda"):
        launch(TrainConfig(devices=2), torch.device("cuda"), bfloat16=False)


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    with pytest.raises(UserError, match=r"train\.steps=3, but the run .* has taken 6"):
        run(tmp_path / "run", "train.steps=3", resume=True)
    assert load_recipe(str(folder.recipe)).train.steps == 6


@pytest.mark.parametrize("name", ["metrics.jsonl", "model", "config.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_left_alone(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match=rf"holds {name}, .* choose another"):
        run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_is_locked_before_its_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "run")
    monkeypatch.setattr(RunFolder, "last_checkpoint", lambda *_: pytest.fail("read unlocked"))
    lock = folder.lock()
    with pytest.raises(UserError, match="another process is training in this folder"):
        run(tmp_path / "run", resume=True)
    lock.release()


def test_a_checkpoint_is_on_the_disk_before_it_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.save_last({"step": 1})
    order: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        order.append(target.name)
        return replace(path, target)

    monkeypatch.setattr("danet.training.checkpoint.fsync", lambda _: order.append("flush"))
    monkeypatch.setattr(Path, "replace", noted)
    folder.save_last({"step": 2})
    assert order == ["flush", "before_last.ckpt", "last.ckpt"]
