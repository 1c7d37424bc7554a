import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from danet import winograd
from danet.winograd import WinogradConv2d


def convolution(dilation: int = 1, bias: bool = True, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 7, 3, padding=dilation, dilation=dilation, bias=bias, **options).double()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(1, 13), st.integers(1, 13), st.integers(1, 4), st.booleans())
@torch.no_grad()
def test_it_is_the_convolution(
    batch: int, height: int, width: int, dilation: int, bias: bool
) -> None:
    direct = convolution(dilation, bias)
    features = torch.randn(batch, 5, height, width, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(direct)(features), direct(features))


@torch.no_grad()
def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_STRIP_ELEMENTS", 16 * 5 * 8 * 3)  # three rows of tiles
    direct = convolution()
    features = torch.randn(1, 5, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(direct)(features), direct(features))


@torch.no_grad()
def test_float32_rounds_little() -> None:
    torch.manual_seed(0)
    direct = nn.Conv2d(256, 256, 3, padding=1)
    features = torch.randn(1, 256, 20, 20).relu()
    exact = copy.deepcopy(direct).double()(features.double())
    error = (WinogradConv2d(direct)(features) - exact).abs().max() / exact.abs().max()
    assert error < 3e-6


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"kernel_size": 1, "padding": 0},
        {"padding": 0},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"dilation": (1, 2), "padding": (1, 2)},
    ],
)
def test_other_convolutions_are_left_alone(options: dict[str, object]) -> None:
    settings = {"kernel_size": 3, "padding": 1, **options}
    assert not winograd.pays(nn.Conv2d(256, 256, **settings))
    assert winograd.pays(nn.Conv2d(256, 256, 3, padding=1))
    assert not winograd.pays(nn.Conv2d(8, 256, 3, padding=1))
