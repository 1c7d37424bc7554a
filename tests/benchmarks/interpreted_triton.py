"""Errors of the Triton kernels against the loops of `oracle`, as JSON by case.

A process of its own: TRITON_INTERPRET must be set before triton is imported, and stays set. Takes
tests and benchmarks/gpu on PYTHONPATH.
"""

import json
import warnings
from unittest import mock

import numpy as np
import torch
from configurations import Choices
from torch import Tensor
from tuned_attention import position_attention

import oracle
from danet import functional, kernels
from danet.kernels import triton_attention
from danet.kernels.triton_attention import Configuration

DIFFERENT = {
    "forward": Configuration(32, 64, 64, 4, 1),
    "key_value": Configuration(64, 16, 16, 4, 1),
    "query": Configuration(16, 32, 32, 4, 1),
}


def everywhere(
    rows: int, columns: int, width: int, warps: int = 4, descriptors: bool = False
) -> Choices:
    choice = Configuration(rows, columns, width, warps, 1, descriptors)
    return {name: [choice] for name in ("forward", "key_value", "query")}


def random_inputs(dtype: torch.dtype, sizes: tuple[int, ...], shift: float = 0) -> list[Tensor]:
    """Query, key, value and the output's gradient, channels next to each other."""
    queries, keys, key_width, channels = sizes
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, positions, width, generator=generator).transpose(1, 2)
        for positions, width in (
            (queries, key_width),
            (keys, key_width),
            (keys, channels),
            (queries, channels),
        )
    )
    return [tensor.to(dtype) for tensor in (query + shift, key - shift, value, grad)]


def operator_errors(inputs: list[Tensor]) -> list[float]:
    """Of the package's own operator, as on a GPU that the kernels are for."""
    with (
        mock.patch.object(kernels, "hopper_kernels_fit", return_value=True),
        mock.patch.object(triton_attention, "configurations", return_value=DIFFERENT),
        warnings.catch_warnings(
            action="error", category=RuntimeWarning
        ),  # or the blocks would stand in
    ):
        return errors(inputs, None)


def errors(inputs: list[Tensor], choices: Choices | None) -> list[float]:
    """Largest difference over largest entry, of the output and of each gradient.

    Args:
        choices: of the kernels; the package's operator where None.
    """
    arrays = [tensor.double().numpy() for tensor in inputs]
    tensors = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    if choices is None:
        output = functional.position_attention(*tensors)
    else:
        output = position_attention(*tensors, choices)
    output.backward(inputs[3])
    samples = [[array[sample] for array in arrays] for sample in range(2)]
    expected = [np.stack([oracle.position_attention(*s[:3]) for s in samples])]
    gradients = [oracle.position_attention_gradients(*s) for s in samples]
    expected += [np.stack(both) for both in zip(*gradients, strict=True)]
    actual = [output.detach(), *(tensor.grad for tensor in tensors)]
    return [
        float(np.abs(got.double().numpy() - right).max() / np.abs(right).max())
        for got, right in zip(actual, expected, strict=True)
    ]


def main() -> None:
    odd, small, even = (97, 65, 20, 36), (33, 41, 20, 36), (64, 32, 16, 64)
    float32 = random_inputs(torch.float32, small)
    several = {name: [configuration] for name, configuration in DIFFERENT.items()}
    expanded = [*float32[:3], torch.ones(()).expand(2, 36, 33)]
    found = {
        "float32": errors(random_inputs(torch.float32, odd), everywhere(32, 32, 32)),
        "bfloat16": errors(random_inputs(torch.bfloat16, odd), everywhere(32, 32, 64)),
        "float16": errors(random_inputs(torch.float16, odd), everywhere(32, 32, 16)),
        "even": errors(random_inputs(torch.float32, even), everywhere(32, 16, 32)),
        "descriptors": errors(
            random_inputs(torch.float32, (33, 41, 16, 40)), everywhere(32, 32, 32, descriptors=True)
        ),
        "channels first": errors([t.contiguous() for t in float32], everywhere(32, 32, 64)),
        "configurations that differ": errors(float32, several),
        "the package's operator": operator_errors(float32),
        "expanded gradient": errors(expanded, everywhere(32, 32, 64)),
        # A key that is not there would have a score of 0, far above all others.
        "scores below zero": errors(
            random_inputs(torch.float32, small, shift=1.5), everywhere(32, 32, 64)
        ),
        "one query": errors(random_inputs(torch.float32, (1, 40, 8, 8)), everywhere(16, 16, 16)),
    }
    huge = [tensor.requires_grad_() for tensor in random_inputs(torch.float32, small)[:3]]
    choices = everywhere(32, 32, 64)
    position_attention(huge[0] * 1e8, huge[1] * 1e7, huge[2], choices).sum().backward()
    found["huge scores, not finite"] = [float((~tensor.grad.isfinite()).sum()) for tensor in huge]
    # rowsum(G output) is 108,000, beyond float16; equal values leave the scores no gradient.
    query, key, value, grad = random_inputs(torch.float16, small, shift=1.5)
    query.requires_grad_()
    output = position_attention(query, key, torch.full_like(value, 30), choices)
    output.backward(torch.full_like(grad, 100))
    found["large rowsums, not finite"] = [float((~query.grad.isfinite()).sum())]
    # As of the matrix product with softmax(scores): whatever a pixel's weights meet.
    query, key, value, grad = random_inputs(torch.bfloat16, small)
    query[0, 0, 0] = torch.nan
    value.requires_grad_()
    position_attention(query, key, value, choices).backward(grad)
    spoilt = torch.zeros_like(value)
    spoilt[0] = torch.nan
    found["a query that is not a number"] = [
        float((value.grad.isnan() != spoilt.isnan()).sum()),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
