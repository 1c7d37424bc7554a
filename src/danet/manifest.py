"""The manifest of `danet predict`: the outcome of each input, one JSON object a line.

It is in the folder of the results. Each of several processes that share the work appends to its
own manifest; all of them are read. A line has the keys

    input       the item's name
    model       the model's fingerprint
    status      "ok" or "error"
    error       the reason, with status "error"
    mask, overlay, frames    the names of the results (`RESULT_KINDS`) that were written
    time        when the line was written, ISO 8601 in UTC
    path, size, mtime_ns     the `Origin`, if the item could be looked up

A few items are written at a time. Their lines are first in a file of their own, with an error, so
that a run that is stopped in between leaves no results that nobody knows of, or that pass for an
earlier run's. The next run takes these lines into the manifest.
"""

import datetime
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from danet.atomic import explaining_write_errors, replacing
from danet.jsonl import read_whole_lines
from danet.processes import Share

RESULT_KINDS = ("mask", "overlay", "frames")
"""A picture's class ids, a picture or video with the classes over it, a video's folder of masks."""
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class Origin(NamedTuple):
    """Distinguishes a file from others of the same name, and from earlier versions of itself.

    Attributes:
        path: resolved; of a picture in a tar archive the archive's, and the member's name.
        size: bytes of the file, or of the archive.
        mtime_ns: when that was last modified, nanoseconds since the epoch.
    """

    path: str
    size: int
    mtime_ns: int


class Manifest:
    """One process's manifest, opened to append whole lines; use as a context manager.

    `begin` comes before the results of some items are written, and `append` after each of them.

    Args:
        folder: of the results.
        share: this process's; it chooses the file's name.
        model: the fingerprint that every line names.

    Raises:
        UserError: it cannot be written, or is a link, which may lead anywhere.
    """

    def __init__(self, folder: Path, share: Share, model: str) -> None:
        suffix = f"-{share.rank}-of-{share.processes}" if share.processes > 1 else ""
        self.path = folder / f"manifest{suffix}.jsonl"
        self._begun = folder / f"manifest{suffix}-begun.jsonl"
        self.model = model
        with explaining_write_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_LINKS, 0o666)
            last = b"\n"
            if os.lseek(self._file, 0, os.SEEK_END) > 0:
                os.lseek(self._file, -1, os.SEEK_END)
                last = os.read(self._file, 1)
        # A process that was killed, or a full disk, may have left a line unfinished.
        self._separator = b"" if last == b"\n" else b"\n"
        for line in read_whole_lines(self._begun):
            self._write(line)
        self._forget_begun()

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.close(self._file)
        if kind is None:
            self._forget_begun()

    def _forget_begun(self) -> None:
        with explaining_write_errors(self._begun):
            self._begun.unlink(missing_ok=True)

    def begin(self, items: Iterable[tuple[str, Origin | None, Mapping[str, str]]]) -> None:
        """Says whose results are written next: names, origins, and results by kind.

        All items before have their lines.

        Raises:
            UserError: the disk is full.
        """
        lines = [self._line(*item, "the run was stopped while this was written") for item in items]
        with replacing(self._begun) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def append(
        self, name: str, origin: Origin | None, results: Mapping[str, str], error: str | None
    ) -> None:
        """Writes one item's line.

        Args:
            results: the names of what was written, by kind (`RESULT_KINDS`).
            error: why the item, or the rest of a video, could not be segmented; None if it was.

        Raises:
            UserError: the disk is full.
        """
        self._write(self._line(name, origin, results, error))

    def _line(
        self, name: str, origin: Origin | None, results: Mapping[str, str], error: str | None
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"input": name, "model": self.model}
        line |= {"status": "ok"} if error is None else {"status": "error", "error": error}
        line |= results
        line["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        return line | ({} if origin is None else origin._asdict())

    def _write(self, line: dict[str, Any]) -> None:
        data = self._separator + json.dumps(line).encode() + b"\n"
        with explaining_write_errors(self.path):
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._separator = b""


def earlier_results(folder: Path) -> set[Path]:
    """The files, and the folders of videos' masks, that earlier runs wrote into a folder."""
    return {
        folder.resolve() / str(line[kind])
        for line in _lines(folder)
        for kind in RESULT_KINDS
        if kind in line
    }


def finished_results(folder: Path, model: str) -> dict[str, Origin]:
    """The results that this model wrote last, by name, each with the origin of its item.

    The last line of a result counts, whichever manifest it is in: another model, or another input
    of the same name, may have overwritten the result of an earlier line. Lines of older versions of
    danet, which have no origin, do not count as finished.
    """
    last: dict[str, tuple[str, Origin | None]] = {}
    for line in _lines(folder):
        time = str(line.get("time", ""))
        valid = line.get("status") == "ok" and line.get("model") == model
        for kind in RESULT_KINDS:
            result = str(line.get(kind))
            if kind in line and time >= last.get(result, ("", None))[0]:
                last[result] = time, _origin(line) if valid else None
    return {result: origin for result, (_, origin) in last.items() if origin is not None}


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of all manifests in a folder."""
    for path in folder.glob("manifest*.jsonl"):
        yield from read_whole_lines(path)


def _origin(line: dict[str, Any]) -> Origin | None:
    known = all(name in line for name in Origin._fields)
    return Origin(*(line[name] for name in Origin._fields)) if known else None
