from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

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


def test_state_in_another_memory_format_goes_on_alike() -> None:
    """As of a run whose weights were sharded, which are channels-last elsewhere."""
    torch.manual_seed(0)
    alone, resumed = (tiny_danet().to(memory_format=torch.channels_last) for _ in range(2))
    settings = TrainConfig(optimizer="adamw")
    optimizers = [build_optimizer(model, settings) for model in (alone, resumed)]
    for step in range(2):
        for ours, theirs in zip(alone.parameters(), resumed.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        if step == 0:
            plain = partial(torch.clone, memory_format=torch.contiguous_format)
            state = tree_map_only(torch.Tensor, plain, optimizers[0].state_dict())
            load_optimizer(optimizers[1], state)
    for ours, theirs in zip(alone.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)
