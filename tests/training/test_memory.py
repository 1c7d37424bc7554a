import copy

import pytest
import torch

import danet
from danet.config import TrainConfig, load_recipe
from danet.errors import UserError
from danet.training.build import prepare_for_training


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv3_small_100", "convnext_atto"])
def test_checkpointing_changes_no_gradient_and_no_statistic(backbone: str) -> None:
    torch.manual_seed(0)
    plain = danet.DANet(3, backbone, pretrained_backbone=False, head_channels=16).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    checkpointed = copy.deepcopy(plain)
    prepare_for_training(checkpointed, TrainConfig(activation_checkpointing=True))
    images = torch.randn(2, 3, 64, 48)
    for model in (plain, checkpointed):
        sum(logits.square().sum() for logits in model(images)).backward()
    for (name, ours), theirs in zip(
        checkpointed.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, ours), theirs in zip(checkpointed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_compile_and_checkpointing_exclude_each_other() -> None:
    with pytest.raises(UserError, match="choose one"):
        load_recipe("demo", ["train.compile=true", "train.activation_checkpointing=true"])
