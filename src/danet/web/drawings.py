"""What the page and the HTTP interface show of a segmented picture."""

import io

import numpy as np
from PIL import Image
from pydantic import BaseModel

from danet.attention_overlay import DISAGREEMENT_COLOR, attention_overlay
from danet.data.images import require_jpeg_size
from danet.errors import UserError
from danet.heads import Branch
from danet.inspection import Inspection, Point
from danet.palette import hex_color, highlighted
from danet.segmentation import OVERLAY_OPACITY


class ClassShare(BaseModel):
    """A class that occurs in a picture, its colour #rrggbb, and its part of the pixels, 0..1."""

    id: int
    name: str
    color: str
    share: float


def class_shares(inspection: Inspection) -> list[ClassShare]:
    """The classes of a picture, the largest first."""
    classes = inspection.branches["fused"]
    counts = np.bincount(classes.ravel(), minlength=len(inspection.metadata.classes))
    return [
        ClassShare(
            id=index,
            name=inspection.metadata.classes[index],
            color=hex_color(inspection.metadata.palette[index]),
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
    return highlighted(inspection.image, inspection.disagreement, DISAGREEMENT_COLOR)


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
    if name in inspection.branches:
        return name
    raise UserError(f"branch {name}: the model has {', '.join(inspection.branches)}")


def encode(image: Image.Image, image_format: str) -> bytes:
    """The bytes of a PNG or JPEG file.

    Raises:
        UserError: the picture is too large for a JPEG file.
    """
    if image_format == "JPEG":
        require_jpeg_size(image)
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=90)
    return buffer.getvalue()
