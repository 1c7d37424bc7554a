"""Which way a GPU takes, without one: tests/benchmarks runs and compiles our Triton kernels."""

from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from danet import functional, kernels
from danet.kernels import hopper, triton_attention
from danet.kernels.fused import fused_attention_fits
from danet.kernels.triton_attention import Problem


def fits(
    *,
    rule: Callable[..., bool] = hopper.hopper_kernels_fit,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    sizes: tuple[int, int, int, int, int] = (1, 9409, 9409, 64, 512),
    capability: tuple[int, int] = (9, 0),
) -> bool:
    batch, queries, keys, key_width, channels = sizes

    def stub(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        of = torch.device(device)
        return SimpleNamespace(shape=shape, device=of, dtype=dtype, numel=lambda: count)

    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.dict(hopper._state, usable=True),
    ):
        return rule(stub(batch, key_width, queries), stub(batch, channels, keys))


def test_half_precision_on_hopper_takes_the_kernels() -> None:
    assert fits()
    assert fits(dtype=torch.float16)
    assert fits(sizes=(2, 33, 20, 3, 7))


@pytest.mark.parametrize(
    "otherwise",
    [
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"sizes": (1, 9409, 9409, 65, 512)},
        {"sizes": (0, 9409, 9409, 64, 512)},
        {"sizes": (1, 9409, 9409, 64, 0)},
    ],
)
def test_everything_else_takes_another_way(otherwise: dict) -> None:
    assert not fits(**otherwise)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"capability": (8, 0)}, True),
        ({"capability": (9, 0), "sizes": (1, 9409, 9409, 128, 512)}, True),
        ({"capability": (12, 0), "dtype": torch.float16}, True),
        ({"capability": (7, 5)}, False),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"sizes": (1, 9409, 9409, 63, 512)}, False),
        ({"sizes": (1, 9409, 9409, 64, 510)}, False),
        ({"sizes": (1, 9409, 9409, 136, 512)}, False),
        ({"sizes": (0, 9409, 9409, 64, 512)}, False),
        ({"sizes": (1, 9409, 9409, 64, 0)}, False),
    ],
)
def test_torchs_fused_attention_is_taken_where_it_fits(given: dict, taken: bool) -> None:
    assert fits(rule=fused_attention_fits, **given) == taken
    with mock.patch.object(torch.version, "hip", "6.4"):
        assert not fits(rule=fused_attention_fits, **given)


@pytest.mark.parametrize(
    ("hopper_fits", "fused_fits", "way"),
    [
        (True, True, "attend"),
        (False, True, "attend_by_heads"),
        (True, False, "attend"),
        (False, False, "attend"),
    ],
)
def test_the_way_that_is_taken(
    hopper_fits: bool, fused_fits: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "hopper_kernels_fit", lambda *_: hopper_fits)
    monkeypatch.setattr(kernels, "fused_attention_fits", lambda *_: fused_fits)
    taken = []
    for name in ("attend", "attend_by_heads"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: taken.append(name) or (0, 0))
    kernels.position_attention(*(torch.zeros(1, 8, 8),) * 3)
    assert taken == [way]


@pytest.mark.parametrize("shape", [(65_536, 8, 4), (1, 512, 2**22)])
def test_what_exceeds_the_kernels_counters_takes_the_blocks(shape: tuple[int, ...]) -> None:
    with mock.patch.object(triton_attention, "forward") as called:
        large = torch.empty(shape, device="meta")
        assert hopper.run_hopper_kernels("forward", torch.empty(1, 8, 4), large) is None
        assert hopper.run_hopper_kernels("forward", torch.empty(1, 8, 4)) is called.return_value


@pytest.mark.parametrize(
    ("batch", "positions", "channels", "rows"),
    [(1, 9409, 512, 64), (1, 32768, 512, 128), (2, 9409, 512, 128), (32, 2704, 128, 128)],
)
def test_programs_are_small_where_there_are_few(
    batch: int, positions: int, channels: int, rows: int
) -> None:
    h200 = SimpleNamespace(multi_processor_count=132)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=h200):
        chosen = triton_attention.configurations(
            Problem(batch, positions, positions, 64, channels), torch.device("cuda")
        )
    assert chosen["forward"].rows == rows


def test_where_triton_does_not_run_the_blocks_do_and_it_is_said_once() -> None:
    inputs = [torch.randn(1, width, 9, requires_grad=True) for width in (4, 4, 8)]
    expected = functional.position_attention(*inputs)
    expected.sum().backward()
    gradients = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    failing = mock.patch.object(
        triton_attention, "forward", side_effect=RuntimeError("Failed to find C compiler\nx")
    )
    usable = mock.patch.dict(hopper._state, usable=True)
    with usable, failing as called:
        with mock.patch.object(
            kernels, "hopper_kernels_fit", side_effect=lambda *_: hopper._state["usable"]
        ):
            with pytest.warns(RuntimeWarning, match=r"\(Failed to find C compiler\), so"):
                output = functional.position_attention(*inputs)
            output.sum().backward()
            functional.position_attention(*inputs)
        assert called.call_count == 1
    torch.testing.assert_close(output, expected)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
