"""Equations (1) and (2) of the paper, evaluated in O(N) memory.

One exact result, four ways to it:

- matrix products on blocks (`danet.kernels.blocks`): on every device and in every dtype;
- our Triton kernels (`danet.kernels.triton_attention`), where `danet.kernels.hopper` says so;
- forward in bfloat16 on CPUs with AMX, torch's fused kernel (`danet.kernels.amx`);
- torch's fused attention (`danet.kernels.fused`): for half precision on other NVIDIA GPUs of
  compute capability 8.0 and above, and for wider keys.

All but the last are inside one torch operator, `attend`.

Shapes: B batch, D key width, C value width, N query positions, M key positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from danet.kernels import amx, blocks
from danet.kernels.fused import attend_by_heads, fused_attention_fits
from danet.kernels.hopper import hopper_kernels_fit, run_hopper_kernels
from danet.kernels.precision import score_dtype, without_autocast

__all__ = [
    "attend",
    "attend_backward",
    "position_attention",
]


def position_attention(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    """Output B C N by the best way for the inputs, which must be of one device and dtype.

    Custom operators silently drop forward-mode tangents, so inputs that have them take the plain
    form, which holds N x N.
    """
    if any(_has_tangent(tensor) for tensor in (query_BDN, key_BDM, value_BCM)):
        return _plain(query_BDN, key_BDM, value_BCM)
    fits_hopper = hopper_kernels_fit(query_BDN, value_BCM)
    if not fits_hopper and fused_attention_fits(query_BDN, value_BCM):
        return attend_by_heads(query_BDN, key_BDM, value_BCM)
    output_BCN: Tensor
    output_BCN, _ = attend(query_BDN, key_BDM, value_BCM)
    return output_BCN


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _plain(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> Tensor:
    exact = score_dtype(query_BDN.dtype)
    with without_autocast(query_BDN.device.type):
        scores_BNM = query_BDN.transpose(1, 2).to(exact) @ key_BDM.to(exact)
        weights_BNM = scores_BNM.softmax(2).to(value_BCM.dtype)
        return value_BCM @ weights_BNM.transpose(1, 2)


@torch.library.custom_op("danet::position_attention", mutates_args=())
def attend(query_BDN: Tensor, key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    """Output B C N in the value's dtype, and the log-sum-exp B N of each row of scores.

    The log-sum-exp has no gradient.
    """
    if hopper_kernels_fit(query_BDN, value_BCM):
        found = run_hopper_kernels("forward", query_BDN, key_BDM, value_BCM)
        if found is not None:
            output_BCN, logsumexp_BN = found
            return output_BCN, logsumexp_BN
    if amx.fits(query_BDN, value_BCM):
        return amx.forward(query_BDN, key_BDM, value_BCM)
    return blocks.forward(query_BDN, key_BDM, value_BCM)


@torch.library.custom_op("danet::position_attention_backward", mutates_args=())
def attend_backward(
    grad_BCN: Tensor,
    query_BDN: Tensor,
    key_BDM: Tensor,
    value_BCM: Tensor,
    output_BCN: Tensor,
    logsumexp_BN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped and typed as these."""
    inputs = (grad_BCN, query_BDN, key_BDM, value_BCM, output_BCN, logsumexp_BN)
    if hopper_kernels_fit(query_BDN, value_BCM):
        found = run_hopper_kernels("backward", *inputs)
        if found is not None:
            query_grad, key_grad, value_grad = found
            return query_grad, key_grad, value_grad
    return blocks.backward(*inputs)


@attend.register_fake
def _(query_BDN: Tensor, _key_BDM: Tensor, value_BCM: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, _ = value_BCM.shape
    queries = query_BDN.shape[2]
    return (
        value_BCM.new_empty(batch, queries, channels).transpose(1, 2),
        query_BDN.new_empty(batch, queries, dtype=score_dtype(query_BDN.dtype)),
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
    def transposed(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)

    return transposed(query_BDN), transposed(key_BDM), transposed(value_BCM)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(
    ctx: torch.autograd.function.BackwardCFunction, grad_BCN: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = attend_backward(grad_BCN, *ctx.saved_tensors)
    return gradients


attend.register_autograd(_differentiate, setup_context=_save_for_backward)


# torch's counter, which `danet bench` counts with, takes shapes: 2 operations a multiply-add.
@register_flop_formula(torch.ops.danet.position_attention)
def _(query: Any, _key: Any, value: Any, **_: Any) -> int:
    batch, key_width, queries = query
    _, channels, keys = value
    return int(2 * batch * queries * keys * (key_width + channels))


@register_flop_formula(torch.ops.danet.position_attention_backward)
def _(_grad: Any, query: Any, _key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, key_width, queries = query
    _, channels, keys = value
    return int(2 * batch * queries * keys * (3 * key_width + 2 * channels))
