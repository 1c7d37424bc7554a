import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import danet
from danet.convolution import ConvReLU2d, ResidualBlock
from danet.data.scenes import render
from danet.optimize import fold_batch_norms, optimize_for_inference
from danet.winograd import WinogradConv2d


def network(backbone: str) -> danet.DANet:
    """With batch statistics and residual weights away from their start."""
    torch.manual_seed(0)
    model = danet.DANet(5, backbone, pretrained_backbone=False, head_channels=32, key_channels=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for name, parameter in model.named_parameters():
        if "residual_weight" in name:
            nn.init.constant_(parameter, 0.7)
    return model.eval()


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# One takes no small pictures, one has activations inside its norms, and one has norms before
# convolutions, which stay.
@pytest.mark.parametrize(
    ("backbone", "left"),
    [
        ("test_resnet", 0),
        ("inception_v3", 0),
        ("mobilenetv3_small_100", 0),
        ("densenet121", 62),
        ("convnext_atto", 0),
    ],
)
def test_folding_changes_no_logits(backbone: str, left: int) -> None:
    model = network(backbone)
    images = torch.randn(2, 3, 75, 91)
    with torch.no_grad():
        expected = model(images)
        fold_batch_norms(model)
        actual = model(images)
    assert batch_norms(model) == left
    for branch, reference in zip(actual, expected, strict=True):
        assert relative_error(branch, reference) < 1e-5


def test_tensors_without_data_are_folded_as_well() -> None:
    """By which memory is estimated."""
    with FakeTensorMode():
        model = danet.DANet(5, "test_resnet", pretrained_backbone=False).eval()
        fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    assert batch_norms(fast) == kinds(fast, nn.ReLU) == 0


@torch.no_grad()
def test_an_empty_batch_stays_one() -> None:
    model = danet.DANet(5, "resnet18", pretrained_backbone=False, head_channels=256)
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    assert kinds(fast, WinogradConv2d) > 0
    assert fast(torch.zeros(0, 3, 64, 64)).fused.shape == (0, 5, 8, 8)


def test_a_convolution_that_is_read_twice_keeps_its_norm() -> None:
    class ReadTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)

        def forward(self, features: Tensor) -> Tensor:
            convolved = self.conv(features)
            return self.norm(convolved) + convolved

    model = network("test_resnet")
    model.head.position_branch.attention = ReadTwice().eval()
    fold_batch_norms(model)
    assert batch_norms(model) == 1
    assert isinstance(model.head.position_branch.attention.norm, nn.BatchNorm2d)


