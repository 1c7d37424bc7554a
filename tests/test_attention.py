import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import danet
import oracle
from danet import kernels
from danet.attention import channel_affinities
from danet.functional import channel_attention, position_attention
from danet.kernels import amx, blocks
from danet.kernels.blocks import BlockShape
from danet.kernels.fused import attend_by_heads, attend_spread

BLOCKS_FORWARD = blocks.forward
TOLERANCE = 5e-6
AFFINITIES = ("reference", "paper")


def random_inputs(
    batch: int = 2, width: int = 8, queries: int = 37, keys: int = 37, channels: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, width, queries), (batch, width, keys), (batch, channels, keys))
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return query, key, value


def relative_error(actual: Tensor, expected: np.ndarray | Tensor) -> float:
    expected = torch.as_tensor(expected)
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(
    params=[BlockShape(16, 1000), BlockShape(16, 7), BlockShape(60, 100)],
    ids=["rows", "tiles", "samples"],
)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Blocks so small that small inputs span several and end in a part of one, or hold samples."""
    monkeypatch.setattr(blocks, "block_shape", lambda *_: request.param)
    monkeypatch.setattr(amx, "has_amx", lambda: False)


@pytest.mark.usefixtures("small_blocks")
class TestPositionAttention:
    @pytest.mark.parametrize(("queries", "keys"), [(37, 37), (50, 21), (1, 40), (33, 1)])
    def test_values_and_gradients_match_the_loops(self, queries: int, keys: int) -> None:
        exact = random_inputs(queries=queries, keys=keys)
        inputs = [tensor.float().requires_grad_() for tensor in exact]
        output = position_attention(*inputs)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        output.backward(grad)
        samples = [[tensor[sample].numpy() for tensor in exact] for sample in range(2)]
        expected = np.stack([oracle.position_attention(*arrays) for arrays in samples])
        assert relative_error(output.detach(), expected) < TOLERANCE
        gradients = zip(
            *(
                oracle.position_attention_gradients(*arrays, grad_CN.double().numpy())
                for arrays, grad_CN in zip(samples, grad, strict=True)
            ),
            strict=True,
        )
        for tensor, gradient in zip(inputs, gradients, strict=True):
            if keys == 1 and tensor is not inputs[2]:  # one key: weights are constant
                assert tensor.grad.abs().max() < 1e-5
            else:
                assert relative_error(tensor.grad, np.stack(gradient)) < TOLERANCE

    def test_gradients_match_finite_differences(self) -> None:
        inputs = [tensor.requires_grad_() for tensor in random_inputs(queries=9, keys=20)]
        assert torch.autograd.gradcheck(position_attention, inputs)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
    )
    @pytest.mark.parametrize("fast_bfloat16", [True, False])
    def test_half_precision(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        tolerance: float,
        fast_bfloat16: bool,
    ) -> None:
        monkeypatch.setattr(blocks, "multiplies_bfloat16_fast", lambda: fast_bfloat16)
        exact = [tensor.to(dtype).double() for tensor in random_inputs()]
        expected_inputs = [tensor.clone().requires_grad_() for tensor in exact]
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        expected, output = position_attention(*expected_inputs), position_attention(*inputs)
        assert output.dtype == dtype
        assert relative_error(output, expected) < tolerance
        expected.sum().backward()
        output.sum().backward()
        for tensor, reference in zip(inputs, expected_inputs, strict=True):
            assert tensor.grad.dtype == dtype
            assert (tensor.grad.double() - reference.grad).abs().max() < 0.1

    def test_large_scores_do_not_overflow(self) -> None:
        query, key, value = (tensor.float() for tensor in random_inputs())
        query = (query * 1e4).requires_grad_()
        output = position_attention(query, key * 1e4, value)
        nearest = torch.einsum("bdn,bdm->bnm", query, key).argmax(-1)
        expected = torch.stack([v[:, i] for v, i in zip(value, nearest, strict=True)])
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert query.grad.isfinite().all()

    def test_huge_scores_give_finite_gradients(self) -> None:
        """Rounding makes scores of 1e15 differ by millions from their log-sum-exp."""
        inputs = [tensor.float().requires_grad_() for tensor in random_inputs()]
        position_attention(inputs[0] * 1e8, inputs[1] * 1e7, inputs[2]).sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in inputs)

    def test_equal_keys_give_the_mean(self) -> None:
        query, key, value = random_inputs()
        output = position_attention(query, torch.zeros_like(key), value)
        torch.testing.assert_close(output, value.mean(-1, keepdim=True).expand_as(output))

    @settings(max_examples=25, deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 40), st.integers(1, 40))
    def test_order_of_keys_does_not_matter(self, random, queries: int, keys: int) -> None:
        query, key, value = random_inputs(queries=queries, keys=keys)
        order = list(range(keys))
        random.shuffle(order)
        torch.testing.assert_close(
            position_attention(query, key[..., order], value[..., order]),
            position_attention(query, key, value),
        )

    def test_same_input_gives_the_same_bits(self) -> None:
        def gradients() -> list[Tensor]:
            inputs = [tensor.float().requires_grad_() for tensor in random_inputs()]
            output = position_attention(*inputs)
            output.square().sum().backward()
            return [output, *(tensor.grad for tensor in inputs)]

        for first, second in zip(gradients(), gradients(), strict=True):
            assert torch.equal(first, second)

    def test_any_memory_layout(self) -> None:
        query, key, value = random_inputs()
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
        torch.testing.assert_close(
            position_attention(*strided), position_attention(query, key, value)
        )

    def test_autocast_chooses_the_dtype(self) -> None:
        inputs = [tensor.float() for tensor in random_inputs()]
        with torch.autocast("cpu", torch.bfloat16):
            assert position_attention(*inputs).dtype == torch.bfloat16

    def test_autocast_leaves_float64_alone(self) -> None:
        inputs = random_inputs()
        with torch.autocast("cpu", torch.bfloat16):
            found = position_attention(*inputs)
        assert torch.equal(found, position_attention(*inputs))

    def test_autocast_does_not_reach_the_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # As on a CPU whose bfloat16 products are slow: then these are to be in float32.
        monkeypatch.setattr(blocks, "_product_dtype", lambda *_: torch.float32)
        inputs = [tensor.bfloat16().requires_grad_() for tensor in random_inputs()]

        def pass_through() -> list[Tensor]:
            output = position_attention(*inputs)
            return [output, *torch.autograd.grad(output.square().sum(), inputs)]

        with torch.autocast("cpu", torch.bfloat16):
            found = pass_through()
        assert all(map(torch.equal, found, pass_through()))

    def test_without_queries_nothing_flows_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fill = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(*a, **k).fill_(7))
        inputs = [tensor.requires_grad_() for tensor in random_inputs(queries=0)]
        output = position_attention(*inputs)
        assert output.shape == (2, 24, 0)
        for gradient in torch.autograd.grad(output.sum(), inputs):
            assert not gradient.any()

    def test_the_operator_keeps_torchs_contracts(self) -> None:
        inputs = [tensor.float().requires_grad_() for tensor in random_inputs(queries=18, keys=7)]
        torch.library.opcheck(kernels.attend, inputs)

    @pytest.mark.parametrize("channels", [24, 200, 256, 1048, 7])
    def test_values_spread_over_heads_change_nothing(self, channels: int) -> None:
        inputs = random_inputs(channels=channels)
        torch.testing.assert_close(
            attend_by_heads(*inputs, backends=[SDPBackend.MATH]), position_attention(*inputs)
        )

    def test_operations_are_counted(self) -> None:
        query, key, value = (t.requires_grad_() for t in random_inputs(2, 8, 37, 21, 24))
        with FlopCounterMode(display=False) as counter:
            output = position_attention(query, key, value)
            forward = counter.get_total_flops()
            output.sum().backward()
        assert forward == 2 * 2 * 37 * 21 * (8 + 24)
        # Scores once more, and a product for each of dV, dP, dQ and dK.
        assert counter.get_total_flops() - forward == 2 * 2 * 37 * 21 * (3 * 8 + 2 * 24)

    @pytest.mark.slow
    def test_compiles_into_one_graph(self) -> None:
        compiled = torch.compile(position_attention, fullgraph=True)
        inputs = [tensor.float() for tensor in random_inputs()]
        torch.testing.assert_close(compiled(*inputs), position_attention(*inputs))

    def test_traces_into_one_graph_under_autocast(self) -> None:
        """A graph that breaks is slow, and with torch 2.11 was compiled anew in every call.

        Newer compilers trace what that one could not, so `.ci/lowest` is where this matters.
        """
        features = torch.randn(1, 16, 6, 5)
        for module in (danet.PositionAttention(16), danet.ChannelAttention()):
            module.requires_grad_(False).residual_weight.fill_(1)
            traced = torch.compile(module, backend="eager", fullgraph=True)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(traced(features), module(features))

    def test_exports_with_free_sizes(self) -> None:
        module = danet.PositionAttention(16).eval()
        sides = {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
        exported = torch.export.export(
            module, (torch.randn(1, 16, 8, 6),), dynamic_shapes={"features": sides}
        )
        features = torch.randn(1, 16, 5, 11)
        torch.testing.assert_close(exported.module()(features), module(features))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda q, k, v: (q[0], k[0], v[0]), "takes B D N"),
            (lambda q, k, v: (q, k[:, :3], v), "key width"),
            (lambda q, k, v: (q, k, v[..., :5]), "differ"),
            (lambda q, k, v: (q, k[..., :0], v[..., :0]), "no positions"),
            (lambda q, k, v: (q, k, v.half()), "one floating dtype"),
            (lambda q, k, v: (q.long(), k.long(), v.long()), "one floating dtype"),
        ],
    )
    def test_wrong_inputs_are_named(self, change, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            position_attention(*change(*random_inputs()))


class TestKernelForAMX:
    """On other CPUs it computes the same, more slowly."""

    @pytest.fixture(autouse=True)
    def with_amx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(amx, "has_amx", lambda: True)
        monkeypatch.setattr(blocks, "forward", None)

    @pytest.mark.parametrize("channels_last", [True, False])
    @pytest.mark.parametrize(
        ("batch", "width", "queries", "keys", "channels"),
        [(2, 8, 37, 37, 24), (1, 8, 1, 40, 32), (3, 16, 33, 1, 16), (1, 3, 70, 515, 65)],
    )
    def test_values_and_sums_match_the_loops(
        self, batch: int, width: int, queries: int, keys: int, channels: int, channels_last: bool
    ) -> None:
        inputs = [
            tensor.bfloat16() for tensor in random_inputs(batch, width, queries, keys, channels)
        ]
        if channels_last:
            inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
        query, key, value = (tensor.double() for tensor in inputs)
        output, logsumexp = kernels.attend(*inputs)
        expected = [
            oracle.position_attention(*(tensor[sample].numpy() for tensor in (query, key, value)))
            for sample in range(batch)
        ]
        assert output.dtype == torch.bfloat16
        assert relative_error(output, np.stack(expected)) < 1e-2
        scores = query.transpose(1, 2) @ key
        torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)

    def test_gradients_go_on_from_its_sums(self) -> None:
        exact = [tensor.bfloat16().double().requires_grad_() for tensor in random_inputs()]
        inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
        position_attention(*inputs).square().sum().backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "forward", BLOCKS_FORWARD)
            position_attention(*exact).square().sum().backward()
        for tensor, reference in zip(inputs, exact, strict=True):
            assert relative_error(tensor.grad, reference.grad) < 3e-2

    def test_huge_scores_select_the_nearest(self) -> None:
        query, key, value = (tensor.bfloat16() for tensor in random_inputs())
        output = position_attention(query * 1e8, key * 1e7, value)
        nearest = torch.einsum("bdn,bdm->bnm", query.double(), key.double()).argmax(-1)
        expected = torch.stack([v[:, i] for v, i in zip(value, nearest, strict=True)])
        torch.testing.assert_close(output, expected)

    @pytest.mark.parametrize(
        "inputs",
        [
            random_inputs(),
            [tensor.half() for tensor in random_inputs()],
            [tensor.bfloat16() for tensor in random_inputs(channels=7)],
            [tensor.bfloat16() for tensor in random_inputs(queries=0)],
        ],
        ids=["float64", "float16", "value narrower than key", "no queries"],
    )
    def test_other_inputs_take_blocks(self, inputs: list[Tensor]) -> None:
        assert not amx.fits(inputs[0], inputs[2])


def test_memory_grows_with_positions_not_with_their_square() -> None:
    """12288 positions, forward and backward, beside 0.6 GB that a float32 N x N matrix takes."""
    script = """
