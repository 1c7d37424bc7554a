"""Logits at a picture's size, a strip of rows at a time.

All classes of a large picture at once are a lot of memory: 1.2 GB for 150 of them at 2048x1024.
But what follows the network works on single pixels (softmax, average, argmax) or on two
neighbouring rows (bilinear interpolation). So logits stay at the features' size, and a strip of the
picture is computed when it is asked for, with the arithmetic of `torch.nn.functional.interpolate`.

Shapes: R branches, K classes, h w the features, H W the picture, n rows of a strip.
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
        """R K n width, of the rows first..last-1."""


class Stored:
    """Logits R K h w that are in memory."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.height, self.width = logits.shape[-2:]

    def rows(self, first: int, last: int) -> Tensor:
        return self.logits[:, :, first:last]


class Mirrored:
    """Left is right."""

    def __init__(self, source: LogitRows) -> None:
        self.source = source
        self.height, self.width = source.height, source.width

    def rows(self, first: int, last: int) -> Tensor:
        return self.source.rows(first, last).flip(-1)


class _Taps(NamedTuple):
    """The two source rows of each row, and the share of the lower one."""

    upper: Tensor
    lower: Tensor
    weight: Tensor


class Resized:
    """Bilinear interpolation to another size: first along a row, then between two rows."""

    def __init__(self, source: LogitRows, size: Sequence[int], align_corners: bool) -> None:
        self.source = source
        self.height, self.width = size
        self.align_corners = align_corners
        above = self._source_rows()
        self._upper = above.long().clamp(max=source.height - 1)
        self._lower = (self._upper + 1).clamp(max=source.height - 1)
        self._weight = (above - self._upper).clamp(0, 1)

    def _source_rows(self) -> Tensor:
        """The row of the source, in fractions, that each row comes from (torch's convention)."""
        row = torch.arange(self.height, dtype=torch.float32)
        if self.align_corners:
            return row * torch.tensor((self.source.height - 1) / max(self.height - 1, 1))
        return ((row + 0.5) * torch.tensor(self.source.height / self.height) - 0.5).clamp(min=0)

    def rows(self, first: int, last: int) -> Tensor:
        if (first, last) == (0, self.height):  # the same but for rounding, in one pass
            return self._resized(self.source.rows(0, self.source.height), self.height)
        wide = self._widened(self.source.rows(*self._span(first, last)))
        return _between(wide, self._taps(first, last, wide.device))

    def planes(self, first: int, last: int, classes: Tensor) -> Iterator[Tensor]:
        """R n width, class by class."""
        wide = self._widened(self.source.rows(*self._span(first, last))[:, classes])
        taps = self._taps(first, last, wide.device)
        for plane in wide.unbind(1):
            yield _between(plane, taps)

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """The rows of the source that a strip needs."""
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
        """What a strip's rows are made of, counted from its first source row; None for a copy."""
        if self.height == self.source.height:
            return None
        start = self._upper[first]
        upper, lower = self._upper[first:last] - start, self._lower[first:last] - start
        weight = self._weight[first:last].unsqueeze(-1)
        return _Taps(upper.to(device), lower.to(device), weight.to(device))


def _between(wide: Tensor, taps: _Taps | None) -> Tensor:
    """Rows n of any leading axes, each between two rows of the source."""
    if taps is None:
        return wide
    above, below = wide.index_select(-2, taps.upper), wide.index_select(-2, taps.lower)
    return torch.lerp(above, below, taps.weight)


class Overlapped:
    """The average of windows that cover a picture, each R K rows columns of it.

    Args:
        windows: the rows and columns that each covers, and its logits, which may reach beyond.
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
    """Refuses logits of which no class is the largest, or that interpolation would make so.

    Best called on logits at the features' size: one pass over them, and on a GPU a wait for them.

    Raises:
        LogitsNotFinite: one is infinite or undefined.
    """
    # The extremes of what holds a nan are nan; finding them is 20 times as fast as looking at all.
    if not torch.stack([logits.amin(), logits.amax()]).isfinite().all():
        raise LogitsNotFinite(
            "the network's logits are not finite: its weights are damaged, or the precision is too "
            "low for them; try --precision fp32, or other weights"
        )


def most_likely_classes(views: Sequence[LogitRows]) -> Tensor:
    """The class with the largest average softmax score: R H W uint8.

    Args:
        views: of finite logits.
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
    """R K n W -> R n W uint8; on a CPU class by class, several times as fast as torch's."""
    if scores.device.type != "cpu":
        return scores.argmax(1).to(torch.uint8)
    return _largest(scores.unbind(1), range(scores.shape[1]))


def _largest(planes: Sequence[Tensor] | Iterator[Tensor], classes: Sequence[int]) -> Tensor:
    """The class of the largest plane, the first of equals: R n W uint8."""
    best: Tensor | None = None
    for class_id, plane in zip(classes, planes, strict=True):
        if best is None:
            best = plane.clone()
            winner = torch.full(plane.shape, class_id, dtype=torch.uint8)
        else:
            winner.masked_fill_(plane > best, class_id)
            torch.maximum(best, plane, out=best)
    return winner


def _classes_of_resized(view: Resized, stored: Tensor) -> Tensor:
    """R H W uint8, looking only at classes that can win somewhere in a strip."""
    contends_Kh = _contenders(stored)
    strips = []
    for first in range(0, view.height, _CPU_STRIP_ROWS):
        last = min(first + _CPU_STRIP_ROWS, view.height)
        top, bottom = view._span(first, last)
        classes = contends_Kh[:, top:bottom].any(1).nonzero().squeeze(1)
        strips.append(_largest(view.planes(first, last, classes), classes.tolist()))
    return torch.cat(strips, 1)


def _contenders(stored: Tensor) -> Tensor:
    """R K h w -> K h, whether a class may win between feature rows y and y + 1.

    Interpolation averages a cell's four corners with weights that are the same for all classes. So
    a class that is below the mean of the corners' winners at every corner is below it, and so below
    one of them, in the whole cell.
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
        contends |= corner >= bar - 1e-5 * bar.abs()  # less by more than rounding
    return contends.any(-1).any(0)
