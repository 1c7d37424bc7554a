import copy

import pytest
import torch

import danet
from danet.config import TrainConfig
from danet.errors import UserError
from danet.recipes import load_recipe
from danet.training.build import prepare_for_training


@pytest.mark.parametrize(
    ("backbone", "which"),
    [
        ("test_resnet", True),
        ("mobilenetv3_small_100", True),
        ("convnext_atto", True),
        ("vit_tiny_patch16_224", True),
        ("eva02_tiny_patch14_224", True),  # whose blocks take named inputs
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


def test_a_copy_of_a_checkpointed_network_has_weights_of_its_own() -> None:
    model = danet.DANet(3, "test_resnet", pretrained_backbone=False, head_channels=16)
    prepare_for_training(model, TrainConfig(activation_checkpointing=True))
    copied = copy.deepcopy(model)
    for parameter in copied.backbone.parameters():
        torch.nn.init.zeros_(parameter)
    assert not copied.backbone(torch.randn(1, 3, 32, 32)).c4.any()
    assert model.backbone(torch.randn(1, 3, 32, 32)).c4.any()


def test_early_blocks_are_those_before_the_last_stage() -> None:
    backbone = danet.DANet(3, "resnet50c", pretrained_backbone=False).backbone
    assert backbone.early_blocks() == backbone.blocks()[: 3 + 4 + 6]
    one_stage = danet.DANet(3, "mobilenetv3_small_100", pretrained_backbone=False).backbone
    assert one_stage.early_blocks() == one_stage.blocks()[:-1]


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224", "hiera_tiny_224"])
def test_checkpointing_keeps_little_but_the_blocks_inputs(backbone: str) -> None:
    plain = danet.DANet(3, backbone, pretrained_backbone=False, head_channels=16).train()
    early, checkpointed = copy.deepcopy(plain), copy.deepcopy(plain)
    prepare_for_training(early, TrainConfig(activation_checkpointing="early"))
    prepare_for_training(checkpointed, TrainConfig(activation_checkpointing=True))
    whole = kept_bytes(plain)
    assert kept_bytes(checkpointed) < kept_bytes(early) < 0.6 * whole
    assert kept_bytes(checkpointed) < 0.25 * whole


def kept_bytes(model: torch.nn.Module) -> int:
    """Of what the backward pass will read."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(torch.zeros(2, 3, 64, 64))
    assert output.fused.requires_grad
    return sum(kept.values())


def test_the_stem_is_what_comes_before_the_stages() -> None:
    body = danet.DANet(3, "resnet18", pretrained_backbone=False).backbone
    assert body.stem() == [body.body.conv1, body.body.bn1, body.body.act1, body.body.maxpool]
    assert danet.DANet(3, "regnety_002", pretrained_backbone=False).backbone.stem() == []


def test_compile_and_checkpointing_exclude_each_other() -> None:
    with pytest.raises(UserError, match="choose one"):
        load_recipe("demo", ["train.compile=true", "train.activation_checkpointing=true"])


def test_a_network_without_blocks_has_no_early_ones() -> None:
    backbone = danet.DANet(3, "test_resnet", pretrained_backbone=False).backbone
    backbone.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    assert backbone.early_blocks() == backbone.blocks() == backbone.stem() == []
    model = danet.DANet(3, "test_resnet", pretrained_backbone=False)
    model.backbone.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    with pytest.raises(UserError, match="has no blocks whose activations"):
        prepare_for_training(model, TrainConfig(activation_checkpointing=True))
