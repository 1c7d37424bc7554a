from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from danet.config import RunConfig, TrainConfig
from danet.data import dataset_spec
from danet.training.build import build_model, build_optimizer
from networks import tiny_danet


def test_weights_to_go_on_from_are_the_only_ones_that_are_read(tmp_path: Path) -> None:
    model = {"backbone": "test_resnet", "head_channels": 16, "key_channels": 4}
    gone = {"backbone_weights": tmp_path / "gone.safetensors"}
    config = RunConfig.model_validate({"model": {**model, **gone, "auxiliary": False}})
    resumed = tiny_danet(11, auxiliary=False).state_dict()
    built = build_model(config, dataset_spec("scenes"), resumed, pytest.fail).state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize(("mean", "notes"), [(None, 1), ((127.5, 127.5, 127.5), 0)])
def test_weights_of_another_normalization_are_noted(
    mean: tuple[float, float, float] | None, notes: int, tmp_path: Path
) -> None:
    """test_vit was trained with 1/2 as mean and deviation, not with ImageNet's."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    model = {"backbone": "test_vit", "backbone_weights": weights, "head_channels": 16}
    data = {} if mean is None else {"mean": mean, "std": mean}
    config = RunConfig.model_validate({"model": {**model, "key_channels": 4}, "data": data})
    said: list[str] = []
    build_model(config, dataset_spec("scenes"), None, said.append)
    assert len(said) == notes
    assert all("data.mean=[127.5, 127.5, 127.5]" in line for line in said)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_weights_decay_by_as_much_as_the_recipe_says(name: str) -> None:
    """Without gradients, a step leaves 1 - 0.5 x 0.1 of them."""
    model = tiny_danet()
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, lr=0.5, weight_decay=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, start in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.95 * start)
