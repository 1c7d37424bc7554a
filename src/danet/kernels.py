"""How equations (1) and (2) of the paper are evaluated in O(N) memory.

Shapes: B batch, D key width, C value width, N query positions, M key positions; a lower-case
letter is a block of that axis.

    scores_NM = query^T key      attention_NM = softmax over M      output_CN = value attention^T

The N x M matrices only ever exist as blocks: of rows in the forward pass, of columns in the
backward pass, where the gradients of a key and its value are then written once. The forward pass
keeps the log-sum-exp of each row, and the backward pass recomputes each block from it
(FlashAttention, arXiv 2205.14135, section 3.1). Blocks hold whole rows, so the softmax is the
plain one and needs no running maximum.

Scores and their softmax are float32 even for half-precision inputs: both directions then see the
same attention, and rounding the scores to bfloat16 would cost five times the accuracy.
"""

import torch
from torch import Tensor

_CPU_BLOCK_ELEMENTS = 4 << 20
"""Scores in a block on a CPU: 16 MiB of float32, so that the block is still in the third-level
cache when the next product reads it."""
_CPU_BLOCK_ROWS = (32, 256)
_DEVICE_BLOCK_ELEMENTS = 64 << 20
_DEVICE_BLOCK_ROWS = (128, 4096)


def _block_rows(row_length: int, device: torch.device) -> int:
    """How many rows of scores make a block."""
    on_cpu = device.type == "cpu"
    elements = _CPU_BLOCK_ELEMENTS if on_cpu else _DEVICE_BLOCK_ELEMENTS
    smallest, largest = _CPU_BLOCK_ROWS if on_cpu else _DEVICE_BLOCK_ROWS
    return max(smallest, min(largest, elements // max(row_length, 1)))


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@torch.library.custom_op("danet::position_attention", mutates_args=())
def attend(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    """Output B C N in the value's dtype, and the log-sum-exp B N of each row of scores."""
    batch, channels, keys = value_BCM.shape
    queries = query_BDN.shape[2]
    score_dtype = torch.promote_types(query_BDN.dtype, torch.float32)
    output_BNC = value_BCM.new_empty(batch, queries, channels)
    logsumexp_BN = query_BDN.new_empty(batch, queries, dtype=score_dtype)
    block_rows = _block_rows(keys, query_BDN.device)
    buffer_nM = query_BDN.new_empty(min(block_rows, queries), keys, dtype=score_dtype)
    for sample in range(batch):
        query_ND = query_BDN[sample].T.to(score_dtype)
        key_DM = key_BDM[sample].to(score_dtype)
        value_MC = value_BCM[sample].T
        for block in _blocks(queries, block_rows):
            scores_nM = torch.mm(query_ND[block], key_DM, out=buffer_nM[: block.stop - block.start])
            attention_nM = scores_nM.softmax(1)
            # At a row's largest score, log(attention) = score - logsumexp.
            logsumexp_BN[sample, block] = scores_nM.amax(1) - attention_nM.amax(1).log()
            torch.mm(attention_nM.to(value_MC.dtype), value_MC, out=output_BNC[sample, block])
    return output_BNC.transpose(1, 2), logsumexp_BN


@torch.library.custom_op("danet::position_attention_backward", mutates_args=())
def attend_backward(
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
    score_dtype = logsumexp_BN.dtype
    batch, key_width, queries = query_BDN.shape
    channels, keys = value_BCM.shape[1:]
    grad_query_BDN = query_BDN.new_zeros(batch, key_width, queries, dtype=score_dtype)
    grad_key_BMD = key_BDM.new_empty(batch, keys, key_width)
    grad_value_BMC = value_BCM.new_empty(batch, keys, channels)
    blocks = _blocks(keys, _block_rows(queries, query_BDN.device))
    for sample in range(batch):
        query_DN = query_BDN[sample].to(score_dtype)
        key_MD = key_BDM[sample].T.to(score_dtype)
        value_MC = value_BCM[sample].T
        grad_CN = grad_BCN[sample]
        row_dot_N = (grad_CN.to(score_dtype) * output_BCN[sample].to(score_dtype)).sum(0)
        for block in blocks:
            scores_mN = key_MD[block] @ query_DN
            attention_mN = scores_mN.sub_(logsumexp_BN[sample]).exp_()
            grad_value_BMC[sample, block] = attention_mN.to(grad_CN.dtype) @ grad_CN.T
            grad_attention_mN = (value_MC[block] @ grad_CN).to(score_dtype)
            grad_scores_mN = grad_attention_mN.sub_(row_dot_N).mul_(attention_mN)
            grad_key_BMD[sample, block] = (grad_scores_mN @ query_DN.T).to(key_BDM.dtype)
            grad_query_BDN[sample].addmm_(key_MD[block].T, grad_scores_mN)
    return (
        grad_query_BDN.to(query_BDN.dtype),
        grad_key_BMD.transpose(1, 2),
        grad_value_BMC.transpose(1, 2),
    )


@attend.register_fake
def _(query_BDN: Tensor, _key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, _ = value_BCM.shape
    queries = query_BDN.shape[2]
    score_dtype = torch.promote_types(query_BDN.dtype, torch.float32)
    return (
        value_BCM.new_empty(batch, queries, channels).transpose(1, 2),
        query_BDN.new_empty(batch, queries, dtype=score_dtype),
    )


@attend_backward.register_fake
def _(
    _grad_BCN: Tensor,
    query_BDN: Tensor,
    key_BDM: Tensor,
    value_BCM: Tensor,
    _output_BCN: Tensor,
    _logsumexp_BN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query_BDN.new_empty(query_BDN.shape),
        key_BDM.new_empty(key_BDM.transpose(1, 2).shape).transpose(1, 2),
        value_BCM.new_empty(value_BCM.transpose(1, 2).shape).transpose(1, 2),
    )


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(
    ctx: torch.autograd.function.BackwardCFunction, grad_BCN: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = attend_backward(grad_BCN, *ctx.saved_tensors)
    return gradients


attend.register_autograd(_differentiate, setup_context=_save_for_backward)
