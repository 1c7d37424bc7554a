"""Decodes pictures and label images from untrusted files."""

import io
import struct
import threading
import warnings
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from danet.data.archives import Location, ZipPath
from danet.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
)
MAX_PIXELS = 150_000_000
"""Larger pictures are refused before decoding (a file of a few KB can expand to many GB)."""
MAX_JPEG_SIDE = 65_500
"""Pixels that the library of JPEG files writes at most."""
_TURNING = range(2, 9)
"""EXIF orientations of pictures that are not stored as they are seen; others mean nothing."""
_opening = threading.Lock()


def is_picture_name(name: str) -> bool:
    """Whether a file is one by its name; hidden files, as macOS puts beside pictures, are not."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


class PictureTooLarge(UserError):
    """The picture has more pixels than allowed."""


# An allowlist: Pillow would otherwise try every plug-in on the file, including Ghostscript's.
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
_LOSSY = {"JPEG": "are lossy", "MPO": "are lossy", "WEBP": "may be lossy"}
_TIFF_COMPRESSIONS = {"jpeg": "JPEG", "tiff_jpeg": "JPEG", "webp": "WEBP"}
"""Formats of which TIFF files may consist, by Pillow's names."""
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow's names of 2- and 4-bit grey, and the factor by which it scales their levels to 0..255."""

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, MemoryError)
"""What Pillow's decoders raise on damaged files."""

_SCALED = "scaled"
"""Stands for the raw mode of a PGM or PPM whose largest level Pillow scales to 255 or 65535."""


def open_image(source: Location | str | bytes, max_pixels: int | None = None) -> Image.Image:
    """Opens a picture as 8-bit RGB, turned upright by its EXIF orientation.

    Grey, palette, alpha (dropped), CMYK and 16-bit pictures are converted. An animated picture
    gives its first frame.

    Args:
        source: a path, or the bytes of the file.
        max_pixels: larger pictures are refused before decoding; at most `MAX_PIXELS`, as None.

    Raises:
        PictureTooLarge: the picture has more pixels than that.
        UserError: the file cannot be read, is not a picture, or is damaged.
    """
    return open_upright(source, max_pixels).image


class Upright(NamedTuple):
    """A picture, and whether its EXIF orientation turned or mirrored it."""

    image: Image.Image
    was_turned: bool


def open_upright(source: Location | str | bytes, max_pixels: int | None = None) -> Upright:
    """Opens a picture as `open_image` does."""
    image, where, _ = _decode(source, max_pixels)
    upright = upright_rgb(image, where)
    return Upright(upright, image.getexif().get(ExifTags.Base.Orientation) in _TURNING)


def upright_rgb(image: Image.Image, where: str) -> Image.Image:
    """Turns a picture upright by its EXIF orientation, and converts it to 8-bit RGB.

    Args:
        where: its name for error messages.

    Raises:
        UserError: it cannot be converted, or its orientation, or a file not yet read, is damaged.
    """
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except (*_DAMAGE, struct.error) as error:
        raise UserError(f"{where}: cannot convert {image.mode} to RGB ({error})") from error


def require_jpeg_size(image: Image.Image) -> None:
    """Checks that a picture can be written as a JPEG file.

    Raises:
        UserError: it is too wide or too tall.
    """
    if max(image.size) > MAX_JPEG_SIDE:
        raise UserError(
            f"{image.width}x{image.height} is too large for a JPEG file, whose sides have at most "
            f"{MAX_JPEG_SIDE} pixels"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB; 16-bit grey keeps its upper 8 bits, alpha is dropped.

    Raises:
        ValueError: floating-point pixels, whose range is unknown.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        # Pillow's 32-bit mode may also hold 8-bit levels.
        if image.mode != "I" or levels.max(initial=0) > 255:
            levels >>= 8
        image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    # Avoids Pillow's warning about transparent palettes: alpha is dropped in any case.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def open_label(path: Location) -> npt.NDArray[np.uint8]:
    """Reads a label image as uint8 H W ids.

    The image may be grey of 1 to 16 bits, a palette image, or RGB with three equal channels.

    Raises:
        UserError: the file cannot be read, is lossy or in colour, or has ids above 255.
    """
    image, where, stored_as = _decode(path)
    kind = _TIFF_COMPRESSIONS.get(image.info.get("compression", ""), image.format)
    if kind in _LOSSY:
        raise UserError(f"{where}: labels in {kind} {_LOSSY[kind]}; save them as PNG")
    if stored_as == _SCALED:
        raise UserError(
            f"{where}: its levels are not in 0..255 or 0..65535 (maxval), so ids would be scaled; "
            "save labels as PNG"
        )
    ids = np.asarray(image)
    if stored_as in _GREY_STEPS:
        ids = ids // _GREY_STEPS[stored_as]
    if image.mode == "RGB" and (ids == ids[..., :1]).all():
        ids = ids[..., 0]
    if ids.ndim != 2 or image.mode == "F":
        raise UserError(
            f"{where}: a {image.mode} image cannot be a label; save one class id per pixel "
            "(8-bit grey or palette PNG)"
        )
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise UserError(
            f"{where}: label ids must be 0..255, but there are {ids.min()}..{ids.max()}"
        )
    return ids.astype(np.uint8)


class _Decoded(NamedTuple):
    """A picture in its original mode.

    Attributes:
        where: its name for error messages.
        stored_as: Pillow's name for the pixels' form in the file, where there is one.
    """

    image: Image.Image
    where: str
    stored_as: str


def _decode(source: Location | str | bytes, max_pixels: int | None = None) -> _Decoded:
    limit = MAX_PIXELS if max_pixels is None else min(max_pixels, MAX_PIXELS)
    where = "the picture" if isinstance(source, bytes) else str(source)
    file: Path | str | io.BytesIO
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        file = source.open() if isinstance(source, ZipPath) else source
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        # Python's filters of warnings are the whole process's.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=formats)
        with opened as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError
            stored_as = _raw_mode(image)  # Pillow forgets it in load()
            image.load()
            return _Decoded(image, where, stored_as)
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{where}: is a folder; name a picture") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{where}: not a picture in a known format ({', '.join(formats)})"
        ) from error
    except Image.DecompressionBombError as error:
        raise PictureTooLarge(
            f"{where}: more than {limit // 1_000_000} million pixels; scale it down first"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{where}: damaged or unreadable picture ({error})") from error


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's raw mode of a picture that is not yet decoded; empty where there is none."""
    details = image.tile[0][3] if image.tile else ""
    whole = image.format == "PPM" and image.mode != "F"
    if whole and isinstance(details, tuple) and details[1] not in (255, 65535):
        return _SCALED
    return str(details[0] if isinstance(details, tuple) and details else details)