@torch.no_grad()
def test_a_network_that_was_in_training_is_made_fast_as_it_evaluates() -> None:
    model = network("test_resnet")
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).fused
    fast = optimize_for_inference(model.train(), bfloat16=False, compile_graph=False)
    torch.testing.assert_close(fast(images).fused, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_by_the_batchs_own_statistics_stays() -> None:
    model = network("test_resnet")
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean = norm.running_var = None
    fold_batch_norms(model)
    assert [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [norm]


@pytest.mark.parametrize(("width", "bfloat16", "bound"), [(256, False, 1e-5), (512, True, 0.05)])
def test_wide_convolutions_take_winograds_way(
    monkeypatch: pytest.MonkeyPatch, width: int, bfloat16: bool, bound: float
) -> None:
    """The logits of a network that is wide enough for it, and its own are left as they were."""
    monkeypatch.setattr("danet.winograd.layer.has_amx", lambda: False)
    torch.manual_seed(0)
    model = danet.DANet(5, "test_resnet", pretrained_backbone=False, head_channels=width).eval()
    exact = copy.deepcopy(model)
    fast = optimize_for_inference(model, bfloat16=bfloat16, compile_graph=False)
    ways = [module for module in fast.modules() if isinstance(module, WinogradConv2d)]
    assert [way.weight.dtype for way in ways] == 2 * [torch.bfloat16 if bfloat16 else torch.float32]
    images = torch.randn(1, 3, 75, 91)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = fast.fused_logits(images)
    assert relative_error(logits.float(), exact.fused_logits(images)) < bound


def test_bfloat16_weights_need_half_the_memory() -> None:
    model = network("test_resnet")
    model.auxiliary_head = None
    exact = copy.deepcopy(model)
    images = torch.randn(1, 3, 64, 64)
    fast = optimize_for_inference(model, bfloat16=True, compile_graph=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = fast.fused_logits(images)
    assert relative_error(logits.float(), exact.fused_logits(images)) < 0.05
    bytes_of = lambda net: sum(p.numel() * p.element_size() for p in net.parameters())  # noqa: E731
    assert bytes_of(fast) < 0.55 * bytes_of(exact)


# The first has both kinds of blocks; the others' are wide enough for Winograd, end with attention,
# and blur before they stride. What is left of ReLUs is at the end of blocks that stay as they are.
@pytest.mark.parametrize(
    ("backbone", "blocks", "relus"),
    [("test_resnet", 4, 0), ("resnet10t", 2, 2), ("seresnet18", 0, 8), ("resnetblur18", 4, 4)],
)
@torch.no_grad()
def test_networks_compute_the_same_in_fewer_passes(backbone: str, blocks: int, relus: int) -> None:
    model = network(backbone)
    images = torch.randn(2, 3, 75, 91)
    expected = model(images)
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    *logits, auxiliary = fast(images)
    assert auxiliary is None
    for branch, reference in zip(logits, expected[:-1], strict=True):
        torch.testing.assert_close(branch, reference, rtol=1e-5, atol=1e-5)
    assert (kinds(fast, ResidualBlock), kinds(fast, nn.ReLU)) == (blocks, relus)


def test_other_relus_stay() -> None:
    """One reads a sum, one what another layer reads too, one runs twice, one is of another kind."""

    class Doubled(nn.ReLU):
        def forward(self, features: Tensor) -> Tensor:
            return 2 * super().forward(features)

    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.fourth = (
                nn.Conv2d(32, 32, 1) for _ in range(4)
            )
            self.doubled = Doubled(inplace=True)
            self.of_sum, self.of_shared, self.twice = (nn.ReLU(inplace=True) for _ in range(3))

        def forward(self, features: Tensor) -> Tensor:
            summed = self.of_sum(self.first(features) + features)
            shared = self.second(summed)
            rest = self.twice(self.third(self.twice(shared.sigmoid() + self.of_shared(shared))))
            return self.doubled(self.fourth(rest))

    model = network("test_resnet")
    model.head.position_branch.attention = Others().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).fused
        fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
        torch.testing.assert_close(fast(images).fused, expected, rtol=1e-5, atol=1e-5)
    attention = fast.head.position_branch.attention
    assert kinds(attention, nn.ReLU) == 3
    assert kinds(attention, Doubled) == 1
    assert kinds(attention, ConvReLU2d) == 0
    assert attention.of_sum.inplace


@pytest.mark.parametrize(
    "path",
    ["backbone.body.conv1", "backbone.body.bn1", "backbone.body.act1", "backbone.body.layer3.0"]
    + [f"backbone.body.layer3.0.{name}" for name in ("conv2", "act2", "act3", "conv3")]
    + ["backbone.body.layer3.0.drop_block"],
)
@torch.no_grad()
def test_layers_with_hooks_stay(path: str) -> None:
    """What a hook reads is what it would have read."""
    model = network("test_resnet")
    images = torch.randn(1, 3, 64, 64)
    read: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(
        lambda _module, _inputs, output: read.append(output)
    )
    expected = model(images).fused
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    read = read[:1]
    torch.testing.assert_close(fast(images).fused, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[-1], read[0], rtol=1e-5, atol=1e-5)
    assert len(read) > 1


@pytest.mark.parametrize("part", ["reduce.1", "reduce.2"])
@torch.no_grad()
def test_hooks_of_a_branch_keep_its_reduction_apart(part: str) -> None:
    """Of wide branches, whose reductions are joined otherwise."""
    model = danet.DANet(5, "resnet18", pretrained_backbone=False, head_channels=256).eval()
    layer = model.head.channel_branch.get_submodule(part)
    layer.register_forward_hook(lambda _module, _inputs, output: 1.5 * output)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    fast = optimize_for_inference(copy.deepcopy(model), bfloat16=False, compile_graph=False)
    for logits, reference in zip(fast(images)[:3], expected[:3], strict=True):
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)


class ShiftedBatchNorm(nn.BatchNorm2d):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) + 1


