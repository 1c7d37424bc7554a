"""Label files for benchmark servers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from danet.atomic import replacing, require_writable
from danet.data import submission_format
from danet.palette import colored


def submission_writer(dataset: str, folder: Path) -> Callable[[str, npt.NDArray[np.uint8]], None]:
    """Returns a function that writes one picture's classes in the format of the dataset's server.

    Args:
        dataset: a dataset whose server takes label files.
        folder: created if missing.

    Returns:
        A function of the picture's name and its H W uint8 train ids.

    Raises:
        UserError: the dataset has no such server, or the folder cannot be written to.
    """
    submission = submission_format(dataset)
    file_ids = np.array(submission.file_ids, np.uint8)
    require_writable(folder)

    def write(name: str, classes: npt.NDArray[np.uint8]) -> None:
        ids = file_ids[classes]
        image = colored(ids, submission.palette) if submission.palette else Image.fromarray(ids)
        with replacing(folder / f"{name}{submission.suffix}") as path:
            image.save(path, format="PNG")

    return write
