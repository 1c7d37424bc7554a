"""A run's TensorBoard events."""

import threading
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from danet.atomic import explaining_write_errors


class Events:
    """Writes metrics as TensorBoard's scalars; use as a context manager.

    Args:
        folder: the run folder.
        first_step: what an earlier process wrote of later steps is hidden.

    Raises:
        UserError: at writing or at the end, where the folder cannot be written to.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder = folder
        self._writer = SummaryWriter(folder, purge_step=first_step + 1)

    def __enter__(self) -> Self:
        self._usual_hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with explaining_write_errors(self.folder):
                self._writer.close()
        finally:
            threading.excepthook = self._usual_hook

    def write(self, row: dict[str, float]) -> None:
        """Adds a row of metrics, `step` among them."""
        with explaining_write_errors(self.folder):
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name.replace("loss_", "loss/"), value, int(row["step"]))

    def _on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        # What fails in TensorBoard's thread is raised again by the next write or the close.
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._usual_hook(failed)
