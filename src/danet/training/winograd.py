"""Wide 3x3 convolutions and their gradients in training on a CPU: Winograd's."""

import functools

import torch
from torch import Tensor, nn

from danet import winograd
from danet.kernels.memory import MemoryPool
from danet.kernels.precision import without_autocast

_OVERHEADS = {torch.float32: (800, 5.0), torch.bfloat16: (450, 2.4)}
"""What the filters' transforms and each tile take, in pixels of features of a direct convolution.

Fitted to the times of convolutions with 256 to 2048 channels, forward and backward.
"""


def use_winograd(model: nn.Module) -> None:
    """Has the network's wide 3x3 convolutions computed by `danet.winograd`, in place.

    They stay the modules that they are, and take the direct way where it is faster.
    """
    pool = MemoryPool()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and winograd.pays(module):
            ways = {
                dtype: winograd.TiledConvolution(dtype, module.dilation[0], pool)
                for dtype in (torch.float32, torch.bfloat16)
                if winograd.pays(module, dtype)
            }
            layer: nn.Module = module
            layer.forward = functools.partial(_forward, module, ways)


def _forward(
    layer: nn.Conv2d, ways: dict[torch.dtype, winograd.TiledConvolution], features: Tensor
) -> Tensor:
    """B C H W -> B O H W in autocast's dtype where that is on."""
    in_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if in_autocast else features.dtype
    tiled = ways.get(dtype)
    if (
        tiled is None
        or layer.weight.dtype != torch.float32
        or not tiled.saves_time(features, _OVERHEADS[tiled.dtype])
    ):
        return nn.Conv2d.forward(layer, features)
    with without_autocast("cpu"):
        output = winograd.convolve(features.to(dtype), layer.weight, tiled)
        return output if layer.bias is None else output + layer.bias.to(dtype).view(-1, 1, 1)
