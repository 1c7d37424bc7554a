"""3x3 convolutions with 2.25 times fewer multiplications, for inference in float32 on a CPU.

Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.1): for each tile d of 4 x 4
inputs and each 3 x 3 filter g, the 2 x 2 outputs are

    Y = A^T [ (G g G^T) * (B^T d B) ] A

and * is, over all tiles and channels, 16 matrix products. In exact arithmetic this is the
convolution; in float32 it differs from the direct one by rounding alone (about 1e-6).

Shapes: B batch, H W C the channels-last input, O output channels, T tiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.kernels.blocks import fast_exact_float32

_FILTER_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G, 4 x 3."""
_STRIP_ELEMENTS = 4 << 20
"""Transformed inputs held at a time: 16 MB."""
_MIN_CHANNELS = 256
"""Below, what is saved does not pay for the transforms."""


def pays(convolution: nn.Conv2d) -> bool:
    """Whether a convolution can be done this way, and is faster so."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.groups == 1
        and convolution.padding == convolution.dilation
        and convolution.dilation[0] == convolution.dilation[1]
        and convolution.padding_mode == "zeros"
        and min(convolution.in_channels, convolution.out_channels) >= _MIN_CHANNELS
    )


class WinogradConv2d(nn.Module):
    """Computes what a 3x3 convolution of stride 1 that keeps the size does: B C H W -> B O H W."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight_OCyx = convolution.weight.detach()
        transform = weight_OCyx.new_tensor(_FILTER_TRANSFORM)
        weight_ijCO = torch.einsum("iy,ocyx,jx->ijco", transform, weight_OCyx, transform)
        self.weight = nn.Parameter(weight_ijCO.flatten(0, 1).contiguous(), requires_grad=False)
        self.bias = convolution.bias
        self.dilation = convolution.dilation[0]

    def forward(self, features: Tensor) -> Tensor:
        input_BHWC = features.permute(0, 2, 3, 1)
        if self.dilation == 1:
            return self._convolve(input_BHWC).permute(0, 3, 1, 2)
        # Every d-th row and column are a picture of their own, that nothing else mixes with.
        step = self.dilation
        batch, height, width, channels = input_BHWC.shape
        padded = F.pad(input_BHWC, (0, 0, 0, -width % step, 0, -height % step))
        rows, columns = padded.shape[1] // step, padded.shape[2] // step
        apart = padded.reshape(batch, rows, step, columns, step, channels).permute(0, 2, 4, 1, 3, 5)
        output = self._convolve(apart.reshape(-1, rows, columns, channels))
        together = output.view(batch, step, step, rows, columns, -1).permute(0, 3, 1, 4, 2, 5)
        full_BHWO = together.reshape(batch, rows * step, columns * step, -1)
        return full_BHWO[:, :height, :width].permute(0, 3, 1, 2)

    def _convolve(self, input_BHWC: Tensor) -> Tensor:
        """B H W C -> B H W O."""
        batch, height, width, channels = input_BHWC.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2
        padded = F.pad(input_BHWC, (0, 0, 1, 2 * columns - width + 1, 1, 2 * rows - height + 1))
        output = input_BHWC.new_empty(batch, rows, 2, columns, 2, self.weight.shape[2])
        strip = max(1, _STRIP_ELEMENTS // (16 * batch * columns * channels))
        for first in range(0, rows, strip):
            last = min(first + strip, rows)
            inputs_16TC = _transform_inputs(padded[:, 2 * first : 2 * last + 2], columns)
            with fast_exact_float32(inputs_16TC.device):
                products_16TO = torch.bmm(inputs_16TC, self.weight)
            shape = (4, 4, batch, last - first, columns, -1)
            self._transform_outputs(products_16TO.view(shape), output[:, first:last])
        return output.view(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]

    def _transform_outputs(self, products: Tensor, output: Tensor) -> None:
        """A^T m A: 4 4 B rows columns O -> B rows 2 columns 2 O."""
        for down, across in enumerate(_pair(products)):
            for right, pixels in enumerate(_pair(across)):
                target = output[:, :, down, :, right]
                if self.bias is None:
                    target.copy_(pixels)
                else:
                    torch.add(pixels, self.bias, out=target)


def _pair(four: Tensor) -> tuple[Tensor, Tensor]:
    """A^T on the first axis: 4 ... -> 2 of ..."""
    return four[0] + four[1] + four[2], four[1] - four[2] - four[3]


def _transform_inputs(strip: Tensor, columns: int) -> Tensor:
    """B^T d B of every 4 x 4 tile, two apart: B 2n+2 2columns+2 C -> 16 T C."""
    batch, height, _, channels = strip.shape
    rows = height // 2 - 1
    output = strip.new_empty(4, 4, batch, rows, columns, channels)
    down = [strip[:, i : i + 2 * rows - 1 : 2] for i in range(4)]
    half_way = (down[0] - down[2], down[1] + down[2], down[2] - down[1], down[1] - down[3])
    for target, part in zip(output, half_way, strict=True):
        right = [part[:, :, i : i + 2 * columns - 1 : 2] for i in range(4)]
        torch.sub(right[0], right[2], out=target[0])
        torch.add(right[1], right[2], out=target[1])
        torch.sub(right[2], right[1], out=target[2])
        torch.sub(right[1], right[3], out=target[3])
    return output.view(16, -1, channels)
