"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from danet.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what was written there becomes `path` on success.

    The temporary name keeps the suffix and is always the same, so that what a killed process left
    is overwritten by the next.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose a folder with space "
            "that you may write to"
        ) from error


def require_writable(folder: Path) -> None:
    """Makes the folder, or tells before any work is done that nothing can be written there.

    Raises:
        UserError: it cannot be made or written to.
    """
    with replacing(folder / "probe") as temporary:
        temporary.touch()
    (folder / "probe").unlink()
