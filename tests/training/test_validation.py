import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import danet
from danet.config import TrainConfig
from danet.errors import (
    LogitsNotFinite,
    OutOfMemory,
    TrainingDiverged,
    TrainingStopped,
    UserError,
)
from danet.training import loop, state, validation
from danet.training.checkpoint import RunFolder, load_checkpoint
from tiny_runs import (
    run,
    saved_step,
    validate_with,
    validated_steps,
    weights,
)


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


def test_after_a_validation_batch_norms_go_on_learning(tmp_path: Path) -> None:
    """Without an average, it is the network in training that is scored."""
    settings = ("train.steps=3", "train.validate_every=1", "train.ema_decay=null")
    trained = load_checkpoint(run(tmp_path / "run", *settings).last)["model"]
    counts = {int(t) for name, t in trained.items() if name.endswith("num_batches_tracked")}
    assert counts == {3}


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
    scored = validate_with(monkeypatch, math.nan, 0.3, 0.2)
    folder = run(tmp_path / "run", "train.validate_every=2", "train.keep=best")
    assert len(scored) == 3
    assert len(set(scored)) == 1
    assert load_checkpoint(folder.best)["best"] == {"step": 4, "mIoU": 0.3, "pictures": 1}
    assert "NaN" not in folder.metrics.read_text()


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
        patch.setattr(validation, "evaluate", fail)
        with pytest.raises((UserError, OutOfMemory), match=told):
            run(tmp_path / "run", *settings)
    folder = RunFolder(tmp_path / "run")
    assert saved_step(folder) == 6
    assert not folder.model.exists()
    run(tmp_path / "run", *settings, resume=True)
    assert validated_steps(folder) == [6]
    assert weights(folder) == weights(run(tmp_path / "alone", *settings))


def test_validations_do_not_count_as_time_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, evaluate = loop.take_step, validation.evaluate
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
    monkeypatch.setattr(validation, "evaluate", evaluate_for_an_hour)
    folder = run(tmp_path / "run", "train.validate_every=2", "train.log_every=3")
    rows = [row for row in folder.read_metrics() if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["images_per_second"] for row in rows] == [2, 2, 2, 2]


def test_a_validation_is_stopped_by_sigterm_and_done_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = validation.evaluate

    def interrupted(*args: object, **kwargs: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", interrupted)
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

    monkeypatch.setattr(validation, "evaluate", fail)
    with pytest.raises(
        TrainingDiverged, match=r"validation after step 6.* delete that file to resume"
    ):
        run(tmp_path / "run", "train.checkpoint_every=4")
    assert saved_step(RunFolder(tmp_path / "run")) == 4


@pytest.mark.parametrize(("again", "best"), [(0.4, 4), (0.2, 2)])
def test_scores_of_few_pictures_do_not_count_beside_those_of_all(
    again: float, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last score is of all pictures unless the best weights are kept."""
    validate_with(monkeypatch, 0.3, 0.9, again)
    settings = ("train.validate_every=2", "train.validate_images=1", "train.steps=4")
    folder = run(tmp_path / "run", *settings, "train.keep=last")
    assert load_checkpoint(folder.best)["best"] == {"step": 2, "mIoU": 0.3, "pictures": 1}
    run(tmp_path / "run", *settings, "train.keep=best", resume=True)
    assert load_checkpoint(folder.best)["step"] == best


def test_a_score_of_all_pictures_does_not_count_beside_later_ones_of_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_with(monkeypatch, 0.9, 0.2)
    settings = ("train.validate_every=null", "train.validate_images=1")
    folder = run(tmp_path / "run", *settings, "train.steps=4", "train.keep=last")
    assert load_checkpoint(folder.best)["best"] == {"step": 4, "mIoU": 0.9, "pictures": 2}
    run(tmp_path / "run", *settings, "train.steps=6", "train.keep=best", resume=True)
    assert load_checkpoint(folder.best)["best"] == {"step": 6, "mIoU": 0.2, "pictures": 1}
    counts = [row["val/images"] for row in folder.read_metrics() if "val/images" in row]
    assert counts == [2, 1]
