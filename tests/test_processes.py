"""Several processes on one machine, over gloo: those of torchrun, or forked ones like them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import forked
from danet import DANet
from danet.errors import UserError
from danet.processes import Share
from danet.training.checkpoint import load_checkpoint
from networks import TINY_RUN

SETTINGS = (
    *TINY_RUN,
    "data.train_images=16",
    "train.batch_size=8",
    "train.steps=12",
    "train.optimizer=sgd",
    "train.precision=fp32",
    "train.lr=0.002",
    "train.validate_images=5",
    "train.device=cpu",
)
FEW_SCENES = {"train": 16, "val": 5, "test": 2}
SMALL_SCENES = f"""
import danet.data.catalog.scenes as scenes
scenes._LENGTHS = {FEW_SCENES}
from danet.cli import main
main()
"""


def torchrun(folder: Path, processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    """The command that runs `danet` in several processes, with few scenes."""
    script = folder / "small_scenes.py"
    script.write_text(SMALL_SCENES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return [*command, str(script), *arguments]


def training(out: Path, *settings: str) -> list[str]:
    changes = [f"--set={setting}" for setting in (*SETTINGS, *settings)]
    return ["train", "demo", "--resume", "--out", str(out), *changes]


def run(folder: Path, processes: int, *arguments: str) -> str:
    done = forked.run(folder, *arguments, processes=processes, scenes=FEW_SCENES)
    assert done.status == 0, done.stderr
    return done.stdout


def train(out: Path, processes: int, *settings: str) -> list[dict[str, float]]:
    run(out.parent, processes, *training(out, *settings))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_shares_are_a_partition() -> None:
    for processes in (1, 2, 3, 7):
        shares = [Share(rank, processes).positions(5) for rank in range(processes)]
        assert sorted(position for share in shares for position in share) == list(range(5))


@pytest.mark.parametrize(
    ("rank", "processes"),
    [("3", None), (None, "4"), ("", "4"), ("one", "4"), ("0", "2.0"), ("-1", "2"), ("2", "2")],
)
def test_numbers_of_no_process_are_refused(
    rank: str | None, processes: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": processes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="set both as in RANK=0 WORLD_SIZE=2, start with torchrun"):
        Share.from_environment()


@pytest.mark.slow
def test_a_global_batch_is_the_same_run_on_any_number_of_processes(tmp_path: Path) -> None:
    rows = {count: train(tmp_path / f"run{count}", count) for count in (1, 2, 4)}
    losses = {count: [r["loss"] for r in found if "loss" in r] for count, found in rows.items()}
    assert len(losses[1]) == 12
    for count in (2, 4):
        np.testing.assert_allclose(losses[count][:5], losses[1][:5], rtol=1e-4)
        np.testing.assert_allclose(losses[count], losses[1], rtol=2e-2)
        scores = [rows[n][-1] for n in (1, count)]
        assert scores[0]["val/aAcc"] == pytest.approx(scores[1]["val/aAcc"], abs=0.01)


@pytest.mark.slow
def test_a_recipe_starts_its_processes_itself(tmp_path: Path) -> None:
    settings = ("train.steps=2", "train.devices=2", "train.batch_size=4")
    command = [sys.executable, torchrun(tmp_path, 2)[-1], *training(tmp_path / "own", *settings)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True).stdout
    assert said.count("model: ") == 1
    rows = (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 2]


@pytest.mark.slow
def test_checkpointed_activations_in_two_processes(tmp_path: Path) -> None:
    rows = [
        train(tmp_path / str(flag), 2, "train.steps=4", f"train.activation_checkpointing={flag}")
        for flag in ("false", "true")
    ]
    losses = [[row["loss"] for row in found if "loss" in row] for found in rows]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_all_processes_learn_that_one_found_logits_not_finite(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = torchrun(tmp_path, 2, *training(out, "train.steps=6", "train.checkpoint_every=4"))
    failing = f"""
import os
from danet.errors import LogitsNotFinite
from danet.training import validation
evaluate = validation.evaluate
def fail_in_one(*arguments, **options):
    if os.environ["RANK"] == "1":
        raise LogitsNotFinite("the network's logits are not finite")
    return evaluate(*arguments, **options)
