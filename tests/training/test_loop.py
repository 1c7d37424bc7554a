from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import danet
from danet.config import TrainConfig
from danet.data.loader import Batch
from danet.errors import (
    UserError,
)
from danet.training import loop
from danet.training.checkpoint import RunFolder, load_checkpoint
from danet.training.launch import launch
from danet.training.state import TrainingState
from tiny_runs import run, weights


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


@pytest.mark.parametrize("setting", ["data.crop_size=[8, 6]", "model.backbone=skresnet18"])
def test_a_single_value_for_batch_norm_is_refused_at_once(setting: str, tmp_path: Path) -> None:
    """Of a feature map of one pixel, or after global pooling."""
    with pytest.raises(UserError, match="more crops a pass"):
        run(tmp_path / "run", setting, "train.batch_size=1")
    assert not (tmp_path / "run").exists()


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


def test_the_batch_must_divide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=2 is not divisible by 3"):
        run(tmp_path / "run", "train.accumulate=3")


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


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"train\.devices=2 .* sees 1 devices of type cuda"):
        launch(TrainConfig(devices=2), torch.device("cuda"), bfloat16=False)
