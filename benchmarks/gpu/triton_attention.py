"""Position attention by the Triton kernels of `triton_kernels`, with gradients, and their tuning.

Shapes: B batch, S parts of the channels, D key width, C value width, N query positions, M key
positions. The kernels take B N C with channels next to each other, which is how channels-last
features lie in memory; anything else is copied so once.

Every kernel has a short list of configurations. The first call on a shape times them and the
fastest is kept; `timings` has what was found.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton_kernels
from configurations import Choices, Configuration, configurations
from torch import Tensor

ROW_DOT_ROWS = 16
SMALL = 2**22
"""Scores of all samples below which nothing is timed."""


class Problem(NamedTuple):
    """What the kernels are launched on."""

    batch: int
    queries: int
    keys: int
    key_width: int
    channels: int


class Timing(NamedTuple):
    """Milliseconds of a configuration, or why there are none."""

    kernel: str
    problem: Problem
    dtype: torch.dtype
    configuration: Configuration
    milliseconds: float | None
    failure: str


timings: dict[tuple[str, Problem, int, Configuration], Timing] = {}
refused: set[tuple[str, Configuration]] = set()
"""Kernels and configurations not to be tried: those that broke an earlier process."""
on_trying: list[Callable[[str, Configuration | None], None]] = []
"""Told which kernel and configuration is about to be timed, and None when it was."""

FATAL = ("illegal", "misaligned", "launch failure", "device-side assert")


def is_fatal(error: Exception) -> bool:
    """Whether the GPU takes nothing more from this process."""
    return any(word in str(error) for word in FATAL)


def position_attention(
    query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor, choices: Choices | None = None
) -> Tensor:
    """Output B C N in the inputs' dtype, which is bfloat16, float16 or float32; differentiable.

    Args:
        choices: all that the device's list has where None.
    """
    if choices is None:
        choices = configurations(query_BDN.device, query_BDN.dtype)
    output: Tensor = _PositionAttention.apply(query_BDN, key_BDM, value_BCM, choices)
    return output


class _PositionAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor, choices: Choices
    ) -> Tensor:
        query_BND, key_BMD, value_BMC = map(_rows, (query_BDN, key_BDM, value_BCM))
        output_BNC, logsumexp_BN = forward(query_BND, key_BMD, value_BMC, choices["forward"])
        ctx.save_for_backward(query_BND, key_BMD, value_BMC, output_BNC, logsumexp_BN)
        ctx.choices = choices
        return output_BNC.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BCN: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grads = backward(_rows(grad_BCN), *ctx.saved_tensors, ctx.choices)
        query_grad, key_grad, value_grad = (grad.transpose(1, 2) for grad in grads)
        return query_grad, key_grad, value_grad, None


def _rows(tensor_BCN: Tensor) -> Tensor:
    """B N C with channels next to each other and positions apart."""
    tensor_BNC = tensor_BCN.transpose(1, 2)
    _, row, channel = tensor_BNC.stride()
    fits = channel == 1 and row >= tensor_BNC.shape[2]
    return tensor_BNC if fits else tensor_BNC.clone(memory_format=torch.contiguous_format)


def forward(
    query_BND: Tensor, key_BMD: Tensor, value_BMC: Tensor, choices: Sequence[Configuration]
) -> tuple[Tensor, Tensor]:
    """Output B N C and log-sum-exp B N, which is float32."""
    problem = _problem(query_BND, value_BMC)
    output_BNC = value_BMC.new_empty(problem.batch, problem.queries, problem.channels)
    logsumexp_BN = query_BND.new_empty(problem.batch, problem.queries, dtype=torch.float32)
    strided = (query_BND, key_BMD, value_BMC, output_BNC)
    launch = functools.partial(_launch, "forward", problem, (*strided, logsumexp_BN), strided)
    launch(_fastest("forward", problem, query_BND, choices, launch))
    return output_BNC, logsumexp_BN


def backward(
    grad_BNC: Tensor,
    query_BND: Tensor,
    key_BMD: Tensor,
    value_BMC: Tensor,
    output_BNC: Tensor,
    logsumexp_BN: Tensor,
    choices: Choices,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    problem = _problem(query_BND, value_BMC)
    grad_value_BMC = torch.empty_like(value_BMC, memory_format=torch.contiguous_format)
    strided = (query_BND, key_BMD, value_BMC, grad_BNC)

    @functools.cache
    def row_dots(width: int) -> Tensor:
        return _row_dots(problem, grad_BNC, output_BNC, width)

    @functools.cache
    def parts(of: str, width: int) -> Tensor:
        like = key_BMD if of == "key_value" else query_BND
        count = _parts(problem, width)
        dtype = like.dtype if count == 1 else torch.float32
        return like.new_empty(count, *like.shape, dtype=dtype)

    def key_value(configuration: Configuration) -> None:
        width = configuration.width
        tensors = (*strided, logsumexp_BN, row_dots(width), parts("key_value", width))
        _launch("key_value", problem, (*tensors, grad_value_BMC), strided, configuration)

    def query(configuration: Configuration) -> None:
        width = configuration.width
        tensors = (*strided, logsumexp_BN, row_dots(width), parts("query", width))
        _launch("query", problem, tensors, strided, configuration)

    sums = []
    for name, launch in (("query", query), ("key_value", key_value)):
        best = _fastest(name, problem, query_BND, choices[name], launch)
        launch(best)
        part_sums = parts(name, best.width)
        total = part_sums[0] if len(part_sums) == 1 else part_sums.sum(0).to(query_BND.dtype)
        sums.append(total)
    return sums[0], sums[1], grad_value_BMC


def _problem(query_BND: Tensor, value_BMC: Tensor) -> Problem:
    batch, queries, key_width = query_BND.shape
    return Problem(batch, queries, value_BMC.shape[1], key_width, value_BMC.shape[2])


def _padded(width: int) -> int:
    """What a product takes: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(width))


