import pytest
import torch

import danet
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
