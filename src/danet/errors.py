"""The errors that are the user's to mend; the command prints them as one line."""


class UserError(ValueError):
    """The input is wrong. The message says what, where, and what to do (exit status 2)."""


class TrainingDiverged(RuntimeError):
    """The loss stopped being finite. The message names the step and the last good checkpoint."""


class TrainingStopped(RuntimeError):
    """Training was asked to stop, or lost a data worker. The message says from where it goes on."""


class OutOfMemory(RuntimeError):
    """The device or the machine has too little memory. The message says what to lower."""


class ExportDiffers(RuntimeError):
    """What was exported computes something else than the model; nothing was written."""


def first_line(error: Exception) -> str:
    """What another library's error says, cut to one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """One line that is safe on a terminal: what steers it, as file names may, is spelt out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
