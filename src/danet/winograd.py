"""3x3 convolutions with fewer multiplications, for inference on a CPU: Winograd's.

Over all tiles and channels, what `danet.winograd_transforms` does element by element is 16 or 36
matrix products. In exact arithmetic this is the convolution. float32 takes F(4x4, 3x3) and differs
from the direct one by rounding alone (2e-6 of the output). bfloat16 takes F(2x2, 3x3): what is
rounded between the steps doubles the error of a layer, 3e-3 of its output to 6e-3, and would make
it 17e-3 with F(4x4, 3x3).

A convolution of dilation d is an ordinary one on each of its d x d phases, the pictures of every
d-th row and column. Strips of tile rows, of one phase or several, are transformed at a time: small
enough for the cache, in memory that is used again.

Shapes: B batch, H W C the channels-last input, O output channels; m outputs and n = m + 2 inputs
of a tile each way; of a strip P phases, R rows and S columns of tiles, T = P B R S tiles.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from danet.convolution import Conv2dStandIn, has_hooks
from danet.kernels.cpu import has_amx
from danet.kernels.memory import MemoryPool, ReusedMemory
from danet.kernels.precision import fast_exact_float32
from danet.winograd_transforms import FourByFour, Transforms, TwoByTwo

_STRIP_ELEMENTS = 12 << 20
"""Transformed inputs and outputs held at a time,"""
_LEAST_TILES = 128
"""but these at least: the weights of fewer take longer to fetch than to multiply with."""
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


@dataclasses.dataclass(frozen=True)
class _Strip:
    """Some rows of tiles of one phase or several.

    Attributes:
        inputs: P phases B h w C.
        outputs: P phases B h w O.
        rows: R tile rows.
        columns: S.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    rows: range
    columns: int

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        """P, B, R, S."""
        return len(self.inputs), self.inputs[0].shape[0], len(self.rows), self.columns


class _Workspace(NamedTuple):
    """Memory for one strip.

    Attributes:
        padded: the strip's inputs with what is around them, P B mR+2 mS+2 C.
        half_way: transformed one way, n P B R mS+2 C.
        transformed: n n P B R S C.
        products: n n P B R S O.
        spare: n+1 P B R S O.
    """

    padded: Tensor
    half_way: Tensor
    transformed: Tensor
    products: Tensor
    spare: Tensor


