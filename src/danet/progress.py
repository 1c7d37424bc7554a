"""Progress of long work: a live bar on a terminal, plain lines otherwise."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from danet.errors import printable

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Counts steps of some work on stderr; use as a context manager.

    Args:
        title: what is being done.
        total: number of steps; None where nobody knows it.
        done: steps that were done before.
        enabled: False on all but one of several processes.
    """

    def __init__(self, title: str, total: int | None, done: int = 0, enabled: bool = True) -> None:
        self.title = title
        self.total = total
        self._first = self._done = done
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._started = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn(title, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, status="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, status: str = "", steps: int = 1) -> None:
        """Counts steps, none where only the status changes; shows it with the time that is left."""
        self._done += steps
        if not self._enabled:
            return
        status = printable(f"{status}  {self._remaining()}").strip()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, status=status)
            return
        now = time.monotonic()
        finishes = steps > 0 and self._done == self.total
        if now - self._last_line >= SECONDS_BETWEEN_LINES or finishes:
            self._last_line = now
            of_total = "" if self.total is None else f"/{self.total}"
            line = f"{self.title} {self._done}{of_total}  {status}"
            self._console.print(line, soft_wrap=True)

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._enabled:
            self._console.print(printable(message), soft_wrap=True)

    def _remaining(self) -> str:
        made = self._done - self._first
        if self.total is None or made == 0 or self._done >= self.total:
            return ""
        seconds = (time.monotonic() - self._started) / made * (self.total - self._done)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02} left"