@pytest.mark.parametrize("change", ["subclass", "own forward", "convolution's forward", "pruned"])
@torch.no_grad()
def test_layers_that_compute_something_else_stay(change: str) -> None:
    model = network("test_resnet")
    convolution, norm, _ = model.head.position_branch.refine
    if change == "subclass":
        norm.__class__ = ShiftedBatchNorm
    elif change == "pruned":
        prune.l1_unstructured(convolution, "weight", 0.3)
        convolution.weight = convolution.weight.detach()  # as the first pass leaves it
    else:
        layer = norm if change == "own forward" else convolution
        plain = layer.forward
        layer.forward = lambda features: plain(features) + 1
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).position
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    torch.testing.assert_close(fast(images).position, expected, rtol=1e-5, atol=1e-5)


# In the last one a stage's first block has no downsample: its shortcut is what the stage reads.
@pytest.mark.parametrize("backbone", ["test_resnet", "resnet10t", "resnet18"])
@torch.no_grad()
def test_blocks_write_over_nothing_that_is_read_later(backbone: str) -> None:
    model = network(backbone)
    images = torch.randn(1, 3, 75, 91).to(memory_format=torch.channels_last)
    kept = images.clone()
    expected = model.backbone.body(images)
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    stages = fast.backbone.body(images)
    assert torch.equal(images, kept)
    for features, reference in zip(stages, expected, strict=True):
        torch.testing.assert_close(features, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["0", "0.last", "1"])
@torch.no_grad()
def test_later_hooks_keep_what_they_read(path: str) -> None:
    """What a block's hook is given does not change when the next block has run."""
    model = optimize_for_inference(network("resnet18"), bfloat16=False, compile_graph=False)
    stage = model.backbone.body.layer2
    read: list[Tensor] = []
    at_once: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read.append(inputs[0] if path == "1" else output)
        at_once.append(read[-1].clone())

    stage.get_submodule(path).register_forward_hook(keep)
    model.backbone(torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last))
    assert torch.equal(read[0], at_once[0])


@torch.no_grad()
def test_later_blocks_write_into_their_inputs() -> None:
    model = optimize_for_inference(network("resnet18"), bfloat16=False, compile_graph=False)
    first, second = model.backbone.body.layer2
    features = torch.randn(1, 64, 8, 9).to(memory_format=torch.channels_last)
    between = first(features)
    assert second(between).data_ptr() == between.data_ptr()


@torch.no_grad()
def test_wide_branches_reduce_the_features_in_one_layer() -> None:
    torch.manual_seed(0)
    model = danet.DANet(3, "resnet18", pretrained_backbone=False, head_channels=256).eval()
    hooked, with_hooked_branch = copy.deepcopy(model), copy.deepcopy(model)
    hooked.head.channel_branch.reduce.register_forward_hook(lambda *_: None)
    with_hooked_branch.head.position_branch.register_forward_pre_hook(lambda *_: None)
    images = torch.randn(1, 3, 40, 56)
    expected = model(images)
    for network, joined in ((model, True), (hooked, False), (with_hooked_branch, False)):
        fast = optimize_for_inference(network, bfloat16=False, compile_graph=False)
        assert (fast.head.joint_reduction is not None) == joined
        for branch in ("fused", "position", "channel"):
            actual = getattr(fast(images), branch)
            torch.testing.assert_close(actual, getattr(expected, branch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_that_timm_reads_by_hooks() -> None:
    model = network("xception41")
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).fused
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    torch.testing.assert_close(fast(images).fused, expected, rtol=1e-4, atol=1e-4)


def test_what_onednn_cannot_do_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = network("test_resnet")
    fast = optimize_for_inference(model, bfloat16=True, compile_graph=False)
    assert kinds(fast, ConvReLU2d) == kinds(fast, ResidualBlock) == 0
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(images).fused.isfinite().all()


@pytest.mark.slow
def test_compiled_it_gives_the_same_and_can_be_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, picture = network("test_resnet"), render(2, 5)[0].resize((80, 64))
    compiled, plain = (
        danet.Predictor(model, "cpu", "fp32", compile_graph=flag) for flag in (True, False)
    )
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        error = relative_error(compiled.model.fused_logits(images), model.fused_logits(images))
    assert error < 1e-5
    assert any(tmp_path.iterdir())
    found, expected = (danet.explain(one, picture, (20, 30)) for one in (compiled, plain))
    np.testing.assert_allclose(found.attention, expected.attention, rtol=1e-4, atol=1e-7)
