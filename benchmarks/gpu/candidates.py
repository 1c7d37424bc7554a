"""The exact ways to position attention that are compared: query B D N, key B D M, value B C M.

Without a GPU torch's plain kernel stands in for the fused ones, and FlexAttention is not compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import tuned_attention
from configurations import configurations
from torch import Tensor
from torch.nn.attention import SDPBackend

from danet.functional import position_attention
from danet.kernels import blocks
from danet.kernels.fused import attend_by_heads

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Blocks(torch.autograd.Function):
    """The package's portable way, on a GPU where it has a faster one."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, logsumexp = blocks.forward(query, key, value)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return blocks.backward(grad, *ctx.saved_tensors)


def _blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = _Blocks.apply(query, key, value)
    return output


def _spread(backend: SDPBackend, width: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    backend = backend if query.device.type == "cuda" else SDPBackend.MATH
    return attend_by_heads(query, key, value, [backend], width)


def _triton(width: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    choices = configurations(query.device, query.dtype, width)
    return tuned_attention.position_attention(query, key, value, choices)


def materialized(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As danet.bench.workload has it, whose imports not every GPU machine can serve."""
    attention = (query.transpose(1, 2) @ key).softmax(-1)
    return value @ attention.transpose(1, 2)


class Flex:
    """FlexAttention with the first of its options that compiles, forward and backward."""

    # Its own tiles are meant for values of 128 channels and overflow shared memory.
    _OPTIONS: tuple[dict[str, int], ...] = (
        {
            "fwd_BLOCK_M": 64,
            "fwd_BLOCK_N": 32,
            "fwd_num_warps": 8,
            "fwd_num_stages": 2,
            "bwd_BLOCK_M1": 32,
            "bwd_BLOCK_N1": 64,
            "bwd_BLOCK_M2": 64,
            "bwd_BLOCK_N2": 32,
            "bwd_num_warps": 8,
            "bwd_num_stages": 1,
        },
        {
            "fwd_BLOCK_M": 64,
            "fwd_BLOCK_N": 32,
            "fwd_num_warps": 8,
            "fwd_num_stages": 1,
            "bwd_BLOCK_M1": 16,
            "bwd_BLOCK_N1": 32,
            "bwd_BLOCK_M2": 32,
            "bwd_BLOCK_N2": 16,
            "bwd_num_warps": 4,
            "bwd_num_stages": 1,
        },
        {},
    )

    def __init__(self) -> None:
        self._options: dict[str, int] | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [tensor.transpose(1, 2).unsqueeze(1) for tensor in (query, key, value)]
        if query.device.type != "cuda":
            return self._attend(heads, {})
        if self._options is None:
            self._options = self._first_that_compiles(heads)
        return self._attend(heads, self._options)

    def _attend(self, heads: list[Tensor], options: dict[str, int]) -> Tensor:
        attend = _compiled_flex() if heads[0].device.type == "cuda" else _flex()
        output_BENC: Tensor = attend(*heads, scale=1.0, kernel_options=options)
        return output_BENC.squeeze(1).transpose(1, 2)

    def _first_that_compiles(self, heads: list[Tensor]) -> dict[str, int]:
        failures = []
        for options in self._OPTIONS:
            inputs = [head.detach().clone().requires_grad_() for head in heads]
            try:
                with torch.enable_grad():
                    self._attend(inputs, options).sum().backward()  # type: ignore[no-untyped-call]
            except Exception as error:  # compilers raise many kinds
                failures.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            else:
                return options
        raise RuntimeError("does not compile: " + "; ".join(dict.fromkeys(failures)))


def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex() -> Any:
    torch._dynamo.config.recompile_limit = 64  # a graph for each dtype, direction and layout
    return torch.compile(_flex(), dynamic=True)


def candidates() -> dict[str, Attend]:
    """All of them, by name, in the order in which they are measured."""
    cudnn, efficient = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    return {
        "danet": position_attention,
        "triton": functools.partial(_triton, None),
        "triton 512": functools.partial(_triton, 512),
        "triton 2x256": functools.partial(_triton, 256),
        "triton 4x128": functools.partial(_triton, 128),
        "cudnn 4x128": functools.partial(_spread, cudnn, 128),
        "cudnn 2x256": functools.partial(_spread, cudnn, 256),
        "efficient 4x128": functools.partial(_spread, efficient, 128),
        "efficient 512": functools.partial(_spread, efficient, 512),
        "blocks": _blocks,
        "eager N x N": materialized,
        "flex 512": Flex(),
    }


def triton_configurations(device: torch.device, dtype: torch.dtype) -> dict[str, Attend]:
    """The Triton kernels with each of their configurations, which need checking one by one."""
    choices = configurations(device, dtype)

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A kernel with fewer begins again.
        only = {name: [several[index % len(several)]] for name, several in choices.items()}
        return tuned_attention.position_attention(query, key, value, only)

    count = max(map(len, choices.values()))
    return {f"triton {i + 1} of {count}": functools.partial(attend, i) for i in range(count)}


def stand_in(name: str, device: torch.device) -> str:
    """What is measured in place of a candidate where there is no GPU; else nothing."""
    if device.type == "cuda":
        return ""
    return {
        "danet": "blocks stand in",
        "cudnn 4x128": "math stands in",
        "cudnn 2x256": "math stands in",
        "efficient 4x128": "math stands in",
        "efficient 512": "math stands in",
        "flex 512": "not compiled",
    }.get(name, "interpreted" if name.startswith("triton") else "")
