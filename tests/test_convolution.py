import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import danet
from danet.convolution import ConvReLU2d, ResidualBlock, WideStridedConv2d, can_rectify
from danet.optimize import optimize_for_inference
from danet.winograd import WinogradConv2d

LAYERS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": (3, 5), "padding": (1, 2), "stride": (1, 2), "groups": 4},
]


def exact(layer: nn.Conv2d, features: Tensor, shortcut: Tensor | None) -> Tensor:
    convolved = copy.deepcopy(layer).double()(features.double())
    return convolved.add(0 if shortcut is None else shortcut.double()).clamp(min=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("size", [(9, 15), (4, 9), (1, 1)])
@torch.no_grad()
def test_one_pass_is_convolution_sum_and_relu(
    size: tuple[int, int], options: dict, with_shortcut: bool, dtype: torch.dtype, atol: float
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 48, **options).to(dtype)
    features = torch.randn(2, 32, *size, dtype=dtype)
    shortcut = torch.randn(layer(features).shape, dtype=dtype) if with_shortcut else None
    expected = exact(layer, features, shortcut)
    kept = None if shortcut is None else shortcut.clone()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = features.to(memory_format=memory_format)
        result = ConvReLU2d(layer)(given, shortcut)
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=atol
        )
    assert shortcut is None or torch.equal(shortcut, kept), "another layer may read it too"


@torch.no_grad()
def test_inputs_are_brought_to_the_weights_dtype() -> None:
    layer = nn.Conv2d(16, 16, 1).bfloat16()
    features, shortcut = torch.randn(2, 1, 16, 4, 4)
    result = ConvReLU2d(layer)(features, shortcut)
    assert torch.equal(result, ConvReLU2d(layer)(features.bfloat16(), shortcut.bfloat16()))


def network(backbone: str, **options) -> danet.DANet:
    """With batch statistics away from their start."""
    torch.manual_seed(0)
    model = danet.DANet(5, backbone, pretrained_backbone=False, head_channels=32, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


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
    for branch, reference in zip(fast(images), expected, strict=True):
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


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding_mode": "reflect"}])
def test_convolutions_that_onednn_pads_otherwise_are_left_alone(options: dict) -> None:
    assert not can_rectify(nn.Conv2d(4, 4, 3, **options), torch.float32)
    assert not can_rectify(nn.ConvTranspose2d(4, 4, 3), torch.float32)


@pytest.mark.parametrize(
    "path",
    ["backbone.body.conv1", "backbone.body.bn1", "backbone.body.act1", "backbone.body.layer3.0"]
    + [f"backbone.body.layer3.0.{name}" for name in ("conv2", "act2", "act3", "conv3")],
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


def test_layers_with_hooks_before_them_are_called_themselves() -> None:
    layer = nn.Conv2d(4, 4, 1)
    assert can_rectify(layer, torch.float32)
    layer.register_forward_pre_hook(lambda _, inputs: inputs)
    assert not can_rectify(layer, torch.float32)


@pytest.mark.parametrize(
    "replace", [ConvReLU2d, WinogradConv2d, lambda layer: WideStridedConv2d(layer, layer)]
)
def test_geometry_can_be_asked_for(replace: Callable[[nn.Conv2d], nn.Module]) -> None:
    """As timm's davit does."""
    layer = nn.Conv2d(4, 6, 3, padding=2, dilation=2)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    replaced = replace(layer)
    assert [getattr(replaced, name) for name in names] == [getattr(layer, name) for name in names]


@torch.no_grad()
def test_features_that_timm_reads_by_hooks() -> None:
    model = network("xception41")
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).fused
    fast = optimize_for_inference(model, bfloat16=False, compile_graph=False)
    torch.testing.assert_close(fast(images).fused, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dilation", [1, 3])
@torch.no_grad()
def test_winograd_rectifies_every_strip(monkeypatch: pytest.MonkeyPatch, dilation: int) -> None:
    monkeypatch.setattr("danet.winograd._STRIP_ELEMENTS", 1)
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation)
    features = torch.randn(2, 8, 13, 10)
    result = WinogradConv2d(layer, rectify=True)(features)
    torch.testing.assert_close(result, layer(features).relu(), rtol=1e-5, atol=1e-5)


def test_what_onednn_cannot_do_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = network("test_resnet")
    fast = optimize_for_inference(model, bfloat16=True, compile_graph=False)
    assert kinds(fast, ConvReLU2d) == kinds(fast, ResidualBlock) == 0
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(images).fused.isfinite().all()
