"""Logits at a picture's size, computed in strips of rows to save memory.

The logits of all classes at the size of a large picture take a lot of memory: 1.2 GB for 150
classes at 2048x1024. The steps after the network need single pixels (softmax, average, argmax) or
two neighbouring rows (bilinear interpolation). So logits are stored at the features' size, and a
strip of rows is computed on demand, with the arithmetic of `torch.nn.functional.interpolate`.

Shapes: R branches, K classes, h w the features, H W the picture, n rows in a strip.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from danet.errors import LogitsNotFinite

_CPU_STRIP_ELEMENTS = 4 << 20
_CPU_STRIP_ROWS = 64
_DEVICE_STRIP_ELEMENTS = 128 << 20


class LogitRows(Protocol):
    """Float32 logits of one picture, R K height width."""

    height: int
    width: int

    def rows(self, first: int, last: int) -> Tensor:
        """Logits R K n width of the rows first..last-1."""


class Stored:
    """Logits R K h w in memory."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.height, self.width = logits.shape[-2:]

    def rows(self, first: int, last: int) -> Tensor:
        return self.logits[:, :, first:last]


class Mirrored:
    """Logits flipped left to right."""

    def __init__(self, source: LogitRows) -> None:
        self.source = source
        self.height, self.width = source.height, source.width

    def rows(self, first: int, last: int) -> Tensor:
        return self.source.rows(first, last).flip(-1)


class _Taps(NamedTuple):
    """For each output row, its two source rows and the weight of the lower one."""

    upper: Tensor
    lower: Tensor
    weight: Tensor


class Resized:
    """Logits resized bilinearly: first within each row, then between neighbouring rows."""

    def __init__(self, source: LogitRows, size: Sequence[int], align_corners: bool) -> None:
        self.source = source
        self.height, self.width = size
        self.align_corners = align_corners
        above = self._source_rows()
        self._upper = above.long().clamp(max=source.height - 1)
        self._lower = (self._upper + 1).clamp(max=source.height - 1)
        self._weight = (above - self._upper).clamp(0, 1)

    def _source_rows(self) -> Tensor:
        """The fractional source row of each output row, by torch's convention."""
        row = torch.arange(self.height, dtype=torch.float32, device="cpu")
        if self.align_corners:
            return row * row.new_tensor((self.source.height - 1) / max(self.height - 1, 1))
        return ((row + 0.5) * row.new_tensor(self.source.height / self.height) - 0.5).clamp(min=0)

    def rows(self, first: int, last: int) -> Tensor:
        if (first, last) == (0, self.height):  # one pass; equal up to rounding
            return self._resized(self.source.rows(0, self.source.height), self.height)
        wide = self._widened(self.source.rows(*self._span(first, last)))
        return _between(wide, self._taps(first, last, wide.device))

    def planes(self, first: int, last: int, classes: Tensor) -> Iterator[Tensor]:
        """Yields the logits R n width of each class in `classes`."""
        wide = self._widened(self.source.rows(*self._span(first, last))[:, classes])
        taps = self._taps(first, last, wide.device)
        for plane in wide.unbind(1):
            yield _between(plane, taps)

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """First and last (exclusive) source row that a strip needs."""
        if self.height == self.source.height:
            return first, last
        return int(self._upper[first]), int(self._lower[last - 1]) + 1

    def _widened(self, rows: Tensor) -> Tensor:
        if self.width == self.source.width:
            return rows
        return self._resized(rows, rows.shape[-2])

    def _resized(self, rows: Tensor, height: int) -> Tensor:
        size = (height, self.width)
        return F.interpolate(rows, size=size, mode="bilinear", align_corners=self.align_corners)

    def _taps(self, first: int, last: int, device: torch.device) -> _Taps | None:
        """The taps of a strip, relative to its first source row; None if rows are only copied."""
        if self.height == self.source.height:
            return None
        start = self._upper[first]
        upper, lower = self._upper[first:last] - start, self._lower[first:last] - start
        weight = self._weight[first:last].unsqueeze(-1)
        return _Taps(upper.to(device), lower.to(device), weight.to(device))


def _between(wide: Tensor, taps: _Taps | None) -> Tensor:
    """Interpolates n rows (axis -2) between pairs of source rows."""
    if taps is None:
        return wide
    above, below = wide.index_select(-2, taps.upper), wide.index_select(-2, taps.lower)
    return torch.lerp(above, below, taps.weight)


class Overlapped:
    """Logits of overlapping windows that cover a picture, averaged where they overlap.

    Args:
        size: height and width of the picture.
        windows: for each window the rows and columns that it covers, and its logits; these may
            extend over the picture's right and lower border.
    """

    def __init__(
        self, size: Sequence[int], windows: Sequence[tuple[slice, slice, LogitRows]]
    ) -> None:
        self.height, self.width = size
        self.windows = windows

    def rows(self, first: int, last: int) -> Tensor:
        total: Tensor | None = None
        for covered, columns, source in self.windows:
            top, bottom = max(first, covered.start), min(last, covered.stop)
            if top >= bottom:
                continue
            logits = source.rows(top - covered.start, bottom - covered.start)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], last - first, self.width)
                count = logits.new_zeros(last - first, self.width)
            inside = slice(top - first, bottom - first)
            total[:, :, inside, columns] += logits[..., : columns.stop - columns.start]
            count[inside, columns] += 1
        assert total is not None
        return total.div_(count)