validation.evaluate = fail_in_one
{SMALL_SCENES}"""
    (tmp_path / "small_scenes.py").write_text(failing)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1
    assert "logits were not finite in the validation after step 6" in done.stderr
    assert load_checkpoint(out / "checkpoints/last.ckpt")["step"] == 4


@pytest.mark.slow
def test_layers_that_get_no_gradient_are_not_waited_for(tmp_path: Path) -> None:
    settings = ("model.backbone=pit_ti_224", "train.optimizer=adamw", "train.lr_power=1e-9")
    alone = train(tmp_path / "alone", 1, *settings, "train.steps=4")
    train(tmp_path / "changed", 1, *settings, "train.steps=2")
    changed = train(tmp_path / "changed", 2, *settings, "train.steps=4")
    expected, losses = ([row["loss"] for row in rows if "loss" in row] for rows in (alone, changed))
    np.testing.assert_allclose(losses, expected, rtol=2e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_sharded_weights(tmp_path: Path) -> None:
    # AdamW's state has all kinds: averages shaped as the weights, and the step's number.
    settings = ("train.optimizer=adamw", "train.lr_power=1e-9", "train.ema_decay=null")
    sharded = "train.strategy=fsdp"
    alone = train(tmp_path / "alone", 1, *settings, "train.steps=9")
    train(tmp_path / "changed", 1, *settings, "train.steps=3")
    train(tmp_path / "changed", 2, *settings, sharded, "train.steps=6")
    changed = train(tmp_path / "changed", 1, *settings, "train.steps=9")
    expected, losses = ([row["loss"] for row in rows if "loss" in row] for rows in (alone, changed))
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    scores = [rows[-1]["val/aAcc"] for rows in (alone, changed)]
    assert scores[1] == pytest.approx(scores[0], abs=0.01)
    DANet.from_pretrained(tmp_path / "changed" / "model")


@pytest.mark.slow
def test_a_backbone_whose_features_are_read_inside_it_is_sharded_too(tmp_path: Path) -> None:
    settings = ("model.backbone=pit_ti_224", "train.optimizer=adamw", "train.ema_decay=null")
    expected, losses = (
        [
            row["loss"]
            for row in train(
                tmp_path / strategy, 2, *settings, "train.steps=3", f"train.strategy={strategy}"
            )
            if "loss" in row
        ]
        for strategy in ("ddp", "fsdp")
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.slow
def test_evaluation_counts_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"head_channels": 8, "key_channels": 4, "auxiliary": False}
    model = DANet(11, "test_resnet", pretrained_backbone=False, **options)
    model.save_pretrained(tmp_path / "model")
    found = []
    for processes in (1, 2, 3):
        file = tmp_path / f"{processes}.json"
        arguments = ["evaluate", str(tmp_path / "model"), "--data", "scenes", "--branches"]
        arguments += ["--json", str(file), "--report", str(tmp_path / f"{processes}.html")]
        said = run(tmp_path, processes, *arguments)
        assert said.count("5 pictures") == 1
        found.append(json.loads(file.read_text()))
    assert np.sum(found[0]["confusion"]) > 0
    assert found[0]["images"] == 5
    assert found[1] == found[2] == found[0]
    reports = {(tmp_path / f"{processes}.html").read_bytes() for processes in (1, 2, 3)}
    assert len(reports) == 1


@pytest.mark.slow
def test_a_broken_picture_does_not_end_the_other_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    DANet(11, "test_resnet", pretrained_backbone=False).save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for index in range(12):
        file = tmp_path / f"photos/{index:02}.png"
        if index % 2:
            Image.new("RGB", (64, 48)).save(file)
        else:
            file.write_bytes(b"no picture")
    out = tmp_path / "out"
    arguments = ["predict", str(tmp_path / "model"), str(tmp_path / "photos"), f"--out={out}"]
    done = forked.run(tmp_path, *arguments, processes=2)
    assert done.status != 0
    assert done.stderr.count("not a picture") == 6
    assert "6 of 6" in done.stdout
    assert len(list(out.glob("*.png"))) == 6


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    constant = "train.lr_power=1e-9"
    alone = train(tmp_path / "alone", 1, "train.steps=12", constant)
    train(tmp_path / "changed", 2, "train.steps=6", constant)
    changed = train(tmp_path / "changed", 1, "train.steps=12", constant)
    expected, losses = ([row["loss"] for row in rows if "loss" in row] for rows in (alone, changed))
    assert len(expected) == 12
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def children(process: int) -> Iterator[int]:
    """All processes below a process that run `danet`."""
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        yield int(child)
        yield from children(int(child))


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_a_restart_goes_on(
    restarts: int, tmp_path: Path
) -> None:
    out, alone = tmp_path / "run", tmp_path / "alone"
    settings = ("train.steps=24", "train.checkpoint_every=5")
    command = torchrun(tmp_path, 2, *training(out, *settings), restarts=restarts)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and len(metrics.read_text().splitlines()) > 12
    ):
        time.sleep(0.01)
    workers = [pid for pid in children(process.pid) if b"train" in command_line(pid)]
    os.kill(max(workers), signal.SIGKILL)
    since = time.monotonic()
    _, said = process.communicate(timeout=300)
    if restarts == 0:
        assert time.monotonic() - since < 60
        assert process.returncode == 1
        assert "Signal 9 (SIGKILL)" in said
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        return
    assert process.returncode == 0, said
    assert "continuing after step" in said
    train(alone, 2, *settings)
    same, expected = (load_file(path / "model/model.safetensors") for path in (out, alone))
    for name, tensor in expected.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-4)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_processes_that_nothing_connects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="start them with torchrun"), Share(0, 2).connected():
        pytest.fail("connected to nothing")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_process_of_a_group_ends_before_python_takes_itself_apart(
    grouped: bool, tmp_path: Path
) -> None:
    code = f"""
import atexit
import torch.distributed as dist
from danet.processes import end_process

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
atexit.register(print, "at exit")
if {grouped}:
    dist.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
print("said")
end_process(3)
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=buffered)
    expected = ["said", "at exit", *([] if grouped else ["taken apart"])]
    assert (done.returncode, done.stdout.splitlines()) == (3, expected)
