from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import danet
from danet.config import RunConfig
from danet.data import dataset_spec
from danet.training.build import build_model
from danet.training.probe import freeze_unreached
from networks import tiny_danet


@pytest.mark.parametrize(
    ("backbone", "some"), [("test_resnet", False), ("pit_ti_224", True), ("hrnet_w18_small", True)]
)
def test_what_gets_no_gradient_is_frozen(backbone: str, some: bool) -> None:
    torch.manual_seed(0)
    options = {"head_channels": 16, "key_channels": 4}
    model = danet.DANet(3, backbone, pretrained_backbone=False, **options).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    sum(logits.square().sum() for logits in model(torch.randn(2, 3, 64, 64))).backward()
    unreached = {name for name, each in model.named_parameters() if each.grad is None}
    assert bool(unreached) == some
    model.load_state_dict(before)
    torch.set_rng_state(drawn)
    frozen = model.head.fused_classifier[1].bias.requires_grad_(False)
    freeze_unreached(model, (64, 64))
    assert not frozen.requires_grad
    frozen.requires_grad_()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == unreached
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_backbone_whose_shapes_follow_from_values_is_left_as_it_is() -> None:
    model = tiny_danet()
    model.backbone.register_forward_pre_hook(lambda _, inputs: inputs[0].sum().item() and None)
    freeze_unreached(model, (64, 64))
    assert all(parameter.requires_grad for parameter in model.parameters())


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
