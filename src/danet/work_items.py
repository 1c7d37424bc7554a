"""The pictures and videos in the inputs of `danet predict`: files, and members of tar archives."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from danet.data.archives import MAX_FILE_BYTES
from danet.data.images import is_picture_name, open_image
from danet.errors import UserError
from danet.inputs import Input
from danet.manifest import Origin
from danet.result_names import member_stem, picture_results

_LONGEST_NAME = 100
_TAR_DAMAGE = (
    *(tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError, RecursionError),
)
"""Raised while a damaged tar archive is read: the latter three from headers made up of nonsense."""


class WorkItem(NamedTuple):
    """A picture or a video to segment.

    Attributes:
        name: in the manifest.
        stem: the beginning of its results' names.
        source: its path, its bytes, or what is wrong with it.
        origin: None where it cannot be looked up.
        results: the names of what is to be written, by kind (`RESULT_KINDS`).
    """

    name: str
    stem: str
    source: Path | bytes | UserError
    origin: Origin | None
    results: dict[str, str]

    def decoded(self) -> Image.Image:
        """The picture.

        Raises:
            UserError: what is wrong with it, by its name.
        """
        try:
            if isinstance(self.source, UserError):
                raise self.source
            return open_image(self.source)
        except UserError as error:
            message = str(error)
            raise UserError(
                message if self.name in message else f"{self.name}: {message}"
            ) from error


def list_pictures(inputs: Sequence[Input], *, overlay: bool) -> Iterator[WorkItem]:
    """Lists the pictures in files: the files themselves, or the members of tar archives.

    Args:
        overlay: whether overlays are to be written besides masks.
    """
    for one in inputs:
        path, stem = one
        try:
            origin = _origin_of(path)
        except UserError as error:
            yield WorkItem(str(path), stem, error, None, {})
            continue
        if one.is_archive:
            yield from _pictures_of_tar(path, stem, origin, overlay)
        else:
            yield WorkItem(str(path), stem, path, origin, picture_results(stem, overlay=overlay))


def _pictures_of_tar(path: Path, stem: str, archived: Origin, overlay: bool) -> Iterator[WorkItem]:
    empty = True
    try:
        with tarfile.open(path) as archive:
            for index, member in enumerate(archive):
                name = Path(member.name)
                if not (member.isfile() or member.islnk()) or not is_picture_name(name.name):
                    continue
                empty = False
                # Not its folders: an archive must not choose where files are written.
                own = member_stem(stem, index, name.stem[:_LONGEST_NAME])
                origin = archived._replace(path=f"{archived.path}:{member.name}")
                source: bytes | UserError
                if "\0" in member.name:
                    source = UserError("its name contains a zero byte, which no file name may")
                else:
                    source = _content(archive, member)
                results = picture_results(own, overlay=overlay)
                yield WorkItem(f"{path}:{member.name}", own, source, origin, results)
    except _TAR_DAMAGE as error:
        problem = UserError(f"{path}: damaged, or not a tar archive ({error})")
        yield WorkItem(str(path), stem, problem, None, {})
        return
    if empty:
        yield WorkItem(str(path), stem, UserError(f"{path}: no pictures in it"), None, {})


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | UserError:
    """Of a file, or of the one that a hard link stands for."""
    too_large = UserError(f"unpacks to over {MAX_FILE_BYTES >> 20} MiB; refused")
    if member.size > MAX_FILE_BYTES:
        return too_large
    try:
        file = archive.extractfile(member)
    except KeyError:
        file = None
    if file is None:
        return UserError("the file that it links to is not in the archive")
    content = file.read(MAX_FILE_BYTES + 1)  # a link's own size is 0
    return too_large if len(content) > MAX_FILE_BYTES else content


def video_item(video: Input, results: dict[str, str]) -> WorkItem:
    """A video, with the names of its results by kind."""
    path, stem = video
    try:
        return WorkItem(str(path), stem, path, _origin_of(path), results)
    except UserError as error:
        return WorkItem(str(path), stem, error, None, results)


def _origin_of(path: Path) -> Origin:
    """The origin of a file; raises a UserError if it cannot be looked up."""
    try:
        found = path.stat()
        return Origin(str(path.resolve()), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
