import copy

import pytest
import torch

import danet
from danet.config import TrainConfig, load_recipe
from danet.errors import UserError
from danet.training.build import prepare_for_training


@pytest.mark.parametrize(
    ("backbone", "which"),
    [
        ("test_resnet", True),
        ("mobilenetv3_small_100", True),
        ("convnext_atto", True),
        ("test_resnet", "early"),
        ("mobilenetv3_small_100", "early"),
    ],
)
def test_checkpointing_changes_no_gradient_and_no_statistic(
    backbone: str, which: bool | str
) -> None:
    torch.manual_seed(0)
    plain = danet.DANet(3, backbone, pretrained_backbone=False, head_channels=16).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    checkpointed = copy.deepcopy(plain)
    prepare_for_training(checkpointed, TrainConfig(activation_checkpointing=which))
    images = torch.randn(2, 3, 64, 48)
    for model in (plain, checkpointed):
        sum(logits.square().sum() for logits in model(images)).backward()
    for (name, ours), theirs in zip(
        checkpointed.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, ours), theirs in zip(checkpointed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_early_blocks_are_those_before_the_last_stage() -> None:
    backbone = danet.DANet(3, "resnet50c", pretrained_backbone=False).backbone
    assert backbone.early_blocks() == backbone.blocks()[: 3 + 4 + 6]
    one_stage = danet.DANet(3, "mobilenetv3_small_100", pretrained_backbone=False).backbone
    assert one_stage.early_blocks() == one_stage.blocks()[:-1]


def test_compile_and_checkpointing_exclude_each_other() -> None:
    with pytest.raises(UserError, match="choose one"):
        load_recipe("demo", ["train.compile=true", "train.activation_checkpointing=true"])


def test_a_network_without_blocks_has_no_early_ones() -> None:
    backbone = danet.DANet(3, "test_resnet", pretrained_backbone=False).backbone
    backbone.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    assert backbone.early_blocks() == backbone.blocks() == []
