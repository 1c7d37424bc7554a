"""A convolution, and the gradient of its filters, over tiles.

Over all tiles and channels, what `danet.winograd.transforms` does element by element is 16 or 36
matrix products. A convolution of dilation d is an ordinary one on each of its d x d phases, the
pictures of every d-th row and column. Strips of tile rows, of one phase or several, are transformed
at a time: small enough for the cache, in memory that is used again.

Shapes: B batch, H W C the channels-last input, O output channels; m outputs and n = m + 2 inputs
of a tile each way; of a strip P phases, R rows and S columns of tiles, T = P B R S tiles.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from danet.kernels.memory import MemoryPool, ReusedMemory
from danet.kernels.precision import fast_exact_float32
from danet.winograd.transforms import FourByFour, Transforms, TwoByTwo

_STRIP_ELEMENTS = 12 << 20
"""Transformed inputs and outputs held at a time."""
_LEAST_TILES = 128
"""In a strip, even if that is more: the weights of fewer take longer to fetch than to multiply."""
_FILTERS_TOGETHER = 64 << 10
"""Transformed at a time: all of them in float32 would be several times the weight."""
_GRADIENT_CHANNELS = 256
"""Input channels whose filters' gradient is computed at a time."""


@dataclasses.dataclass(frozen=True)
class _Strip:
    """Some rows of tiles of one phase or several.

    Attributes:
        inputs: P phases B h w C.
        outputs: P phases B h w O; or their gradients.
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


class TiledConvolution:
    """A 3x3 convolution of stride 1 that keeps the size, and its filters' gradient.

    Args:
        dtype: to compute in.
        dilation: each way.
        pool: memory for what is transformed.
    """

    def __init__(self, dtype: torch.dtype, dilation: int, pool: MemoryPool) -> None:
        self.transforms: Transforms = TwoByTwo() if dtype == torch.bfloat16 else FourByFour()
        self.dtype = dtype
        self.dilation = dilation
        self.pool = pool

    def filters(self, weight: Tensor, *, adjoint: bool = False) -> Tensor:
        """G g G^T of all filters: O C 3 3, float32 or wider -> n*n C O in `dtype`.

        Args:
            adjoint: of the convolution that gives the inputs' gradient, n*n O C: it reads the same
                filters backwards.
        """
        out_channels, channels = weight.shape[:2]
        both_ways = self._both_ways(weight)
        if adjoint:
            both_ways = both_ways.flip(1)
        filters = weight.new_empty(self._side**2, out_channels, channels, dtype=self.dtype)
        taps_9OC = weight.permute(2, 3, 0, 1).flatten(0, 1)
        number = max(_FILTERS_TOGETHER // channels, 1)
        for start in range(0, out_channels, number):
            some = slice(start, start + number)
            transformed = both_ways @ taps_9OC[:, some].reshape(9, -1)
            filters[:, some] = transformed.view(len(filters), -1, channels)
        return filters if adjoint else filters.mT

    def _both_ways(self, like: Tensor) -> Tensor:
        """G for all taps of a filter at once: n*n 9."""
        one_way = like.new_tensor(self.transforms.filters())
        return torch.kron(one_way, one_way)

    def convolve(
        self,
        features: Tensor,
        filters: Tensor,
        bias: Tensor | None = None,
        *,
        rectify: bool = False,
    ) -> Tensor:
        """B C H W in `dtype` and what `filters` gave -> B O H W in channels-last memory.

        Args:
            rectify: whether a ReLU follows.
        """
        batch, _, height, width = features.shape
        out_channels = filters.shape[2]
        # Not a view, to which autograd could not add another gradient in place.
        strides = (height * width * out_channels, 1, width * out_channels, out_channels)
        output = features.new_empty_strided((batch, out_channels, height, width), strides)
        if batch == 0:
            return output
        input_BHWC, output_BHWO = features.permute(0, 2, 3, 1), output.permute(0, 2, 3, 1)
        with self.pool.borrow(input_BHWC) as memory:
            for strip in self._strips(input_BHWC, output_BHWO, input_BHWC.shape[3]):
                inputs = self._transform_inputs(strip, memory)
                products = self._take(memory, "outputs", strip, filters.shape[2])
                spare = memory.take("spare", self._side + 1, *products.shape[2:])
                if isinstance(input_BHWC, FakeTensor):
                    break  # Only memory is asked for, and later strips need no more.
                factors = (inputs.flatten(2, -2).flatten(0, 1), filters)
                with fast_exact_float32(input_BHWC.device):
                    torch.bmm(*factors, out=products.flatten(2, -2).flatten(0, 1))
                for down, row in enumerate(self.transforms.combine(products, spare[:-1])):
                    for right, pixels in enumerate(self.transforms.combine(row, spare[-1])):
                        self._write(pixels, strip, (down, right), bias, rectify)
        return output

    def filters_gradient(self, features: Tensor, grad: Tensor) -> Tensor:
        """That of the weight, O C 3 3 in float32 or wider, from inputs and the outputs' gradient.

        In channels-last memory, as weights are; else it would be copied.

        By `_GRADIENT_CHANNELS` at a time, because n*n O C sums would be several times the weight.
        """
        input_BHWC, grad_BHWO = features.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        channels, out_channels = features.shape[1], grad.shape[1]
        exact = torch.promote_types(self.dtype, torch.float32)
        gradient_O9C = input_BHWC.new_zeros(out_channels, 9, channels, dtype=exact)
        gradient = gradient_O9C.view(out_channels, 3, 3, channels).permute(0, 3, 1, 2)
        back = self._both_ways(gradient).T
        pieces = range(0, channels, _GRADIENT_CHANNELS)
        with self.pool.borrow(input_BHWC) as memory:
            for strip in self._strips(input_BHWC, grad_BHWO, min(channels, _GRADIENT_CHANNELS)):
                gradients = self._spread_gradients(strip, memory).flatten(2, -2).flatten(0, 1)
                for piece in (slice(start, start + _GRADIENT_CHANNELS) for start in pieces):
                    some = [phase[..., piece] for phase in strip.inputs]
                    of_piece = dataclasses.replace(strip, inputs=some)
                    inputs = self._transform_inputs(of_piece, memory).flatten(2, -2).flatten(0, 1)
                    sums = memory.take("sums", len(inputs), out_channels, inputs.shape[2])
                    if isinstance(input_BHWC, FakeTensor):
                        return gradient
                    with fast_exact_float32(input_BHWC.device):
                        torch.bmm(gradients.mT, inputs, out=sums)
                        found = back @ sums.flatten(1).to(exact)
                    gradient_O9C[..., piece] += found.view(9, *sums.shape[1:]).transpose(0, 1)
        return gradient

    def tiles(self, batch: int, height: int, width: int) -> int:
        """How many it takes for pictures of this size; those of small phases reach beyond them."""
        rows, columns = self._grid(height, width)
        return batch * min(self.dilation, height) * min(self.dilation, width) * rows * columns

    def saves_time(self, features: Tensor, overheads: tuple[float, float]) -> bool:
        """Whether it is faster than a direct convolution of B C H W.

        Args:
            overheads: what it and each tile take, in pixels of features of a direct convolution.
        """
        batch, _, height, width = features.shape
        once, of_tile = overheads
        return once + of_tile * self.tiles(batch, height, width) < batch * height * width

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles of the largest phase."""
        step = self.transforms.outputs * self.dilation
        return -(-height // step), -(-width // step)

    @property
    def _side(self) -> int:
        """n."""
        return self.transforms.outputs + 2

    def _strips(self, input_BHWC: Tensor, output_BHWO: Tensor, channels: int) -> list[_Strip]:
        """Such that so many input channels and all outputs of one are few enough."""
        batch, height, width, out_channels = output_BHWO.shape
        rows, columns = self._grid(height, width)
        elements = self._side**2 * (channels + out_channels)
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
        for top in range(min(self.dilation, pixels_BHWX.shape[1])):
            for left in range(min(self.dilation, pixels_BHWX.shape[2])):
                yield pixels_BHWX[:, top :: self.dilation, left :: self.dilation]

    def _take(self, memory: ReusedMemory, name: str, strip: _Strip, channels: int) -> Tensor:
        """n n P B R S X."""
        return memory.take(name, self._side, self._side, *strip.tiles, channels)

    def _transform_inputs(self, strip: _Strip, memory: ReusedMemory) -> Tensor:
        """B^T d B of every tile: n n P B R S C."""
        transformed = self._take(memory, "inputs", strip, strip.inputs[0].shape[3])
        self._transform(strip, strip.inputs, 1, self.transforms.inputs, transformed, memory)
        return transformed

    def _spread_gradients(self, strip: _Strip, memory: ReusedMemory) -> Tensor:
        """A D A^T of every tile: n n P B R S O."""
        spread = self._take(memory, "outputs", strip, strip.outputs[0].shape[3])
        self._transform(strip, strip.outputs, 0, self.transforms.spread, spread, memory)
        return spread

    def _transform(
        self,
        strip: _Strip,
        phases: Sequence[Tensor],
        margin: int,
        one_way: Callable[[Sequence[Tensor], Tensor], None],
        out: Tensor,
        memory: ReusedMemory,
    ) -> None:
        """Transforms tiles, which reach beyond their outputs by the margin, one way and the other.

        Args:
            out: n n P B R S X.
        """
        step = self.transforms.outputs
        *tiles, channels = out.shape[2:]
        height, width = (step * number + 2 * margin for number in tiles[2:])
        padded = memory.take("padded", *tiles[:2], height, width, channels)
        half_way = memory.take("half way", self._side, *tiles[:3], width, channels)
        for phase, target in zip(phases, padded, strict=True):
            _copy_padded(phase, step * strip.rows.start - margin, -margin, target)
        offsets = range(step + 2 * margin)
        last_row, last_column = (length - len(offsets) for length in (height, width))
        one_way([padded[:, :, i : i + last_row + 1 : step] for i in offsets], half_way)
        for part, target in zip(half_way, out, strict=True):
            one_way([part[..., i : i + last_column + 1 : step, :] for i in offsets], target)

    def _write(
        self,
        pixels: Tensor,
        strip: _Strip,
        offset: tuple[int, int],
        bias: Tensor | None,
        rectify: bool,
    ) -> None:
        """One pixel of every tile, P B R S O; not beyond the picture."""
        (down, right), outputs = offset, self.transforms.outputs
        rows = slice(outputs * strip.rows.start + down, outputs * strip.rows.stop, outputs)
        for of_phase, phase in zip(pixels, strip.outputs, strict=True):
            target = phase[:, rows, right::outputs]
            inside = of_phase[:, : target.shape[1], : target.shape[2]]
            if bias is None:
                target.copy_(inside)
            else:
                torch.add(inside, bias, out=target)
            if rectify:
                target.relu_()


def _even_share(number: int, most: int) -> int:
    """The size of as few shares as hold at most so many each, and at least one."""
    shares = -(-number // max(most, 1))
    return -(-number // shares)


def _copy_padded(picture: Tensor, top: int, left: int, target: Tensor) -> None:
    """Fills the target with the picture from this row and column on, and zeros beyond it.

    Args:
        picture, target: B rows columns C.
        left: not positive.
    """
    height, width = picture.shape[1:3]
    above = max(-top, 0)
    below = max(min(height - top, target.shape[1]), above)
    target[:, :above] = 0
    target[:, below:] = 0
    target[:, above:below, :-left] = 0
    target[:, above:below, width - left :] = 0
    target[:, above:below, -left : width - left] = picture[:, top + above : top + below]
