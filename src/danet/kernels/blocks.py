"""Position attention block by block: plain matrix products, on any device and in any dtype.

Shapes: B batch, D key width, C value width, N query positions, M key positions; a lower-case
letter is a block of that axis.

    scores_NM = query^T key      attention_NM = softmax over M      output_CN = value attention^T

The N x M matrices only ever exist as blocks, small enough that the next product finds them in the
cache. The forward pass goes over blocks of queries; where a whole row of scores is too long for a
block, its parts' softmaxes are merged as they come (online softmax, arXiv 1805.02867). It keeps the
log-sum-exp of each row, from which the backward pass recomputes each block (FlashAttention, arXiv
2205.14135, section 3.1). That one goes over blocks of keys, whose own gradients are then written
once, and forms the scores transposed.

Of small maps, as many samples as fill a block are taken together, in batched products.

Scores and their softmax are float32 even for half-precision inputs: both directions then see the
same attention, and rounding the scores to bfloat16 would cost five times the accuracy.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from danet.kernels.cpu import has_avx2_alone, is_intel, multiplies_bfloat16_fast
from danet.kernels.memory import ReusedMemory
from danet.kernels.precision import (
    fast_exact_float32,
    least_exponent,
    score_dtype,
    without_autocast,
)

_LOG2_E = math.log2(math.e)
_DOT_ROWS = 512
"""Positions whose products with the output are taken at a time."""
_LARGEST_BATCHED = 512
"""Positions; products of more are as fast one by one."""


class BlockShape(NamedTuple):
    """The largest number of rows and columns of scores that exist at a time."""

    rows: int
    columns: int


# docs/performance.md has the measurements. On AMD with AVX-512 every shape that keeps a block
# within the third-level cache is as fast; that of Intel, and of AMD before it, is slow. Devices
# want larger products.
_CPU_WHOLE_ROWS = BlockShape(512, 10_240)
_CPU_TILES = BlockShape(1024, 2048)
_SLOW_CACHE_WHOLE_ROWS = BlockShape(2048, 2048)
_SLOW_CACHE_TILES = BlockShape(2048, 1024)
_DEVICE_WHOLE_ROWS = BlockShape(2048, 16_384)
_DEVICE_TILES = BlockShape(4096, 8192)


def block_shape(row_length: int, device: torch.device) -> BlockShape:
    """Whole rows of scores where they are short enough, else tiles."""
    if device.type != "cpu":
        whole, tiles = _DEVICE_WHOLE_ROWS, _DEVICE_TILES
    elif is_intel() or has_avx2_alone():
        whole, tiles = _SLOW_CACHE_WHOLE_ROWS, _SLOW_CACHE_TILES
    else:
        whole, tiles = _CPU_WHOLE_ROWS, _CPU_TILES
    return whole if row_length <= whole.columns else tiles


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _cast(block: Tensor, memory: ReusedMemory, name: str) -> Tensor:
    """The block in the memory's dtype: itself, or written there."""
    if block.dtype == memory.like.dtype:
        return block
    return memory.take(name, *block.shape).copy_(block)


def _product(
    left: Tensor, right: Tensor, memory: ReusedMemory, name: str, factor: float = 1
) -> Tensor:
    """Their matrix product, times the factor, written into the memory."""
    product = memory.take(name, left.shape[0], right.shape[1])
    return torch.addmm(product, left, right, beta=0, alpha=factor, out=product)


def _product_dtype(given: torch.dtype, device: torch.device) -> torch.dtype:
    """In which attention meets values and gradients: the given dtype where that is faster."""
    slow = given == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16_fast()
    return torch.float32 if slow else given


