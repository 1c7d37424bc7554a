"""Writing files that appear whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from danet.errors import UserError, explaining_os_error


def explaining_write_errors(path: Path) -> AbstractContextManager[None]:
    """Turns an OSError into a UserError that says what cannot be written."""
    return explaining_os_error(
        path, "cannot be written", "choose a folder with space that you may write to"
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what was written there becomes `path` on success.

    The temporary name keeps the suffix and is always the same, so that what a killed process left
    is overwritten by the next.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    temporary = _temporary(path)
    with explaining_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # it may be a link, which may lead anywhere
        try:
            yield temporary
            fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes an indented JSON object.

    Raises:
        UserError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.tmp{path.suffix}")


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder beside it, for several files.

    On success all files in that folder are moved beside `path`, which comes last.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    folder = path.with_name(f".{path.name}.tmp")
    with explaining_write_errors(path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder / path.name
            for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                fsync(written)
                written.replace(path.with_name(written.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def require_writable(folder: Path) -> None:
    """Makes the folder, or tells before any work is done that nothing can be written there.

    Raises:
        UserError: it cannot be made or written to.
    """
    with explaining_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass


def require_writable_files(*paths: Path | None, sources: Sequence[Path] = ()) -> None:
    """Tells before any work is done that a file cannot be written.

    Files and folders stay as they are, and None is passed over.

    Args:
        sources: what is read, which must not be written over.

    Raises:
        UserError: one is a folder or a source, its folder cannot be made or written to, or two are
            the same.
    """
    taken: list[Path] = []
    for path in filter(None, paths):
        _require_writable_file(path)
        if any(source.exists() and _are_same(path, source) for source in sources):
            raise UserError(f"{path}: is an input and would be overwritten; choose another file")
        if any(_are_same(path, other) for other in taken):
            raise UserError(f"{path}: is named twice; one would replace the other")
        taken.append(path)


def _are_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (
        path.exists() and other.exists() and path.samefile(other)
    )


def _require_writable_file(path: Path) -> None:
    with explaining_write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        new = [folder for folder in path.parents if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # By the name that `replacing` writes to first, which may be too long.
            temporary = _temporary(path)
            temporary.unlink(missing_ok=True)
            temporary.touch(exist_ok=False)
            temporary.unlink()
        finally:
            for folder in new:
                with contextlib.suppress(OSError):  # not made, or used by another process
                    folder.rmdir()