import resource, torch
from danet.functional import position_attention
n = 12288
def step(n):
    inputs = [torch.randn(1, c, n, dtype=torch.bfloat16, requires_grad=True) for c in (64, 64, 512)]
    position_attention(*inputs).sum().backward()
step(512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) * 1024 < 12288**2 * 4 / 2


def test_forward_mode_derivatives() -> None:
    inputs = random_inputs(keys=29)
    tangents = tuple(tensor.flip(2) for tensor in inputs)
    _, found = torch.func.jvp(position_attention, inputs, tangents)
    step = 1e-6
    ahead, behind = (
        position_attention(*(x + sign * step * dx for x, dx in zip(inputs, tangents, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_far_apart_scores_give_no_denormal_weights() -> None:
    """Which CPUs multiply slowly. Where each key is a channel of the value, output is weights."""
    query, key, _ = (tensor.float() for tensor in random_inputs())
    value = torch.eye(key.shape[-1]).expand(2, -1, -1)
    weights = position_attention(query * 30, key * 10, value)
    exact = ((query * 30).double().transpose(1, 2) @ (key * 10).double()).softmax(-1)
    assert (exact < torch.finfo(torch.float32).tiny).any()
    assert (weights > torch.finfo(torch.float32).tiny).all()
    torch.testing.assert_close(weights.mT.double(), exact, rtol=1e-3, atol=1e-18)


class TestChannelAttention:
    @pytest.mark.parametrize("affinity", AFFINITIES)
    def test_values_and_gradients_match_the_loops(self, affinity: str) -> None:
        exact = torch.randn(2, 10, 33, generator=torch.Generator().manual_seed(0)).double() / 3
        features = exact.float().requires_grad_()
        output = channel_attention(features, affinity)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        output.backward(grad)
        for sample in range(2):
            array = exact[sample].numpy()
            expected = oracle.channel_attention(array, affinity)
            assert relative_error(output[sample].detach(), expected) < TOLERANCE
            gradient = oracle.channel_attention_gradient(
                array, affinity, grad[sample].double().numpy()
            )
            assert relative_error(features.grad[sample], gradient) < TOLERANCE

    def test_the_affinities_prefer_opposite_channels(self) -> None:
        """Channel 0 and 1 agree, 2 opposes them; hand arithmetic on one position."""
        features = torch.tensor([[[3.0], [3.0], [-3.0]]])
        paper = channel_attention(features, "paper")
        reference = channel_attention(features, "reference")
        assert paper[0, 0, 0] == pytest.approx(3.0, abs=1e-6)
        assert reference[0, 0, 0] == pytest.approx(-3.0, abs=1e-6)

    @pytest.mark.parametrize("affinity", AFFINITIES)
    def test_large_energies_do_not_overflow(self, affinity: str) -> None:
        features = torch.randn(1, 6, 4096).mul(1e3).requires_grad_()
        output = channel_attention(features, affinity)
        output.sum().backward()
        assert output.isfinite().all()
        assert features.grad.isfinite().all()

    @pytest.mark.parametrize("affinity", AFFINITIES)
    def test_far_apart_energies_give_no_denormal_weights(self, affinity: str) -> None:
        features = torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(0)) * 2
        weights = channel_affinities(features, affinity)
        exact = channel_affinities(features.double(), affinity)
        assert (exact < torch.finfo(torch.float32).tiny).any()
        assert (weights > torch.finfo(torch.float32).tiny).all()
        torch.testing.assert_close(weights.double(), exact, rtol=1e-3, atol=1e-18)

    def test_half_precision_energies_are_summed_in_float32(self) -> None:
        features = torch.randn(1, 8, 5000, generator=torch.Generator().manual_seed(0)).half()
        expected = channel_attention(features.double(), "paper")
        assert relative_error(channel_attention(features, "paper"), expected) < 2e-3

    @settings(max_examples=20, deadline=None)
    @given(st.permutations(range(7)), st.sampled_from(AFFINITIES))
    def test_commutes_with_permuting_channels(self, order: list[int], affinity: str) -> None:
        features = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(2)).double()
        torch.testing.assert_close(
            channel_attention(features[:, order], affinity),
            channel_attention(features, affinity)[:, order],
        )

    def test_wrong_inputs_are_named(self) -> None:
        with pytest.raises(ValueError, match="affinity"):
            channel_attention(torch.randn(1, 2, 3), "cosine")
        with pytest.raises(ValueError, match="B C N"):
            channel_attention(torch.randn(2, 3))
        with pytest.raises(ValueError, match="affinity"):
            danet.ChannelAttention("cosine")
        for module in (danet.ChannelAttention(), danet.PositionAttention(8, 8)):
            with pytest.raises(ValueError, match="B C H W"):
                module(torch.randn(8, 5, 5))


@pytest.mark.parametrize("module", [danet.PositionAttention(16), danet.ChannelAttention("paper")])
class TestModules:
    def test_start_as_the_identity(self, module: torch.nn.Module) -> None:
        features = torch.randn(2, 16, 5, 7)
        assert module.residual_weight.item() == 0
        torch.testing.assert_close(module(features), features)

    def test_the_residual_weight_learns(self, module: torch.nn.Module) -> None:
        module.zero_grad()
        module(torch.randn(2, 16, 5, 7)).square().sum().backward()
        assert module.residual_weight.grad.abs().item() > 0

    def test_keep_half_precision(self, module: torch.nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(torch.randn(1, 16, 4, 4).bfloat16())
        assert output.dtype == torch.bfloat16


def with_residual_weight(module: torch.nn.Module, weight: float) -> torch.nn.Module:
    torch.nn.init.constant_(module.residual_weight, weight)
    return module


def test_position_module_is_equation_2() -> None:
    torch.manual_seed(0)
    module = with_residual_weight(danet.PositionAttention(16, key_channels=4).double(), 0.7)
    features = torch.randn(1, 16, 4, 5, dtype=torch.float64)
    a = features[0].flatten(1).numpy()

    def project(conv: torch.nn.Conv2d) -> np.ndarray:
        weight, bias = conv.weight.detach().numpy()[..., 0, 0], conv.bias.detach().numpy()
        return weight @ a + bias[:, None]

    b, c, d = project(module.query), project(module.key), project(module.value)
    expected = 0.7 * oracle.position_attention(b, c, d) + a
    torch.testing.assert_close(
        module(features)[0].flatten(1).detach(), torch.from_numpy(expected), rtol=1e-10, atol=1e-10
    )


def test_position_module_commutes_with_permuting_pixels() -> None:
    module = with_residual_weight(danet.PositionAttention(16), 0.5)
    features, order = torch.randn(1, 16, 1, 30), torch.randperm(30)
    torch.testing.assert_close(module(features[..., order]), module(features)[..., order])


@pytest.mark.parametrize("module", [danet.PositionAttention(16), danet.ChannelAttention()])
def test_modules_reset_all_that_they_own(module: torch.nn.Module) -> None:
    """As FSDP asks of modules that were built without data."""
    emptied = module.to("meta").to_empty(device="cpu")
    for parameter in emptied.parameters():  # whatever was in that memory
        torch.nn.init.constant_(parameter, torch.nan)
    for part in emptied.modules():
        if any(True for _ in part.parameters(recurse=False)):
            part.reset_parameters()
    features = torch.randn(1, 16, 3, 4)
    assert torch.equal(emptied(features), features)


def test_key_width_defaults_to_an_eighth() -> None:
    assert danet.PositionAttention(64).query.out_channels == 8
    assert danet.PositionAttention(4).query.out_channels == 1
    assert danet.PositionAttention(64, key_channels=64).key.out_channels == 64


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("build", [lambda: danet.PositionAttention(8), danet.ChannelAttention])
def test_modules_keep_the_memory_format(
    build: Callable[[], torch.nn.Module], memory_format: torch.memory_format
) -> None:
    features = torch.randn(2, 8, 5, 7).contiguous(memory_format=memory_format)
    assert build()(features).is_contiguous(memory_format=memory_format)


def test_channel_attention_of_channels_last_features_is_channels_last() -> None:
    features = torch.randn(2, 8, 5, 7)
    last = features.contiguous(memory_format=torch.channels_last).flatten(2)
    result = channel_attention(last)
    torch.testing.assert_close(result, channel_attention(features.flatten(2)))
    assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("intel", "avx2"), [(True, False), (False, True)])
def test_blocks_are_smaller_where_the_last_cache_is_slow(
    intel: bool, avx2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest(device: str) -> int:
        """The most scores that exist at a time, of rows of any length."""
        shapes = {n: blocks.block_shape(n, torch.device(device)) for n in range(256, 32_768, 256)}
        return max(shape.rows * min(n, shape.columns) for n, shape in shapes.items())

    def processor(*, intel: bool, avx2: bool) -> None:
        monkeypatch.setattr(blocks, "is_intel", lambda: intel)
        monkeypatch.setattr(blocks, "has_avx2_alone", lambda: avx2)

    processor(intel=False, avx2=False)
    with_fast_cache = largest("cpu")
    processor(intel=intel, avx2=avx2)
    assert largest("cpu") < with_fast_cache < largest("meta")


@pytest.mark.parametrize("channels", [(0, None), (16, 0), (16, -1)])
def test_position_attention_has_channels(channels: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, not"):
        danet.PositionAttention(*channels)


@pytest.mark.parametrize(("fast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_products_are_not_in_bfloat16_where_that_is_slow(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "multiplies_bfloat16_fast", lambda: fast)
    assert blocks._product_dtype(torch.bfloat16, torch.device("cpu")) == dtype
    assert blocks._product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_gradients_are_as_exact_as_those_of_the_plain_form() -> None:
    """Of scores that are far apart, as a trained network's, in float32."""
    generator = torch.Generator().manual_seed(0)
    widths = ((64, 3.0), (64, 3.0), (128, 1.0), (128, 1.0))
    drawn = [
        torch.randn(1, w, 700, generator=generator, dtype=torch.float64) * s for w, s in widths
    ]
    *inputs, grad = (tensor.float().double() for tensor in drawn)

    def gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(attend(*leaves), leaves, grad.to(dtype)))

    expected = gradients(kernels._plain, torch.float64)
    plain, found = (gradients(a, torch.float32) for a in (kernels._plain, position_attention))
    for ours, theirs, exact in zip(found, plain, expected, strict=True):
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


def test_the_log_sum_exp_has_no_gradient() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs()]
    output, logsumexp = kernels.attend(*inputs)
    assert output.requires_grad
    assert not logsumexp.requires_grad


@pytest.mark.filterwarnings("ignore:.*TorchDynamo")
def test_torchs_fused_attention_is_compiled_without_a_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend = partial(attend_by_heads, backends=[SDPBackend.MATH])
    monkeypatch.setattr(kernels, "fused_attention_fits", lambda *_: True)
    monkeypatch.setattr(kernels, "attend_by_heads", attend)
    inputs = [torch.randn(1, width, 16) for width in (8, 8, 16)]
    compiled = torch.compile(position_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), position_attention(*inputs))


def test_torchs_fused_attention_gets_tensors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not views with a stride of 0, which some kernels read wrongly."""
    compute = torch.nn.functional.scaled_dot_product_attention

    def checked(*tensors: Tensor, **options: object) -> Tensor:
        assert all(tensor.is_contiguous() and 0 not in tensor.stride() for tensor in tensors)
        return compute(*tensors, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", checked)
    attend_spread(torch.randn(2, 8, 9), torch.randn(2, 8, 7), torch.randn(2, 32, 7), 16)
