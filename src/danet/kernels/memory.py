"""Memory that is used again, because fresh memory costs more than many a computation."""

import contextlib
import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor


class ReusedMemory:
    """Named pieces of memory, of one tensor's dtype and on its device."""

    def __init__(self, like: Tensor) -> None:
        self.like = like.new_empty(0)
        self.pieces: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, the same as the name's last time unless that was too small."""
        elements = math.prod(shape)
        if name not in self.pieces or self.pieces[name].numel() < elements:
            self.pieces.pop(name, None)
            # What was made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                self.pieces[name] = self.like.new_empty(elements)
        return self.pieces[name][:elements].view(shape)


class MemoryPool:
    """Memory that layers use one after the other, and each thread for itself."""

    def __init__(self) -> None:
        self.idle: list[ReusedMemory] = []

    @contextlib.contextmanager
    def borrow(self, like: Tensor) -> Iterator[ReusedMemory]:
        """Of the tensor's dtype and on its device."""
        try:
            memory = self.idle.pop()
        except IndexError:
            memory = ReusedMemory(like)
        if (memory.like.dtype, memory.like.device) != (like.dtype, like.device):
            memory = ReusedMemory(like)
        yield memory
        self.idle.append(memory)

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Copied, it is empty."""
        return type(self), ()
