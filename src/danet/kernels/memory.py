"""Memory that is used again, for fresh memory costs more than many a computation."""

import math

from torch import Tensor


class ReusedMemory:
    """Named pieces of memory, of one tensor's dtype and on its device."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.pieces: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, of no more elements than the name's first time."""
        elements = math.prod(shape)
        if name not in self.pieces:
            self.pieces[name] = self.like.new_empty(elements)
        return self.pieces[name][:elements].view(shape)