def _samples_together(query_BDN: Tensor, key_BDM: Tensor) -> int:
    """How many samples' scores fit into one block; 1 where a sample is better taken by itself."""
    queries, keys = query_BDN.shape[2], key_BDM.shape[2]
    shape = block_shape(max(queries, keys), query_BDN.device)
    if max(queries, keys) > min(shape.rows, _LARGEST_BATCHED):
        return 1
    return max(shape.rows * shape.columns // max(queries * keys, 1), 1)


def forward(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    """Output B C N in the value's dtype, and the log-sum-exp B N of each row of scores."""
    exact = score_dtype(query_BDN.dtype)
    product = _product_dtype(value_BCM.dtype, value_BCM.device)
    batch, channels, _ = value_BCM.shape
    queries = query_BDN.shape[2]
    output_BNC = value_BCM.new_empty(batch, queries, channels)
    logsumexp_BN = query_BDN.new_empty(batch, queries, dtype=exact)
    device = query_BDN.device
    together = _samples_together(query_BDN, key_BDM)
    with without_autocast(device.type), fast_exact_float32(device):
        for samples in _blocks(batch, together):
            if together > 1:
                scores_bNM = query_BDN[samples].mT.to(exact) @ key_BDM[samples].to(exact)
                attention_bNM, logsumexp_BN[samples] = _softmax(scores_bNM)
                output_BNC[samples] = attention_bNM @ value_BCM[samples].mT.to(exact)
                continue
            sample = samples.start
            _forward_sample(
                query_BDN[sample].T.to(exact),
                key_BDM[sample].to(exact),
                value_BCM[sample].T.to(product),
                output_BNC[sample],
                logsumexp_BN[sample],
            )
    return output_BNC.transpose(1, 2), logsumexp_BN


def _softmax(scores_nm: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, in the scores' memory, and the log-sum-exp of each row."""
    largest_n = scores_nm.amax(-1)
    if scores_nm.device.type == "cpu":
        # At least a few roundings lower, or huge scores would all become the largest.
        epsilon = torch.finfo(scores_nm.dtype).eps
        least_n = largest_n + least_exponent(scores_nm.dtype) - 4 * epsilon * largest_n.abs()
        torch.clamp(scores_nm, min=least_n.unsqueeze(-1), out=scores_nm)
    attention_nm = torch.softmax(scores_nm, -1, out=scores_nm)
    # At a row's largest score, log(attention) = score - logsumexp.
    return attention_nm, largest_n - attention_nm.amax(-1).log_()


def _forward_sample(
    query_ND: Tensor, key_DM: Tensor, value_MC: Tensor, output_NC: Tensor, logsumexp_N: Tensor
) -> None:
    queries, keys = len(query_ND), len(value_MC)
    shape = block_shape(keys, query_ND.device)
    exact_memory, memory = ReusedMemory(query_ND), ReusedMemory(value_MC)
    tiles = _blocks(keys, shape.columns)
    for block in _blocks(queries, shape.rows):
        for tile in tiles:
            scores_nm = _product(query_ND[block], key_DM[:, tile], exact_memory, "scores")
            attention_nm, logsumexp_n = _softmax(scores_nm)
            weights_nm = _cast(attention_nm, memory, "weights")
            product_nC = _product(weights_nm, value_MC[tile], memory, "product")
            if len(tiles) == 1:
                output_NC[block] = product_nC
                logsumexp_N[block] = logsumexp_n
                continue
            if tile.start == 0:
                sum_nC = exact_memory.take("sum", *product_nC.shape).copy_(product_nC)
                running_n = logsumexp_n
                continue
            part_nC = _cast(product_nC, exact_memory, "part")
            merged_n = torch.logaddexp(running_n, logsumexp_n)
            sum_nC.mul_((running_n - merged_n).exp_().unsqueeze(1))
            sum_nC.addcmul_(part_nC, (logsumexp_n - merged_n).exp_().unsqueeze(1))
            running_n = merged_n
        if len(tiles) > 1:
            output_NC[block] = sum_nC
            logsumexp_N[block] = running_n


def backward(
    grad_BCN: Tensor,
    query_BDN: Tensor,
    key_BDM: Tensor,
    value_BCM: Tensor,
    output_BCN: Tensor,
    logsumexp_BN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped and typed as these.

    With P = attention and G = grad: dV = G P; dP = G^T V; dS = P (dP - rowsum(G * output));
    dQ = K dS^T; dK = Q dS.
    """
    batch, key_width, queries = query_BDN.shape
    channels, keys = value_BCM.shape[1:]
    product = _product_dtype(value_BCM.dtype, value_BCM.device)
    grad_query_BND = query_BDN.new_empty(batch, queries, key_width)
    grad_key_BMD = key_BDM.new_empty(batch, keys, key_width)
    grad_value_BMC = value_BCM.new_empty(batch, keys, channels)
    device = query_BDN.device
    exact = logsumexp_BN.dtype
    together = _samples_together(query_BDN, key_BDM)
    with without_autocast(device.type), fast_exact_float32(device):
        for samples in _blocks(batch, together):
            if together > 1:
                found = _backward_samples(
                    grad_BCN[samples].mT.to(exact),
                    query_BDN[samples].mT.to(exact),
                    key_BDM[samples].mT.to(exact),
                    value_BCM[samples].mT.to(exact),
                    output_BCN[samples].mT.to(exact),
                    logsumexp_BN[samples],
                )
                grad_query_BND[samples], grad_key_BMD[samples], grad_value_BMC[samples] = found
                continue
            sample = samples.start
            grad_query_BND[sample] = _backward_sample(
                grad_BCN[sample].T.to(product),
                query_BDN[sample].T.to(product),
                key_BDM[sample].T.to(product),
                value_BCM[sample].T.to(product),
                output_BCN[sample].T,
                logsumexp_BN[sample],
                grad_key_BMD[sample],
                grad_value_BMC[sample],
            )
    return (
        grad_query_BND.transpose(1, 2),
        grad_key_BMD.transpose(1, 2),
        grad_value_BMC.transpose(1, 2),
    )


def _backward_samples(
    grad_bNC: Tensor,
    query_bND: Tensor,
    key_bMD: Tensor,
    value_bMC: Tensor,
    output_bNC: Tensor,
    logsumexp_bN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query b N D, key b M D and value b M C, all in the precision of the scores."""
    below_bNM = (query_bND @ key_bMD.transpose(1, 2)).sub_(logsumexp_bN.unsqueeze(2))
    attention_bNM = below_bNM.clamp_(least_exponent(logsumexp_bN.dtype), 0).exp_()
    grad_value_bMC = attention_bNM.transpose(1, 2) @ grad_bNC
    row_dot_bN = torch.linalg.vecdot(grad_bNC, output_bNC)
    grad_scores_bNM = grad_bNC @ value_bMC.transpose(1, 2)
    grad_scores_bNM.sub_(row_dot_bN.unsqueeze(2)).mul_(attention_bNM)
    grad_key_bMD = grad_scores_bNM.transpose(1, 2) @ query_bND
    return grad_scores_bNM @ key_bMD, grad_key_bMD, grad_value_bMC


def _backward_sample(
    grad_NC: Tensor,
    query_ND: Tensor,
    key_MD: Tensor,
    value_MC: Tensor,
    output_NC: Tensor,
    logsumexp_N: Tensor,
    grad_key_MD: Tensor,
    grad_value_MC: Tensor,
) -> Tensor:
    """Writes the gradients of key and value, and returns the query's, N D."""
    exact, given = logsumexp_N.dtype, grad_NC.dtype
    queries, keys, channels = len(query_ND), len(key_MD), grad_NC.shape[1]
    # What is subtracted from every row of a product is made its last term: a column more of each
    # factor instead of a pass over the block. As two halves it survives half precision.
    row_dot_N = torch.empty_like(logsumexp_N)
    for block in _blocks(queries, _DOT_ROWS):
        row_dot_N[block] = torch.linalg.vecdot(grad_NC[block].to(exact), output_NC[block].to(exact))
    high_N = row_dot_N.to(given)
    parts = [high_N] if given == exact else [high_N, (row_dot_N - high_N).to(given)]
    grad_and_dot_Nc = torch.cat([grad_NC, torch.stack(parts, 1).neg_()], 1)
    grad_NC = grad_and_dot_Nc[:, :channels]  # contiguous rows whichever way the gradient came
    value_and_ones_Mc = torch.cat([value_MC, value_MC.new_ones(keys, len(parts))], 1)
    query_and_sum_Nd = torch.cat([query_ND.to(exact), logsumexp_N.neg().unsqueeze(1)], 1)
    key_and_one_Md = torch.cat([key_MD.to(exact), logsumexp_N.new_ones(keys, 1)], 1)

    shape = block_shape(queries, query_ND.device)
    exact_memory, memory = ReusedMemory(logsumexp_N), ReusedMemory(grad_NC)
    grad_query_ND = torch.zeros_like(query_ND, dtype=exact)
    least = _LOG2_E * least_exponent(exact)
    tiles = _blocks(queries, shape.columns)
    for block in _blocks(keys, shape.rows):
        rows = block.stop - block.start
        grad_key_mD = logsumexp_N.new_zeros(rows, query_ND.shape[1])
        if len(tiles) != 1:
            grad_value_mC = exact_memory.take("grad value", rows, channels).zero_()
        for tile in tiles:
            # In powers of 2, which take a CPU a quarter of the time of those of e. Queries rounded
            # with the factor would give other scores than the forward pass had.
            factors = (key_and_one_Md[block], query_and_sum_Nd[tile].T)
            scores_mn = _product(*factors, exact_memory, "scores", _LOG2_E)
            # Exactly computed it is never positive; of huge scores, rounding leaves more.
            attention_mn = _cast(scores_mn.clamp_(least, 0).exp2_(), memory, "attention")
            if len(tiles) == 1:
                grad_value_mC = _product(attention_mn, grad_NC, memory, "product")
            elif given == exact:
                grad_value_mC.addmm_(attention_mn, grad_NC[tile])
            else:
                product_mC = _product(attention_mn, grad_NC[tile], memory, "product")
                grad_value_mC += _cast(product_mC, exact_memory, "part")
            grad_scores_mn = _product(
                value_and_ones_Mc[block], grad_and_dot_Nc[tile].T, memory, "grad scores"
            )
            grad_scores_mn.mul_(attention_mn)
            grad_key_mD += grad_scores_mn @ query_ND[tile]
            grad_query_ND[tile] += grad_scores_mn.T @ key_MD[block]
        grad_key_MD[block] = grad_key_mD
        grad_value_MC[block] = grad_value_mC
    return grad_query_ND
