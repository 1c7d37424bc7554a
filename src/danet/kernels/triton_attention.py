"""Position attention by the Triton kernels of `triton_kernels`: what is launched, and how.

Shapes: B batch, S parts of the channels, D key width, C value width, N query positions, M key
positions. The kernels take B N C with channels next to each other, which is how channels-last
features lie in memory; anything else is copied so once.

`benchmarks/gpu` measures the configurations; here are those that were fastest on an H200. A launch
with tensor descriptors sets Triton's allocator for its thread, as other users of them do.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from danet.kernels import triton_kernels

_ROW_DOT_ROWS = 16


class Configuration(NamedTuple):
    """Compile-time constants of a kernel.

    Attributes:
        rows: positions per program.
        columns: positions per step of its loop.
        width: channels per program.
        warps: of 32 threads.
        stages: tiles in flight.
        descriptors: tiles come through tensor descriptors where alignment allows.
    """

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    descriptors: bool = False


Configurations = dict[str, Configuration]
"""One for each of the kernels "forward", "query" and "key_value"."""

_WIDTH = 256
"""Channels of a program: 512 fill its registers, and 128 form the scores twice as often."""

_HOPPER: Configurations = {
    "forward": Configuration(128, 64, _WIDTH, 8, 3),
    "query": Configuration(128, 64, _WIDTH, 8, 3, descriptors=True),
    "key_value": Configuration(64, 32, _WIDTH, 4, 3, descriptors=True),
}
_HOPPER_FEW_POSITIONS: Configurations = {
    "forward": Configuration(64, 64, _WIDTH, 4, 3, descriptors=True),
    "query": Configuration(64, 64, _WIDTH, 4, 3, descriptors=True),
    "key_value": Configuration(64, 32, _WIDTH, 4, 2, descriptors=True),
}
_FEW_PROGRAMS = 1.5
"""Programs of 128 positions for each multiprocessor, below which smaller ones share them better: a
little so at N = 9409 and batch 1 on an H200, where larger ones win by a fifth at N = 32768."""


class Problem(NamedTuple):
    """The sizes of the inputs."""

    batch: int
    queries: int
    keys: int
    key_width: int
    channels: int

    @classmethod
    def of(cls, query_BND: Tensor, value_BMC: Tensor) -> "Problem":
        batch, queries, key_width = query_BND.shape
        return cls(batch, queries, value_BMC.shape[1], key_width, value_BMC.shape[2])

    def parts(self, width: int) -> int:
        """The number of programs that share the channels of a block of positions."""
        return -(-self.channels // width)


def configurations(problem: Problem, device: torch.device) -> Configurations:
    """The fastest that were found on compute capability 9.0."""
    large = _HOPPER["forward"]
    blocks = -(-min(problem.queries, problem.keys) // large.rows)
    programs = problem.batch * blocks * problem.parts(large.width)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _HOPPER_FEW_POSITIONS if programs < _FEW_PROGRAMS * multiprocessors else _HOPPER


def forward(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    """Output B C N in the inputs' dtype, and the log-sum-exp B N, which is float32."""
    query_BND, key_BMD, value_BMC = map(as_rows, (query_BDN, key_BDM, value_BCM))
    chosen = configurations(Problem.of(query_BND, value_BMC), query_BND.device)
    output_BNC, logsumexp_BN = launch_forward(query_BND, key_BMD, value_BMC, chosen["forward"])
    return output_BNC.transpose(1, 2), logsumexp_BN


