"""Segments visitors' pictures and keeps the latest, to answer questions about them.

A session is one segmented picture, under an id that cannot be guessed.
"""

import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from danet.data.images import PictureTooLarge, open_image
from danet.devices import is_out_of_memory
from danet.errors import UserError
from danet.inspection import Inspection
from danet.predict import Predictor


class Limits(NamedTuple):
    """What one request may ask for, and what is kept.

    Attributes:
        megabytes: of an upload.
        megapixels: of a picture.
        waiting: requests that may wait for the network; more are turned away.
        pictures: segmented pictures that are kept.
        kept_megapixels: of those together; one is always kept.
        batch: pictures in one batch.
    """

    megabytes: int = 20
    megapixels: int = 12
    waiting: int = 16
    pictures: int = 32
    kept_megapixels: int = 64
    batch: int = 32


class BusyError(UserError):
    """More requests wait than are let in."""


class NotKeptError(UserError):
    """There is no such picture, or no longer."""


class GoneError(UserError):
    """The visitor has gone before the picture's turn came."""


class Sessions:
    """A predictor for many visitors: one picture goes through the network at a time.

    Args:
        predictor: holds the network.
        limits: what one request may ask for.

    Attributes:
        folder: for files, as long as this object lives.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor = predictor
        self.limits = limits
        self._temporary = tempfile.TemporaryDirectory(prefix="danet-")
        self.folder = Path(self._temporary.name)
        # One thread, for each that computes keeps some memory.
        self._network = ThreadPoolExecutor(1)
        self._waiting = threading.BoundedSemaphore(limits.waiting + 1)
        self._kept: OrderedDict[str, Inspection] = OrderedDict()
        self._keeping = threading.Lock()

    def keep(self, inspection: Inspection) -> str:
        """Keeps a picture, and forgets the oldest; returns its id."""
        name = secrets.token_urlsafe(16)
        with self._keeping:
            self._kept[name] = inspection
            while len(self._kept) > 1 and self._keeps_too_much():
                self._kept.popitem(last=False)
        return name

    def _keeps_too_much(self) -> bool:
        pixels = sum(kept.image.width * kept.image.height for kept in self._kept.values())
        return (
            len(self._kept) > self.limits.pictures
            or pixels > self.limits.kept_megapixels * 1_000_000
        )

    def inspect(
        self, source: bytes | Path, has_gone: Callable[[], bool] = lambda: False
    ) -> Inspection:
        """Segments a picture.

        Args:
            has_gone: whether nobody waits for the result any more.

        Raises:
            UserError: it is no readable picture.
            PictureTooLarge: it has too many pixels.
            BusyError: too many others wait.
            GoneError: nobody waits when the picture's turn comes.
        """
        if not self._waiting.acquire(blocking=False):
            raise BusyError("too many pictures are waiting; try again in a moment")
        try:
            # Decoded pictures take memory too, so no more are decoded than may wait.
            image = open_image(source, self.limits.megapixels * 1_000_000)
            return self._network.submit(self._look, image, has_gone).result()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise PictureTooLarge(
                "the server has too little memory for this picture; scale it down first"
            ) from error
        finally:
            self._waiting.release()

    def _look(self, image: Image.Image, has_gone: Callable[[], bool]) -> Inspection:
        if has_gone():
            raise GoneError("nobody waits for this picture any more")
        return Inspection(self.predictor, image, keep_channels=False)

    def find(self, name: str) -> Inspection:
        """A picture that is kept.

        Raises:
            NotKeptError: it is not, or no longer.
        """
        with self._keeping:
            if name not in self._kept:
                raise NotKeptError("this picture is not here, or no longer kept; send it again")
            self._kept.move_to_end(name)
            return self._kept[name]