def require_finite(logits: Tensor) -> None:
    """Checks logits, as nan or infinite ones have no meaningful largest class.

    Call it on logits at the features' size: it reads all of them, and waits for a GPU.

    Raises:
        LogitsNotFinite: one is infinite or nan.
    """
    # Minimum and maximum are nan if any value is; this is 20 times as fast as testing each value.
    if not torch.stack([logits.amin(), logits.amax()]).isfinite().all():
        raise LogitsNotFinite(
            "the network's logits are not finite: its weights are damaged, or the precision is too "
            "low for them; try --precision fp32, or other weights"
        )


def most_likely_classes(views: Sequence[LogitRows]) -> Tensor:
    """The class with the largest average softmax score, R H W uint8.

    Args:
        views: finite logits of the same picture.
    """
    if len(views) == 1 and isinstance(views[0], Resized) and isinstance(views[0].source, Stored):
        stored = views[0].source.logits
        if stored.device.type == "cpu":
            return _classes_of_resized(views[0], stored)
    single = len(views) == 1
    return torch.cat(
        [
            _argmax(views[0].rows(*strip) if single else _average_softmax(views, *strip))
            for strip in _strips(views[0])
        ],
        dim=1,
    )


def average_probabilities(views: Sequence[LogitRows]) -> Tensor:
    """Softmax scores R K H W in 0..1, averaged over the views."""
    height, width = views[0].height, views[0].width
    row = views[0].rows(0, 1)
    output = row.new_empty(*row.shape[:2], height, width)
    for first, last in _strips(views[0]):
        output[:, :, first:last] = _average_softmax(views, first, last)
    return output


def _average_softmax(views: Sequence[LogitRows], first: int, last: int) -> Tensor:
    total = views[0].rows(first, last).softmax(1)
    for view in views[1:]:
        total += view.rows(first, last).softmax(1)
    return total.div_(len(views))


def _strips(view: LogitRows) -> Iterator[tuple[int, int]]:
    row = view.rows(0, 1)
    limit = _CPU_STRIP_ELEMENTS if row.device.type == "cpu" else _DEVICE_STRIP_ELEMENTS
    size = max(8, limit // row.numel())
    for first in range(0, view.height, size):
        yield first, min(first + size, view.height)


def _argmax(scores: Tensor) -> Tensor:
    """R K n W -> R n W uint8; on a CPU class by class, several times as fast as torch.argmax."""
    if scores.device.type != "cpu":
        return scores.argmax(1).to(torch.uint8)
    return _largest(scores.unbind(1), range(scores.shape[1]))


def _largest(planes: Sequence[Tensor] | Iterator[Tensor], classes: Sequence[int]) -> Tensor:
    """The class whose plane R n W is largest, the first one on ties: R n W uint8."""
    best: Tensor | None = None
    for class_id, plane in zip(classes, planes, strict=True):
        if best is None:
            best = plane.clone()
            winner = torch.full_like(plane, class_id, dtype=torch.uint8)
        else:
            winner.masked_fill_(plane > best, class_id)
            torch.maximum(best, plane, out=best)
    return winner


def _classes_of_resized(view: Resized, stored: Tensor) -> Tensor:
    """Most likely classes R H W uint8, computed only from classes that can win in a strip."""
    contends_Kh = _contenders(stored)
    strips = []
    for first in range(0, view.height, _CPU_STRIP_ROWS):
        last = min(first + _CPU_STRIP_ROWS, view.height)
        top, bottom = view._span(first, last)
        classes = contends_Kh[:, top:bottom].any(1).nonzero().squeeze(1)
        strips.append(_largest(view.planes(first, last, classes), classes.tolist()))
    return torch.cat(strips, 1)


def _contenders(stored: Tensor) -> Tensor:
    """R K h w -> K h bool: whether a class can win anywhere between feature rows y and y + 1.

    Interpolation averages a cell's four corners with the same weights for all classes. A class that
    is below the mean of the four corners' winners at every corner is below that mean in the whole
    cell, and therefore below at least one of these winners.
    """
    padded = F.pad(stored, (0, 1, 0, 1), mode="replicate")
    height, width = stored.shape[-2:]
    corners = [padded[..., y : y + height, x : x + width] for y in (0, 1) for x in (0, 1)]
    winner = _argmax(stored).long().unsqueeze(1)
    padded_winner = F.pad(winner.float(), (0, 1, 0, 1), mode="replicate").long()
    winners = torch.cat(
        [padded_winner[..., y : y + height, x : x + width] for y in (0, 1) for x in (0, 1)], 1
    )
    contends = torch.zeros_like(stored, dtype=torch.bool)
    for corner in corners:
        bar = corner.gather(1, winners).mean(1, keepdim=True)
        contends |= corner >= bar - 1e-5 * bar.abs()  # tolerates rounding
    return contends.any(-1).any(0)
