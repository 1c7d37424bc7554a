from pathlib import Path

import pytest
import torch

from danet.errors import (
    TrainingDiverged,
    UserError,
)
from danet.training import loop
from danet.training.checkpoint import RunFolder, load_checkpoint
from tiny_runs import run, weights


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


@pytest.mark.parametrize("name", ["gloo_test", "DataLoader worker"])
def test_a_folders_name_is_no_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object) -> None:
        raise TrainingDiverged.after(tmp_path / name, "the loss was not finite", 0.1)

    monkeypatch.setattr(loop, "take_step", diverged)
    with pytest.raises(TrainingDiverged, match=r"Lower train\.lr"):
        run(tmp_path / name)


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
