"""3x3 convolutions with 2.25 times fewer multiplications, for inference on a CPU.

Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.1): for each tile d of 4 x 4
inputs and each 3 x 3 filter g, the 2 x 2 outputs are

    Y = A^T [ (G g G^T) * (B^T d B) ] A

and * is, over all tiles and channels, 16 matrix products. In exact arithmetic this is the
convolution; in float32 it differs from the direct one by rounding alone (about 1e-6). In bfloat16
what is rounded between the steps doubles the error of a layer, 3e-3 of its output to 6e-3.

A convolution of dilation d is an ordinary one on each of its d x d phases, the pictures of every
d-th row and column. Strips of tile rows, of one phase or several, are transformed at a time: small
enough for the cache, in memory that is used again.

Shapes: B batch, H W C the channels-last input, O output channels; of a strip P phases, R rows and
S columns of tiles, T = P B R S tiles.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from danet.convolution import Conv2dStandIn, has_hooks
from danet.kernels.cpu import has_amx
from danet.kernels.memory import ReusedMemory
from danet.kernels.precision import fast_exact_float32

_FILTER_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G, 4 x 3."""
_STRIP_ELEMENTS = 12 << 20
"""Transformed inputs and outputs held at a time: 48 MB in float32."""
_MIDDLE = 5
"""The product that is a term of all four outputs of its tile: second of 4, both ways."""
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

    Args:
        convolution: in float32 or wider.
        dtype: to compute in; the convolution's own where None.
        rectify: whether a ReLU follows.
    """

    def __init__(
        self, convolution: nn.Conv2d, dtype: torch.dtype | None = None, *, rectify: bool = False
    ) -> None:
        super().__init__(convolution)
        weight_yxCO = convolution.weight.detach().permute(2, 3, 1, 0)
        transform = weight_yxCO.new_tensor(_FILTER_TRANSFORM)
        weight_ijCO = weight_yxCO.new_empty(4, 4, *weight_yxCO.shape[2:], dtype=dtype)
        for row_y, target_jCO in zip(transform, weight_ijCO, strict=True):
            target_jCO.copy_(torch.einsum("y,yxco,jx->jco", row_y, weight_yxCO, transform))
        self.weight = nn.Parameter(weight_ijCO.flatten(0, 1), requires_grad=False)
        self.bias = convolution.bias
        self.rectify = rectify

    def forward(self, features: Tensor) -> Tensor:
        input_BHWC = features.to(self.weight.dtype).permute(0, 2, 3, 1)
        batch, height, width, channels = input_BHWC.shape
        out_channels = self.weight.shape[2]
        output_BHWO = input_BHWC.new_empty(batch, height, width, out_channels)
        rows, columns = (-(-side // (2 * self.dilation[0])) for side in (height, width))
        most = max(1, _STRIP_ELEMENTS // (16 * batch * columns * (channels + out_channels)))
        together, strip_rows = max(1, most // rows), min(most, rows)
        pairs = list(zip(self._phases(input_BHWC), self._phases(output_BHWO), strict=True))
        strips = [
            (pairs[start : start + together], range(first, min(first + strip_rows, rows)))
            for start in range(0, len(pairs), together)
            for first in range(0, rows, strip_rows)
        ]
        memory = ReusedMemory(input_BHWC)
        # Without data only memory is asked for, of which later strips need no more than the first.
        for phases, strip in strips[:1] if isinstance(features, FakeTensor) else strips:
            inputs, outputs = zip(*phases, strict=True)
            transformed = _transform_inputs(inputs, strip, columns, memory)
            products = memory.take("products", 16, transformed.shape[1], out_channels)
            with fast_exact_float32(features.device):
                torch.bmm(transformed, self.weight, out=products)
            if self.bias is not None:
                products[_MIDDLE] += self.bias
            _transform_outputs(products, outputs, strip, columns, memory)
            if self.rectify:
                for phase_BhwO in outputs:
                    phase_BhwO[:, 2 * strip.start : 2 * strip.stop].relu_()
        return output_BHWO.permute(0, 3, 1, 2)

    def _phases(self, pixels_BHWX: Tensor) -> Iterator[Tensor]:
        step = self.dilation[0]
        for top in range(min(step, pixels_BHWX.shape[1])):
            for left in range(min(step, pixels_BHWX.shape[2])):
                yield pixels_BHWX[:, top::step, left::step]


def _transform_inputs(
    phases: Sequence[Tensor], strip: range, columns: int, memory: ReusedMemory
) -> Tensor:
    """B^T d B of every 4 x 4 tile, two apart: P phases B h w C -> 16 T C."""
    rows, (batch, *_, channels) = len(strip), phases[0].shape
    shape = (len(phases), batch, rows, columns, channels)
    padded = memory.take("padded", len(phases), batch, 2 * rows + 2, 2 * columns + 2, channels)
    for phase, target in zip(phases, padded, strict=True):
        _copy_padded(phase, 2 * strip.start - 1, target)
    half_way = memory.take("half way", 4, *shape[:3], 2 * columns + 2, channels)
    output = memory.take("inputs", 4, 4, *shape)
    _transform_four([padded[:, :, i : i + 2 * rows - 1 : 2] for i in range(4)], half_way)
    for part, target in zip(half_way, output, strict=True):
        _transform_four([part[:, :, :, i : i + 2 * columns - 1 : 2] for i in range(4)], target)
    return output.view(16, -1, channels)


def _copy_padded(picture: Tensor, top: int, target: Tensor) -> None:
    """Fills the target with the picture's rows from `top` and columns from -1, and zeros beyond.

    Args:
        picture, target: B rows columns C.
    """
    height, width = picture.shape[1:3]
    above = max(-top, 0)
    below = max(min(height - top, target.shape[1]), above)
    target[:, :above] = 0
    target[:, below:] = 0
    target[:, above:below, 0] = 0
    target[:, above:below, 1 + width :] = 0
    target[:, above:below, 1 : 1 + width] = picture[:, top + above : top + below]


def _transform_four(four: Sequence[Tensor], out: Tensor) -> None:
    """B^T: four slices -> 4 ..."""
    torch.sub(four[0], four[2], out=out[0])
    torch.add(four[1], four[2], out=out[1])
    torch.sub(four[2], four[1], out=out[2])
    torch.sub(four[1], four[3], out=out[3])


def _transform_outputs(
    products: Tensor, phases: Sequence[Tensor], strip: range, columns: int, memory: ReusedMemory
) -> None:
    """A^T m A: 16 T O -> the strip's rows of P phases B h w O."""
    batch, channels = phases[0].shape[0], phases[0].shape[3]
    shape = (len(phases), batch, len(strip), columns, channels)
    ij = products.view(4, 4, *shape)
    half_way = memory.take("outputs", 2, 4, *shape)
    torch.add(ij[0], ij[1], out=half_way[0]).add_(ij[2])
    torch.sub(ij[1], ij[2], out=half_way[1]).sub_(ij[3])
    for down, four in enumerate(half_way):
        _write(torch.add, four[0].add_(four[1]), four[2], phases, strip, (down, 0))
        _write(torch.sub, four[1].sub_(four[2]), four[3], phases, strip, (down, 1))


def _write(
    operation: Callable[..., Tensor],
    first: Tensor,
    second: Tensor,
    phases: Sequence[Tensor],
    strip: range,
    corner: tuple[int, int],
) -> None:
    """Puts first + second or first - second into one corner of every tile, but not beyond the
    picture: P B R S O each -> P phases B h w O."""
    down, right = corner
    for one, other, phase in zip(first, second, phases, strict=True):
        target = phase[:, 2 * strip.start + down : 2 * strip.stop : 2, right::2]
        rows, columns = target.shape[1:3]
        operation(one[:, :rows, :columns], other[:, :rows, :columns], out=target)
