"""Reads files in .zip archives as if the archive were a folder, without unpacking it."""

import functools
import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from danet.errors import UserError

MAX_FILE_BYTES = 1 << 29
"""Files that unpack to more are refused; no picture within the pixel limit is larger."""


_TOP = PurePosixPath()


@dataclass(frozen=True, order=True)
class ZipPath:
    """A file or folder in an archive, with the part of `pathlib.Path`'s interface readers use.

    Nothing is unpacked to disk. Can be pickled and used after a fork: each process opens the
    archive on its own.

    Raises:
        UserError: the archive or the file in it cannot be read.
    """

    archive: Path
    inner: PurePosixPath = _TOP

    def __str__(self) -> str:
        return str(self.archive / self.inner)

    def __truediv__(self, part: str) -> "ZipPath":
        return ZipPath(self.archive, self.inner / part)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def stem(self) -> str:
        return self.inner.stem

    @property
    def suffix(self) -> str:
        return self.inner.suffix

    def is_dir(self) -> bool:
        return self.inner in _opened(self.archive).folders

    def is_file(self) -> bool:
        siblings = _opened(self.archive).folders.get(self.inner.parent, ())
        return self.name in siblings and not self.is_dir()

    def iterdir(self) -> Iterator["ZipPath"]:
        return (self / name for name in _opened(self.archive).folders[self.inner])

    def read_bytes(self) -> bytes:
        archive = _opened(self.archive)
        member = archive.members.get(self.inner)
        if member is None:
            raise UserError(f"{self}: no such file in the archive")
        if member.file_size > MAX_FILE_BYTES:
            raise UserError(f"{self}: unpacks to over {MAX_FILE_BYTES >> 20} MiB; refused")
        try:
            return archive.file.read(member)
        # zipfile raises many types on damage, encryption and unknown compression.
        except Exception as error:
            raise UserError(f"{self}: cannot be unpacked ({error})") from error

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.read_bytes())


Location = Path | ZipPath
"""The path of a dataset's file or folder, on disk or in an archive."""


@dataclass(frozen=True)
class _Archive:
    file: zipfile.ZipFile
    members: dict[PurePosixPath, zipfile.ZipInfo]
    """The files; some programs begin their names with "./"."""
    folders: dict[PurePosixPath, dict[str, None]]
    """The names in each folder, in the archive's order."""


@functools.cache
def _opened(archive: Path) -> _Archive:
    try:
        file = zipfile.ZipFile(archive)
    except Exception as error:
        raise UserError(f"{archive}: cannot be read as a .zip archive ({error})") from error
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    folders: dict[PurePosixPath, dict[str, None]] = {_TOP: {}}
    for member in file.infolist():
        path = PurePosixPath(member.filename)
        if not path.parts:  # a damaged archive's
            continue
        if member.is_dir():
            folders.setdefault(path, {})
        else:
            members[path] = member
        for inside in (path, *path.parents):
            if inside.name:
                folders.setdefault(inside.parent, {})[inside.name] = None
    return _Archive(file, members, folders)


if hasattr(os, "register_at_fork"):  # an open file's position would be shared by both processes
    os.register_at_fork(after_in_child=_opened.cache_clear)


def is_zip(path: Path) -> bool:
    """Whether it is a .zip file by its name."""
    return path.suffix.lower() == ".zip" and path.is_file()


def locate(root: Location, path: str) -> Location:
    """`root / path`, where .zip files on the path are entered like folders."""
    location = root
    for part in PurePosixPath(path).parts:
        location = location / part
        if isinstance(location, Path) and is_zip(location):
            location = ZipPath(location)
    return location