class WinogradConv2d(Conv2dStandIn):
    """Computes what a 3x3 convolution of stride 1 that keeps the size does: B C H W -> B O H W.

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
        self.transforms: Transforms = TwoByTwo() if dtype == torch.bfloat16 else FourByFour()
        filters = convolution.weight.new_tensor(self.transforms.filters())
        weight = convolution.weight.detach().permute(2, 3, 1, 0)
        # G g G^T of all filters at once.
        transformed = (torch.kron(filters, filters) @ weight.flatten(0, 1).flatten(1)).to(dtype)
        self.weight = nn.Parameter(transformed.view(-1, *weight.shape[2:]), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if convolution.bias is not None:
            self.bias = nn.Parameter(convolution.bias.detach().to(dtype), requires_grad=False)
        self.rectify = rectify
        self.pool = pool or MemoryPool()

    def forward(self, features: Tensor) -> Tensor:
        input_BHWC = features.to(self.weight.dtype).permute(0, 2, 3, 1)
        output_BHWO = input_BHWC.new_empty(*input_BHWC.shape[:3], self.weight.shape[2])
        strips = self._strips(input_BHWC, output_BHWO)
        with self.pool.borrow(input_BHWC) as memory:
            for strip in strips:
                workspace = self._workspace(strip, memory)
                if isinstance(features, FakeTensor):
                    break  # Only memory is asked for, and later strips need no more.
                self._transform(strip, workspace)
                factors = (workspace.transformed.flatten(2, -2).flatten(0, 1), self.weight)
                with fast_exact_float32(features.device):
                    torch.bmm(*factors, out=workspace.products.flatten(2, -2).flatten(0, 1))
                self._combine(strip, workspace)
        return output_BHWO.permute(0, 3, 1, 2)

    def _strips(self, input_BHWC: Tensor, output_BHWO: Tensor) -> list[_Strip]:
        batch, *size, channels = input_BHWC.shape
        step = self.transforms.outputs * self.dilation[0]
        rows, columns = (-(-side // step) for side in size)
        products, _, out_channels = self.weight.shape
        elements = products * (channels + out_channels)
        tiles = max(_STRIP_ELEMENTS // elements, _LEAST_TILES)
        pictures = _even_share(batch, tiles // columns)
        most = tiles // (pictures * columns)
        together, rows_of_strip = max(1, most // rows), _even_share(rows, most)
        strips = []
        shares = -(-batch // pictures)
        for some in zip(input_BHWC.chunk(shares), output_BHWO.chunk(shares), strict=True):
            phases = list(zip(*map(self._phases, some), strict=True))
            for start in range(0, len(phases), together):
                inputs, outputs = zip(*phases[start : start + together], strict=True)
                for first in range(0, rows, rows_of_strip):
                    last = min(first + rows_of_strip, rows)
                    strips.append(_Strip(inputs, outputs, range(first, last), columns))
        return strips

    def _phases(self, pixels_BHWX: Tensor) -> Iterator[Tensor]:
        step = self.dilation[0]
        for top in range(min(step, pixels_BHWX.shape[1])):
            for left in range(min(step, pixels_BHWX.shape[2])):
                yield pixels_BHWX[:, top::step, left::step]

    def _workspace(self, strip: _Strip, memory: ReusedMemory) -> _Workspace:
        outputs, side = self.transforms.outputs, self.transforms.outputs + 2
        _, channels, out_channels = self.weight.shape
        phases, batch, rows, columns = tiles = strip.tiles
        height, width = outputs * rows + 2, outputs * columns + 2
        return _Workspace(
            padded=memory.take("padded", phases, batch, height, width, channels),
            half_way=memory.take("half way", side, phases, batch, rows, width, channels),
            transformed=memory.take("inputs", side, side, *tiles, channels),
            products=memory.take("products", side, side, *tiles, out_channels),
            spare=memory.take("spare", side + 1, *tiles, out_channels),
        )

    def _transform(self, strip: _Strip, workspace: _Workspace) -> None:
        """B^T d B of every tile."""
        outputs, side = self.transforms.outputs, self.transforms.outputs + 2
        padded, half_way = workspace.padded, workspace.half_way
        for phase, target in zip(strip.inputs, padded, strict=True):
            _copy_padded(phase, outputs * strip.rows.start - 1, target)
        last_row, last_column = (length - side for length in padded.shape[2:4])
        slices = [padded[:, :, i : i + last_row + 1 : outputs] for i in range(side)]
        self.transforms.inputs(slices, half_way)
        for part, target in zip(half_way, workspace.transformed, strict=True):
            slices = [part[..., i : i + last_column + 1 : outputs, :] for i in range(side)]
            self.transforms.inputs(slices, target)

    def _combine(self, strip: _Strip, workspace: _Workspace) -> None:
        """A^T m A of every tile, with bias and ReLU."""
        spare = workspace.spare
        for down, row in enumerate(self.transforms.combine(workspace.products, spare[:-1])):
            for right, pixels in enumerate(self.transforms.combine(row, spare[-1])):
                self._write(pixels, strip, (down, right))

    def _write(self, pixels: Tensor, strip: _Strip, offset: tuple[int, int]) -> None:
        """One pixel of every tile, P B R S O; not beyond the picture."""
        (down, right), outputs = offset, self.transforms.outputs
        rows = slice(outputs * strip.rows.start + down, outputs * strip.rows.stop, outputs)
        for of_phase, phase in zip(pixels, strip.outputs, strict=True):
            target = phase[:, rows, right::outputs]
            inside = of_phase[:, : target.shape[1], : target.shape[2]]
            if self.bias is None:
                target.copy_(inside)
            else:
                torch.add(inside, self.bias, out=target)
            if self.rectify:
                target.relu_()


def _even_share(number: int, most: int) -> int:
    """The size of as few shares as hold at most so many each, and at least one."""
    shares = -(-number // max(most, 1))
    return -(-number // shares)


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