def _parts(problem: Problem, width: int) -> int:
    return triton.cdiv(problem.channels, width)


def _row_dots(problem: Problem, grad_BNC: Tensor, output_BNC: Tensor, width: int) -> Tensor:
    parts = _parts(problem, width)
    row_dots_SBN = grad_BNC.new_empty(parts, problem.batch, problem.queries, dtype=torch.float32)
    grid = (triton.cdiv(problem.queries, ROW_DOT_ROWS), parts, problem.batch)
    triton_kernels.row_dots_kernel[grid](
        grad_BNC,
        output_BNC,
        row_dots_SBN,
        *grad_BNC.stride()[:2],
        *output_BNC.stride()[:2],
        problem.queries,
        CHANNELS=problem.channels,
        WIDTH=min(width, _padded(problem.channels)),
        ROWS=ROW_DOT_ROWS,
    )
    return row_dots_SBN


def _launch(
    name: str,
    problem: Problem,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    configuration: Configuration,
) -> None:
    rows, columns, width, warps, stages, descriptors = configuration
    own, other = problem.queries, problem.keys
    if name == "key_value":
        own, other = other, own
    kernel = getattr(triton_kernels, f"{name}_kernel")
    descriptors = descriptors and all(map(_aligned, strided))
    if descriptors:
        # Kept by thread, and gradients are computed on another one.
        triton.set_allocator(_scratch)
    kernel[triton.cdiv(own, rows), _parts(problem, width), problem.batch](
        *tensors,
        *(stride for tensor in strided for stride in tensor.stride()[:2]),
        problem.queries,
        problem.keys,
        KEY_WIDTH=problem.key_width,
        CHANNELS=problem.channels,
        D=_padded(problem.key_width),
        WIDTH=min(width, _padded(problem.channels)),
        ROWS=rows,
        COLUMNS=columns,
        EVEN=own % rows == 0 and other % columns == 0,
        TMA=descriptors,
        num_warps=warps,
        num_stages=stages,
    )


def _aligned(tensor: Tensor) -> bool:
    """Whether tensor descriptors take it: every row starts at a multiple of 16 bytes."""
    starts = (tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:2]))
    return all(start % 16 == 0 for start in starts)


def _scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fastest(
    name: str,
    problem: Problem,
    query: Tensor,
    choices: Sequence[Configuration],
    launch: Callable[[Configuration], None],
) -> Configuration:
    """The one that is timed fastest by the first call on a problem, or the first on a small one.

    Raises:
        RuntimeError: none runs.
    """
    choices = [choice for choice in choices if (name, choice) not in refused]
    is_small = problem.batch * problem.queries * problem.keys < SMALL
    if len(choices) == 1 or (choices and is_small):
        return choices[0]
    found = [_timing(name, problem, query.dtype, choice, launch) for choice in choices]
    run = [timing for timing in found if timing.milliseconds is not None]
    if not run:
        failures = [timing.failure for timing in found] or ["all were refused"]
        raise RuntimeError(f"no configuration of {name} runs: {failures[0]}")
    return min(run, key=lambda timing: timing.milliseconds or 0).configuration


def _timing(
    name: str,
    problem: Problem,
    dtype: torch.dtype,
    configuration: Configuration,
    launch: Callable[[Configuration], None],
) -> Timing:
    key = (name, problem, dtype.itemsize, configuration)  # half precisions are as fast
    if key not in timings:
        for call in on_trying:
            call(name, configuration)
        timings[key] = _time(name, problem, dtype, configuration, launch)
        for call in on_trying:
            call(name, None)
    return timings[key]


def _time(
    name: str,
    problem: Problem,
    dtype: torch.dtype,
    configuration: Configuration,
    launch: Callable[[Configuration], None],
) -> Timing:
    milliseconds, failure = None, ""
    try:
        launch(configuration)
        milliseconds = triton.testing.do_bench(
            lambda: launch(configuration), warmup=5, rep=25, return_mode="median"
        )
    except Exception as error:  # compilers raise many kinds; the next configuration may run
        if is_fatal(error):
            raise
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return Timing(name, problem, dtype, configuration, milliseconds, failure)
