import copy
import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from danet import winograd
from danet.kernels.memory import MemoryPool
from danet.winograd import TiledConvolution, WinogradConv2d, convolve
from danet.winograd.transforms import FourByFour, TwoByTwo


def convolution(dilation: int = 1, bias: bool = True, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 7, 3, padding=dilation, dilation=dilation, bias=bias, **options).double()


@pytest.fixture(params=[FourByFour, TwoByTwo])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 takes the one, and then the other."""
    monkeypatch.setattr("danet.winograd.tiles.FourByFour", request.param)


@pytest.mark.usefixtures("either")
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 2), st.integers(1, 13), st.integers(1, 13), st.integers(1, 4), st.booleans())
@torch.no_grad()
def test_it_is_the_convolution(
    batch: int, height: int, width: int, dilation: int, bias: bool
) -> None:
    direct = convolution(dilation, bias)
    features = torch.randn(batch, 5, height, width, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(direct)(features), direct(features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_small_features_of_a_large_dilation_are_done_directly(dtype: torch.dtype) -> None:
    """24x24 at dilation 16 have phases of 1 or 2 pixels, 96x96 of 6x6."""
    exact = convolution(16)
    fast = WinogradConv2d(exact.float(), dtype, rectify=True)
    direct = convolution(16).to(dtype)
    for side, same in ((24, True), (96, False)):
        features = torch.randn(1, 5, side, side).to(dtype).to(memory_format=torch.channels_last)
        expected = direct(features).relu()
        found = fast(features)
        assert torch.equal(found, expected) == same
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert WinogradConv2d(convolution(4).float(), dtype).direct is None


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row of tiles."""
    monkeypatch.setattr("danet.winograd.tiles._STRIP_ELEMENTS", 1)
    monkeypatch.setattr("danet.winograd.tiles._LEAST_TILES", 1)


Gradients = tuple[torch.Tensor, torch.Tensor]


def gradients(features: torch.Tensor, weight: torch.Tensor, dilation: int, way: str) -> Gradients:
    """Of features and weight, for the same random gradient of the output."""
    given = (features.detach().requires_grad_(), weight.detach().requires_grad_())
    if way == "direct":
        padding = dilation
        output = nn.functional.conv2d(
            given[0], given[1].to(features.dtype), None, 1, padding, dilation
        )
    else:
        output = convolve(*given, TiledConvolution(features.dtype, dilation, MemoryPool()))
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad(output, given, grad)


@pytest.mark.usefixtures("either")
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 2), st.integers(1, 13), st.integers(1, 13), st.integers(1, 4))
def test_its_gradients_are_the_convolutions(
    batch: int, height: int, width: int, dilation: int
) -> None:
    torch.manual_seed(0)
    features = torch.randn(batch, 5, height, width, dtype=torch.float64)
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(
        gradients(features, weight, dilation, "winograd"),
        gradients(features, weight, dilation, "direct"),
    )


@pytest.mark.parametrize(("batch", "least_tiles"), [(1, 1), (1, 24), (3, 16)])
@pytest.mark.usefixtures("either", "small_strips")
def test_strips_and_pieces_change_no_gradient(
    batch: int, least_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danet.winograd.tiles._LEAST_TILES", least_tiles)
    monkeypatch.setattr("danet.winograd.tiles._GRADIENT_CHANNELS", 2)
    torch.manual_seed(0)
    features = torch.randn(batch, 5, 21, 16, dtype=torch.float64)
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(
        gradients(features, weight, 1, "winograd"), gradients(features, weight, 1, "direct")
    )


def test_tiles_are_counted_as_they_are_cut() -> None:
    for dtype, dilation, size in product((torch.float32, torch.bfloat16), (1, 3, 8), (1, 10, 17)):
        tiled = TiledConvolution(dtype, dilation, MemoryPool())
        picture = torch.empty(2, size, size + 3, 1)
        cut = sum(math.prod(strip.tiles) for strip in tiled._strips(picture, picture, 1))
        assert tiled.tiles(2, size, size + 3) == cut


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 4e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_gradients_round_little(dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 256, 20, 24).relu().to(dtype)
    weight = torch.randn(64, 256, 3, 3)
    exact = gradients(features.double(), weight.double(), 2, "direct")
    found = gradients(features, weight, 2, "winograd")
    assert [each.dtype for each in found] == [dtype, torch.float32]
    for ours, expected in zip(found, exact, strict=True):
        assert (ours - expected).norm() < most * expected.norm()


# Of one row of tiles, of several rows, and of two of three pictures.
@pytest.mark.parametrize(("batch", "least_tiles"), [(1, 1), (1, 24), (3, 16)])
@pytest.mark.usefixtures("either", "small_strips")
@torch.no_grad()
def test_strips_change_nothing(
    batch: int, least_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danet.winograd.tiles._LEAST_TILES", least_tiles)
    direct = convolution()
    features = torch.randn(batch, 5, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(direct)(features), direct(features))


@torch.no_grad()
def test_float32_rounds_little() -> None:
    torch.manual_seed(0)
    direct = nn.Conv2d(256, 256, 3, padding=1)
    features = torch.randn(1, 256, 20, 20).relu()
    exact = copy.deepcopy(direct).double()(features.double())
    error = (WinogradConv2d(direct)(features) - exact).abs().max() / exact.abs().max()
    assert error < 3e-6


@torch.no_grad()
def test_bfloat16_rounds_about_twice_as_much() -> None:
    torch.manual_seed(0)
    direct = nn.Conv2d(512, 64, 3, padding=2, dilation=2)
    features = torch.randn(1, 512, 20, 24).relu().bfloat16()
    exact = direct(features.float())
    error = lambda output: (output.float() - exact).norm() / exact.norm()  # noqa: E731
    layer = WinogradConv2d(direct, torch.bfloat16)
    fast = layer(features)
    assert fast.dtype == torch.bfloat16
    assert torch.equal(layer(features.float()), fast)
    assert error(fast) < 3 * error(copy.deepcopy(direct).bfloat16()(features))


@pytest.mark.parametrize(("amx", "pays"), [(False, True), (True, False)])
def test_bfloat16_goes_this_way_where_products_are_dear(
    monkeypatch: pytest.MonkeyPatch, amx: bool, pays: bool
) -> None:
    monkeypatch.setattr("danet.winograd.layer.has_amx", lambda: amx)
    assert winograd.pays(nn.Conv2d(512, 512, 3, padding=1), torch.bfloat16) == pays
    assert not winograd.pays(nn.Conv2d(256, 512, 3, padding=1), torch.bfloat16)
    assert winograd.pays(nn.Conv2d(256, 512, 3, padding=1), torch.float32)


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


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.usefixtures("small_strips")
@torch.no_grad()
def test_winograd_rectifies_every_strip(dilation: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation)
    features = torch.randn(2, 8, 13, 10)
    result = WinogradConv2d(layer, rectify=True)(features)
    torch.testing.assert_close(result, layer(features).relu(), rtol=1e-5, atol=1e-5)


def test_layers_with_hooks_are_left_alone() -> None:
    layer = nn.Conv2d(512, 512, 3, padding=1)
    layer.register_forward_hook(lambda _module, _inputs, output: output)
    assert not winograd.pays(layer, torch.float32)
