"""The errors that are the user's to mend; the command prints them as one line."""

import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Self


class UserError(ValueError):
    """The input is wrong. The message says what, where, and what to do (exit status 2)."""


class LogitsNotFinite(UserError):
    """The network gave infinite or undefined logits. The message says what to change."""


class TrainingDiverged(RuntimeError):
    """The loss or the logits stopped being finite.

    The message names the step and the last good checkpoint.
    """

    @classmethod
    def after(cls, last_checkpoint: Path, finding: str, lr: float) -> Self:
        """Tells what was found, and how to go on from the last checkpoint."""
        return cls(
            f"training: {finding}; the last good checkpoint is {last_checkpoint}. Lower train.lr "
            f"(now {lr:g}) or set train.precision=fp32, then continue with --resume; if it fails "
            "again at once, delete that file to resume from the one before it"
        )


class TrainingStopped(RuntimeError):
    """Training was asked to stop, or lost a data worker. The message says from where it goes on."""


class OutOfMemory(RuntimeError):
    """The device or the machine has too little memory. The message says what to lower."""


class TrainingOutOfMemory(OutOfMemory):
    """A training step, not a validation, ran out of memory."""


class ExportDiffers(RuntimeError):
    """The exported file computes something other than the model; nothing was written."""


@contextmanager
def explaining_os_error(path: Path | str, problem: str, remedy: str) -> Iterator[None]:
    """Tells what the system refused to do with a path, and what to do.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {problem} ({error.strerror or error}); {remedy}") from error


def explaining_lookup(path: Path | str) -> AbstractContextManager[None]:
    """Tells why the system cannot say whether there is such a file.

    Its name may be too long, or lie in a folder that this user may not enter. Python up to 3.13
    raises this where it looks for a file; later ones say that there is none.
    """
    return explaining_os_error(
        path, "cannot be looked up", "check the name, and that you may enter its folder"
    )


def first_line(error: Exception) -> str:
    """The first line of another library's error message, or its type where that is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def why_not_read(error: Exception) -> str:
    """Why torch could not read a file, without its advice to run whatever code the file holds."""
    # Of a text file its reader says a mere number.
    if isinstance(error, pickle.UnpicklingError) or first_line(error).isdecimal():
        return "not a torch file of plain values"
    return first_line(error)


def printable(text: str) -> str:
    """One line that is safe on a terminal: what steers it, as file names may, is spelt out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
