"""The transforms of Winograd's F(2x2, 3x3) and F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308).

For each tile d of (m + 2) x (m + 2) inputs, m apart, and each 3 x 3 filter g, the m x m outputs are

    Y = A^T [ (G g G^T) * (B^T d B) ] A

where * multiplies element by element. A, B and G evaluate polynomials at m + 1 points and at
infinity. A transform goes one way and then the other; here is what it does in one of them.

Y is linear in g, so of the gradient D of Y over all tiles the filter's is

    G^T [ sum of (A D A^T) * (B^T d B) ] G
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Transforms(Protocol):
    """G, B^T, A^T and A for tiles of `outputs` pixels a side."""

    outputs: int

    def filters(self) -> list[list[float]]:
        """G, m + 2 rows of 3."""

    def inputs(self, slices: Sequence[Tensor], out: Tensor) -> None:
        """B^T: m + 2 slices of ... -> m + 2 ..."""

    def combine(self, products: Tensor, spare: Tensor) -> Sequence[Tensor]:
        """A^T: m + 2 ... -> m slices of ..., in the memory of the products and the spare one."""

    def spread(self, slices: Sequence[Tensor], out: Tensor) -> None:
        """A: m slices of ... -> m + 2 ..."""


class TwoByTwo:
    """At 0, 1, -1 and infinity: 2.25 times fewer multiplications, in section 4.1."""

    outputs = 2

    def filters(self) -> list[list[float]]:
        return [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]

    def inputs(self, slices: Sequence[Tensor], out: Tensor) -> None:
        torch.sub(slices[0], slices[2], out=out[0])
        torch.add(slices[1], slices[2], out=out[1])
        torch.sub(slices[2], slices[1], out=out[2])
        torch.sub(slices[1], slices[3], out=out[3])

    def combine(self, products: Tensor, spare: Tensor) -> Sequence[Tensor]:
        zero, one, minus_one, infinity = products
        torch.sub(one, minus_one, out=spare).sub_(infinity)
        return zero.add_(one).add_(minus_one), spare

    def spread(self, slices: Sequence[Tensor], out: Tensor) -> None:
        first, second = slices
        out[0].copy_(first)
        torch.add(first, second, out=out[1])
        torch.sub(first, second, out=out[2])
        torch.neg(second, out=out[3])


class FourByFour:
    """At 0, +-near, +-far and infinity: four times fewer multiplications.

    Of all points 0, +-near, +-far these amplify random rounding errors least, 1.5 times less one
    way than +-1 and +-2 of section 4.3. Rows of G take the factors that A^T leaves out.
    """

    outputs = 4
    near = 21 / 32
    far = 3 / 2

    def filters(self) -> list[list[float]]:
        near, far = self.near, self.far
        of_near = 1 / (2 * near * (near**2 - far**2))
        of_far = 1 / (2 * far * (far**2 - near**2))
        points = ((of_near, near), (of_near, -near), (of_far, far), (of_far, -far))
        return [
            [1 / (near * far) ** 2, 0.0, 0.0],
            *([factor, factor * point, factor * point**2] for factor, point in points),
            [0.0, 0.0, 1.0],
        ]

    def inputs(self, slices: Sequence[Tensor], out: Tensor) -> None:
        near, far = self.near**2, self.far**2
        zero, plus_near, minus_near, plus_far, minus_far, infinity = out
        odd = infinity
        for plus, minus, point, other in (
            (plus_near, minus_near, self.near, far),
            (plus_far, minus_far, self.far, near),
        ):
            torch.add(slices[4], slices[2], alpha=-other, out=plus)
            torch.add(slices[3], slices[1], alpha=-other, out=odd)
            torch.add(plus, odd, alpha=-point, out=minus)
            plus.add_(odd, alpha=point)
        for end, first in ((zero, 0), (infinity, 1)):
            torch.add(slices[first + 4], slices[first + 2], alpha=-near - far, out=end)
            end.add_(slices[first], alpha=near * far)

    def combine(self, products: Tensor, spare: Tensor) -> Sequence[Tensor]:
        zero, near, minus_near, far, minus_far, infinity = products
        odd_near, odd_far = spare, minus_near
        torch.sub(near, minus_near, out=odd_near)
        near.add_(minus_near)
        torch.sub(far, minus_far, out=odd_far)
        far.add_(minus_far)
        zero.add_(near, alpha=1 / self.near).add_(far, alpha=1 / self.far)
        infinity.add_(odd_near, alpha=self.near**2).add_(odd_far, alpha=self.far**2)
        first = odd_near.add_(odd_far)
        second = far.mul_(self.far).add_(near, alpha=self.near)
        return zero, first, second, infinity

    def spread(self, slices: Sequence[Tensor], out: Tensor) -> None:
        zero, plus_near, minus_near, plus_far, minus_far, infinity = out
        odd = infinity
        for plus, minus, point in (
            (plus_near, minus_near, self.near),
            (plus_far, minus_far, self.far),
        ):
            torch.add(slices[1], slices[3], alpha=point**2, out=odd)
            torch.mul(slices[0], 1 / point, out=plus).add_(slices[2], alpha=point)
            torch.sub(plus, odd, out=minus)
            plus.add_(odd)
        zero.copy_(slices[0])
        infinity.copy_(slices[3])
