import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from danet.errors import (
    UserError,
)
from danet.recipes import load_recipe
from danet.training import loop
from danet.training.checkpoint import RunFolder, load_checkpoint
from tiny_runs import run, validate_with, weights


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
    validate_with(monkeypatch, 0.9, 0.2, 0.3, 0.3)
    folder = run(tmp_path / "run", "train.steps=2", *settings)
    assert load_checkpoint(folder.best)["best"] == {"step": 2, "mIoU": 0.9, "pictures": 1}
    run(tmp_path / "run", "train.steps=2", other, *settings, resume=True)
    assert load_checkpoint(folder.best)["best"] == {"step": 2, "mIoU": 0.2, "pictures": 1}
    run(tmp_path / "run", "train.steps=6", other, *settings, resume=True)
    # The first of two that are equally good.
    assert load_checkpoint(folder.best)["best"] == {"step": 4, "mIoU": 0.3, "pictures": 1}


def test_the_best_weights_of_a_finished_run_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_with(monkeypatch, 0.3, 0.2)
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
