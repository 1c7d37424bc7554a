import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from danet.convolution import ConvReLU2d, WideStridedConv2d, can_rectify
from danet.kernels.cpu import onednn_has_bfloat16
from danet.winograd import WinogradConv2d

ATOL = {torch.float32: 1e-5}
if onednn_has_bfloat16():
    ATOL[torch.bfloat16] = 0.02
LAYERS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": (3, 5), "padding": (1, 2), "stride": (1, 2), "groups": 4},
]


def exact(layer: nn.Conv2d, features: Tensor, shortcut: Tensor | None) -> Tensor:
    convolved = copy.deepcopy(layer).double()(features.double())
    return convolved.add(0 if shortcut is None else shortcut.double()).clamp(min=0)


@pytest.mark.parametrize(("dtype", "atol"), ATOL.items())
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


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("options", LAYERS)
@torch.no_grad()
def test_in_the_shortcuts_memory_it_is_the_same(options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 48, **options).to(dtype)
    features = torch.randn(2, 32, 9, 15).to(dtype, memory_format=torch.channels_last)
    shortcut = torch.randn_like(layer(features), memory_format=torch.channels_last)
    of_both_orders = (shortcut, shortcut.contiguous())
    expected = ConvReLU2d(layer)(features, shortcut)
    for given in of_both_orders:
        result = ConvReLU2d(layer)(features, given.clone(), in_place=True)
        torch.testing.assert_close(result, expected)
    if layer.groups == 1:
        result = ConvReLU2d(layer)(features, shortcut, in_place=True)
        assert result.data_ptr() == shortcut.data_ptr()


@torch.no_grad()
def test_inputs_are_brought_to_the_weights_dtype() -> None:
    layer = nn.Conv2d(16, 16, 1).bfloat16()
    features, shortcut = torch.randn(2, 1, 16, 4, 4)
    result = ConvReLU2d(layer)(features, shortcut)
    assert torch.equal(result, ConvReLU2d(layer)(features.bfloat16(), shortcut.bfloat16()))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding_mode": "reflect"}])
def test_convolutions_that_onednn_pads_otherwise_are_left_alone(options: dict) -> None:
    assert not can_rectify(nn.Conv2d(4, 4, 3, **options), torch.float32)
    assert not can_rectify(nn.ConvTranspose2d(4, 4, 3), torch.float32)


def test_layers_with_hooks_before_them_are_called_themselves() -> None:
    layer = nn.Conv2d(4, 4, 1)
    assert can_rectify(layer, torch.float32)
    layer.register_forward_pre_hook(lambda _, inputs: inputs)
    assert not can_rectify(layer, torch.float32)


@pytest.mark.parametrize("replace", [ConvReLU2d, WinogradConv2d, WideStridedConv2d])
def test_geometry_can_be_asked_for(replace: Callable[[nn.Conv2d], nn.Module]) -> None:
    """As timm's davit does."""
    layer = nn.Conv2d(4, 6, 3, padding=2, dilation=2)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    replaced = replace(layer)
    assert [getattr(replaced, name) for name in names] == [getattr(layer, name) for name in names]
