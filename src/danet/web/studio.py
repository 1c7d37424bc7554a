"""What the page and the HTTP interface both do: segment pictures, and answer questions about them.

Pictures that were segmented stay in memory, the latest ones only, under names that cannot be
guessed.
"""

import io
import secrets
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from PIL import Image

from danet.data.images import PictureTooLarge, open_image
from danet.devices import is_out_of_memory
from danet.errors import UserError
from danet.figure import DISAGREEMENT_COLOR, attention_overlay
from danet.heads import Branch
from danet.inspection import Inspection, Point
from danet.predict import OVERLAY_OPACITY, Predictor


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


class ClassShare(NamedTuple):
    """A class that occurs in a picture, and the part of its pixels, 0..1."""

    id: int
    name: str
    color: str
    share: float


class Studio:
    """A predictor for many visitors: one picture goes through the network at a time.

    Args:
        predictor: holds the network.
        limits: what one request may ask for.

    Attributes:
        folder: for files, as long as the studio lives.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor = predictor
        self.limits = limits
        self._temporary = tempfile.TemporaryDirectory(prefix="danet-")
        self.folder = Path(self._temporary.name)
        self._network = threading.Lock()
        self._waiting = threading.BoundedSemaphore(limits.waiting + 1)
        self._kept: OrderedDict[str, Inspection] = OrderedDict()
        self._keeping = threading.Lock()

    def keep(self, inspection: Inspection) -> str:
        """Keeps a picture, and forgets the oldest; returns its name."""
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

    def inspect(self, source: bytes | Path) -> Inspection:
        """Segments a picture.

        Raises:
            UserError: it is no readable picture.
            PictureTooLarge: it has too many pixels.
            BusyError: too many others wait.
        """
        if not self._waiting.acquire(blocking=False):
            raise BusyError("too many pictures are waiting; try again in a moment")
        try:
            # Decoded pictures take memory too, so no more are decoded than may wait.
            image = open_image(source, self.limits.megapixels * 1_000_000)
            with self._network:
                return Inspection(self.predictor, image, keep_channels=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise PictureTooLarge(
                "the server has too little memory for this picture; scale it down first"
            ) from error
        finally:
            self._waiting.release()

    def find(self, name: str) -> Inspection:
        """A picture that is kept.

        Raises:
            KeyError: it is not, or no longer.
        """
        with self._keeping:
            self._kept.move_to_end(name)
            return self._kept[name]


def class_shares(inspection: Inspection, branch: Branch = "fused") -> list[ClassShare]:
    """The classes of a picture, the largest first."""
    classes = inspection.branches[branch]
    counts = np.bincount(classes.ravel(), minlength=len(inspection.metadata.classes))
    return [
        ClassShare(
            id=index,
            name=inspection.metadata.classes[index],
            color="#{:02x}{:02x}{:02x}".format(*inspection.metadata.palette[index]),
            share=float(counts[index] / classes.size),
        )
        for index in map(int, np.argsort(-counts, kind="stable"))
        if counts[index]
    ]


def overlay(
    inspection: Inspection, branch: Branch = "fused", opacity: float = OVERLAY_OPACITY
) -> Image.Image:
    """A branch's classes over the picture."""
    return inspection.segmentation(branch).overlay(inspection.image, opacity)


def disagreement(inspection: Inspection) -> Image.Image:
    """The grey picture, coloured where the branches are not of one opinion."""
    drawn = inspection.image.convert("L").convert("RGB")
    drawn.paste(DISAGREEMENT_COLOR, mask=Image.fromarray(inspection.disagreement))
    return drawn


def attention(inspection: Inspection, point: Point | None) -> Image.Image:
    """The attention that a pixel pays over the grey picture, or that all pixels pay."""
    if point is None:
        return attention_overlay(inspection.image, inspection.received_attention(), None)
    return attention_overlay(inspection.image, inspection.attention(point), point)


def check_branch(inspection: Inspection, name: str) -> Branch:
    """The branch of this name.

    Raises:
        UserError: the network has none.
    """
    for branch in get_args(Branch):
        if branch == name and branch in inspection.branches:
            found: Branch = branch
            return found
    raise UserError(f"branch {name}: the model has {', '.join(inspection.branches)}")


def encode(image: Image.Image, image_format: str) -> bytes:
    """The bytes of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=90)
    return buffer.getvalue()
