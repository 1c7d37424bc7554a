"""The convolution as a differentiable function."""

from typing import Any

import torch
from torch import Tensor

from danet.winograd.tiles import TiledConvolution


def convolve(features: Tensor, weight: Tensor, tiled: TiledConvolution) -> Tensor:
    """B C H W in the dtype of `tiled` and O C 3 3, float32 or wider -> B O H W; differentiable."""
    output: Tensor = _Convolution.apply(features, weight, tiled)
    return output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, tiled: TiledConvolution) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.tiled = tiled
        return tiled.convolve(features, tiled.filters(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        tiled: TiledConvolution = ctx.tiled
        of_features: Tensor | None = None
        of_weight: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_features = tiled.convolve(grad, tiled.filters(weight, adjoint=True))
        if ctx.needs_input_grad[1]:
            of_weight = tiled.filters_gradient(features, grad)
        return of_features, of_weight, None
