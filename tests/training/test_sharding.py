from pathlib import Path
from typing import Any

import pytest
import torch

from danet.config import TrainConfig
from danet.training.build import build_optimizer
from danet.training.sharding import load_optimizer
from networks import tiny_danet


def stepped(settings: TrainConfig) -> torch.optim.Optimizer:
    model = tiny_danet()
    optimizer = build_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_state_is_loaded_and_settings_are_kept(name: str, tmp_path: Path) -> None:
    optimizer = stepped(TrainConfig(optimizer=name))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state")
    changed = TrainConfig(optimizer=name, weight_decay=0, momentum=0.5, head_lr_factor=10)
    other = build_optimizer(tiny_danet(), changed)
    expected = settings_of(other)
    load_optimizer(other, state)
    assert settings_of(other) == expected
    loaded = other.state_dict()["state"]
    assert loaded.keys() == state["state"].keys()
    for index, values in state["state"].items():
        torch.testing.assert_close(loaded[index], values, rtol=0, atol=0)


def test_fused_kernels_are_as_the_strategy_wants_them() -> None:
    """A checkpoint of one strategy says `fused`, and the other cannot compute so."""
    for before, after in (("ddp", "fsdp"), ("fsdp", "ddp")):
        optimizer = build_optimizer(tiny_danet(), TrainConfig(strategy=after))
        load_optimizer(optimizer, stepped(TrainConfig(strategy=before)).state_dict())
        assert {group["fused"] for group in optimizer.param_groups} == {after == "ddp"}
