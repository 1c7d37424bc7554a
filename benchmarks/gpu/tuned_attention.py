"""The package's Triton kernels with every configuration of a list, the fastest of which is kept.

The first call on a shape times them; `timings` has what was found. Shapes: B batch, D key width, C
value width, N query positions, M key positions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from configurations import Choices, configurations
from torch import Tensor

from danet.kernels.triton_attention import (
    Configuration,
    Problem,
    as_rows,
    key_value_gradients,
    launch_forward,
    query_gradient,
    row_dots,
)

SMALL = 2**22
"""Scores of all samples below which nothing is timed."""


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
        inputs = tuple(map(as_rows, (query_BDN, key_BDM, value_BCM)))
        output_BNC, logsumexp_BN = _fastest("forward", launch_forward, inputs, choices)
        ctx.save_for_backward(*inputs, output_BNC, logsumexp_BN)
        ctx.choices = choices
        return output_BNC.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BCN: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *inputs, output_BNC, logsumexp_BN = ctx.saved_tensors
        grad_BNC = as_rows(grad_BCN)
        dots = functools.cache(functools.partial(row_dots, grad_BNC, output_BNC))

        def of(gradients: Callable[..., Any]) -> Callable[..., Any]:
            return lambda query, key, value, choice: gradients(
                grad_BNC, query, key, value, logsumexp_BN, dots(choice.width), choice
            )

        query_grad = _fastest("query", of(query_gradient), inputs, ctx.choices)
        key_grad, value_grad = _fastest("key_value", of(key_value_gradients), inputs, ctx.choices)
        return *(grad.transpose(1, 2) for grad in (query_grad, key_grad, value_grad)), None


def _fastest(
    name: str,
    run: Callable[..., Any],
    inputs: Sequence[Tensor],
    choices: Choices,
) -> Any:
    """What `run` returns with the configuration that is timed fastest by the first call on a
    problem, or with the first on a small one.

    Args:
        run: takes the inputs and a configuration.
        inputs: query, key and value.

    Raises:
        RuntimeError: none runs.
    """
    query, _, value = inputs
    problem = Problem.of(query, value)
    listed = [choice for choice in choices[name] if (name, choice) not in refused]
    is_small = problem.batch * problem.queries * problem.keys < SMALL
    if len(listed) == 1 or (listed and is_small):
        return run(*inputs, listed[0])
    found = [
        _timing(name, problem, query.dtype, choice, lambda choice=choice: run(*inputs, choice))
        for choice in listed
    ]
    timed = [timing for timing in found if timing.milliseconds is not None]
    if not timed:
        failures = [timing.failure for timing in found] or ["all were refused"]
        raise RuntimeError(f"no configuration of {name} runs: {failures[0]}")
    best = min(timed, key=lambda timing: timing.milliseconds or 0)
    return run(*inputs, best.configuration)


def _timing(
    name: str,
    problem: Problem,
    dtype: torch.dtype,
    configuration: Configuration,
    run: Callable[[], object],
) -> Timing:
    key = (name, problem, dtype.itemsize, configuration)  # half precisions are as fast
    if key not in timings:
        for call in on_trying:
            call(name, configuration)
        timings[key] = Timing(name, problem, dtype, configuration, *_time(run))
        for call in on_trying:
            call(name, None)
    return timings[key]


def _time(run: Callable[[], object]) -> tuple[float | None, str]:
    """Milliseconds, or why there are none."""
    try:
        run()
        return triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median"), ""
    except Exception as error:  # compilers raise many kinds; the next configuration may run
        if is_fatal(error):
            raise
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