def backward(
    grad_BCN: Tensor,
    query_BDN: Tensor,
    key_BDM: Tensor,
    value_BCM: Tensor,
    output_BCN: Tensor,
    logsumexp_BN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped and typed as these."""
    grad_BNC, query_BND, key_BMD, value_BMC, output_BNC = map(
        as_rows, (grad_BCN, query_BDN, key_BDM, value_BCM, output_BCN)
    )
    chosen = configurations(Problem.of(query_BND, value_BMC), query_BND.device)
    of_query, of_key_value = chosen["query"], chosen["key_value"]
    dots = {w: row_dots(grad_BNC, output_BNC, w) for w in {of_query.width, of_key_value.width}}
    inputs = (grad_BNC, query_BND, key_BMD, value_BMC, logsumexp_BN)
    grad_query_BND = query_gradient(*inputs, dots[of_query.width], of_query)
    grad_key_BMD, grad_value_BMC = key_value_gradients(
        *inputs, dots[of_key_value.width], of_key_value
    )
    return (
        grad_query_BND.transpose(1, 2),
        grad_key_BMD.transpose(1, 2),
        grad_value_BMC.transpose(1, 2),
    )


def as_rows(tensor_BCN: Tensor) -> Tensor:
    """B N C with channels next to each other and positions apart."""
    tensor_BNC = tensor_BCN.transpose(1, 2)
    _, positions, channels = tensor_BNC.shape
    _, row, channel = tensor_BNC.stride()
    # Within a sample the kernels count elements in 32 bits.
    fits = channel == 1 and channels <= row and row * positions < 2**31
    return tensor_BNC if fits else tensor_BNC.clone(memory_format=torch.contiguous_format)


def launch_forward(
    query_BND: Tensor, key_BMD: Tensor, value_BMC: Tensor, configuration: Configuration
) -> tuple[Tensor, Tensor]:
    """Output B N C and log-sum-exp B N."""
    problem = Problem.of(query_BND, value_BMC)
    output_BNC = value_BMC.new_empty(problem.batch, problem.queries, problem.channels)
    logsumexp_BN = query_BND.new_empty(problem.batch, problem.queries, dtype=torch.float32)
    strided = (query_BND, key_BMD, value_BMC, output_BNC)
    _launch("forward", problem, (*strided, logsumexp_BN), strided, configuration)
    return output_BNC, logsumexp_BN


def row_dots(grad_BNC: Tensor, output_BNC: Tensor, width: int) -> Tensor:
    """rowsum(G output), S B N, of each part of so many channels; both gradients need it."""
    batch, queries, channels = grad_BNC.shape
    parts = -(-channels // width)
    row_dots_SBN = grad_BNC.new_empty(parts, batch, queries, dtype=torch.float32)
    grid = (triton.cdiv(queries, _ROW_DOT_ROWS), parts, batch)
    with torch.cuda.device_of(grad_BNC):  # type: ignore[no-untyped-call]
        triton_kernels.row_dots_kernel[grid](
            grad_BNC,
            output_BNC,
            row_dots_SBN,
            *grad_BNC.stride()[:2],
            *output_BNC.stride()[:2],
            queries,
            CHANNELS=channels,
            WIDTH=min(width, _padded(channels)),
            ROWS=_ROW_DOT_ROWS,
        )
    return row_dots_SBN


def query_gradient(
    grad_BNC: Tensor,
    query_BND: Tensor,
    key_BMD: Tensor,
    value_BMC: Tensor,
    logsumexp_BN: Tensor,
    row_dots_SBN: Tensor,
    configuration: Configuration,
) -> Tensor:
    """B N D.

    Args:
        row_dots_SBN: of the configuration's width.
    """
    problem = Problem.of(query_BND, value_BMC)
    strided = (query_BND, key_BMD, value_BMC, grad_BNC)
    sums_SBND = _partial_sums(query_BND, problem.parts(configuration.width))
    tensors = (*strided, logsumexp_BN, row_dots_SBN, sums_SBND)
    _launch("query", problem, tensors, strided, configuration)
    return _total(sums_SBND, query_BND.dtype)


def key_value_gradients(
    grad_BNC: Tensor,
    query_BND: Tensor,
    key_BMD: Tensor,
    value_BMC: Tensor,
    logsumexp_BN: Tensor,
    row_dots_SBN: Tensor,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """B M D and B M C.

    Args:
        row_dots_SBN: of the configuration's width.
    """
    problem = Problem.of(query_BND, value_BMC)
    strided = (query_BND, key_BMD, value_BMC, grad_BNC)
    sums_SBMD = _partial_sums(key_BMD, problem.parts(configuration.width))
    grad_value_BMC = torch.empty_like(value_BMC, memory_format=torch.contiguous_format)
    tensors = (*strided, logsumexp_BN, row_dots_SBN, sums_SBMD, grad_value_BMC)
    _launch("key_value", problem, tensors, strided, configuration)
    return _total(sums_SBMD, key_BMD.dtype), grad_value_BMC


def _partial_sums(like_BND: Tensor, parts: int) -> Tensor:
    dtype = like_BND.dtype if parts == 1 else torch.float32
    return like_BND.new_empty(parts, *like_BND.shape, dtype=dtype)


def _total(sums_SBND: Tensor, dtype: torch.dtype) -> Tensor:
    return sums_SBND[0] if len(sums_SBND) == 1 else sums_SBND.sum(0).to(dtype)


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
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[triton.cdiv(own, rows), problem.parts(width), problem.batch](
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


def _padded(width: int) -> int:
    """The width rounded up to what `tl.dot` takes: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _aligned(tensor: Tensor) -> bool:
    """Whether tensor descriptors take it: every row starts at a multiple of 16 bytes."""
    starts = (tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:2]))
    return all(start % 16 == 0 for start in starts)


def _scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
