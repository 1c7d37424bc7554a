"""How far a candidate's output and gradients are from float64, on fresh random inputs.

Shapes: B batch, D key width, C value width, N query positions, M key positions.
"""

import math
from typing import NamedTuple

import torch
from candidates import Attend
from torch import Tensor

ROWS = 2048
"""Queries whose weights exist at a time in float64."""

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Of ||actual - exact|| / ||exact||; eager attention in the same dtype comes to a third."""


class Case(NamedTuple):
    """What is checked."""

    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    key_width: int
    channels: int
    channels_last: bool = True

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        name = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.batch} x {self.queries} x {self.keys}, {self.key_width} and {self.channels}"
        return f"{name} {sizes}, {layout}"


_HALF = (torch.bfloat16, torch.float16)
CASES = [
    *(Case(dtype, 2, 97, 65, 64, 512) for dtype in TOLERANCES),
    *(Case(dtype, 2, 65, 97, 20, 36) for dtype in TOLERANCES),
    *(Case(dtype, 2, 129, 200, 64, 512, False) for dtype in _HALF),
    Case(torch.float32, 1, 1000, 777, 64, 512),
    *(Case(dtype, 1, 9409, 9409, 64, 512) for dtype in _HALF),
    *(Case(dtype, 1, 32768, 32768, 64, 512) for dtype in _HALF),
]
CONFIGURATION_CASES = [
    Case(torch.bfloat16, 2, 193, 321, 64, 512),
    Case(torch.bfloat16, 1, 256, 512, 64, 512),
    Case(torch.float16, 1, 256, 512, 64, 512),
]
"""With and without masks, for each configuration of the Triton kernels."""

TINY_CONFIGURATION_CASES = [Case(torch.bfloat16, 1, 20, 33, 16, 64)]
TINY_CASES = [
    *(Case(dtype, 2, 17, 20, 20, 36) for dtype in TOLERANCES),
    Case(torch.bfloat16, 1, 16, 32, 16, 64, False),
]


def random_inputs(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Query, key and value that want gradients, and the gradient of the output; all fresh."""

    def draw(channels: int, positions: int, scale: float) -> Tensor:
        if case.channels_last:
            shape = (case.batch, positions, channels)
            tensor = torch.randn(shape, device=device).mul(scale).to(case.dtype)
            return tensor.transpose(1, 2)
        shape = (case.batch, channels, positions)
        return torch.randn(shape, device=device).mul(scale).to(case.dtype)

    # Scores of standard deviation 2: neither a mean over all positions nor one position alone.
    scale = math.sqrt(2 / math.sqrt(case.key_width))
    inputs = [
        draw(case.key_width, case.queries, scale),
        draw(case.key_width, case.keys, scale),
        draw(case.channels, case.keys, 1),
    ]
    return [tensor.requires_grad_() for tensor in inputs], draw(case.channels, case.queries, 1)


@torch.no_grad()
def exact(inputs: list[Tensor], grad_BCN: Tensor) -> list[Tensor]:
    """Output and gradients of query, key and value in float64, by blocks of queries."""
    query, key, value = (tensor.detach().double() for tensor in inputs)
    grad = grad_BCN.double()
    output = torch.empty_like(grad)
    grad_query, grad_key, grad_value = map(torch.zeros_like, (query, key, value))
    for start in range(0, query.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        weights_BnM = (query[..., rows].transpose(1, 2) @ key).softmax(-1)
        output[..., rows] = value @ weights_BnM.transpose(1, 2)
        grad_value += grad[..., rows] @ weights_BnM
        by_weight_BnM = grad[..., rows].transpose(1, 2) @ value
        mean_Bn1 = (by_weight_BnM * weights_BnM).sum(-1, keepdim=True)
        by_score_BnM = weights_BnM * (by_weight_BnM - mean_Bn1)
        grad_query[..., rows] = key @ by_score_BnM.transpose(1, 2)
        grad_key += query[..., rows] @ by_score_BnM
    return [output, grad_query, grad_key, grad_value]


def errors(
    attend: Attend, inputs: list[Tensor], grad_BCN: Tensor, expected: list[Tensor]
) -> list[float]:
    """||actual - exact|| / ||exact|| of output and gradients; not a number where shapes differ."""
    for tensor in inputs:
        tensor.grad = None
    # What an earlier candidate left in freed memory must not pass for what was not written.
    poison = [torch.full_like(tensor, math.nan) for tensor in (grad_BCN, grad_BCN, *inputs)]
    del poison
    output = attend(*inputs)
    output.backward(grad_BCN)  # type: ignore[no-untyped-call]
    actual = [output.detach(), *(tensor.grad for tensor in inputs)]
    return [
        _relative(got, right) if got is not None and got.shape == right.shape else math.nan
        for got, right in zip(actual, expected, strict=True)
    ]


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())
