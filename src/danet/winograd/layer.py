"""A layer in place of a convolution, for inference."""

import copy

import torch
from torch import Tensor, nn

from danet.convolution import Conv2dStandIn, has_hooks
from danet.kernels.cpu import has_amx
from danet.kernels.memory import MemoryPool
from danet.winograd.tiles import TiledConvolution

_LARGE_DILATION = 8
"""From here on small features have phases that are smaller than a tile."""
_OVERHEADS = {torch.float32: (120, 8.0), torch.bfloat16: (80, 3.5)}
"""For `saves_time`, of convolutions of such dilations."""
_MIN_CHANNELS = {torch.float32: 256, torch.bfloat16: 512}
"""Below, what is saved does not pay for the transforms."""


def pays(convolution: nn.Conv2d, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a convolution can be done this way in float32 or bfloat16, and is faster so."""
    return (
        not (dtype == torch.bfloat16 and has_amx())
        and type(convolution) is nn.Conv2d
        and convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.groups == 1
        and convolution.padding == convolution.dilation
        and convolution.dilation[0] == convolution.dilation[1]
        and convolution.padding_mode == "zeros"
        and min(convolution.in_channels, convolution.out_channels) >= _MIN_CHANNELS[dtype]
        and not has_hooks(convolution)
    )


class WinogradConv2d(Conv2dStandIn):
    """Computes what a 3x3 convolution of stride 1 that keeps the size does: B C H W -> B O H W.

    It has no gradient. Of small features a convolution of a large dilation is done directly.

    Args:
        convolution: in float32 or wider.
        dtype: to compute in; the convolution's own where None.
        rectify: whether a ReLU follows.
        pool: memory for what is transformed, its own where None.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        dtype: torch.dtype | None = None,
        *,
        rectify: bool = False,
        pool: MemoryPool | None = None,
    ) -> None:
        super().__init__(convolution)
        dtype = dtype or convolution.weight.dtype
        self.tiled = TiledConvolution(dtype, convolution.dilation[0], pool or MemoryPool())
        filters = self.tiled.filters(convolution.weight.detach())
        self.weight = nn.Parameter(filters, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if convolution.bias is not None:
            self.bias = nn.Parameter(convolution.bias.detach().to(dtype), requires_grad=False)
        self.rectify = rectify
        self.overheads = _OVERHEADS.get(dtype, _OVERHEADS[torch.float32])
        self.direct: nn.Conv2d | None = None
        if convolution.dilation[0] >= _LARGE_DILATION:
            direct = copy.deepcopy(convolution).requires_grad_(False)
            self.direct = direct.to(dtype).to(memory_format=torch.channels_last)

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.weight.dtype)
        if self.direct is not None and not self.tiled.saves_time(features, self.overheads):
            output: Tensor = self.direct(features)
            return output.relu_() if self.rectify else output
        return self.tiled.convolve(features, self.weight, self.bias, rectify=self.rectify)
