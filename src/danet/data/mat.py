"""Reads the labels of SBD and COCO-Stuff 10k from MATLAB files.

Supports the parts of the format (MATLAB's "MAT-File Level 5") that these labels use. scipy's
reader ends in a segmentation fault on some damaged files, which would kill a training run.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from danet.data.archives import Location
from danet.errors import UserError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
"""The format's data types as numpy type codes."""
_STRUCT_CLASS, _NUMBER_CLASSES = 2, range(6, 16)
_COMPLEX = 1 << 11
_LARGEST = 1 << 28
"""Largest size of the unpacked content, in bytes."""


class _Damaged(ValueError):
    """The bytes violate the format."""


class _Element(NamedTuple):
    kind: int
    content: memoryview


class _Matrix(NamedTuple):
    """An array of the file: a numeric array, or the fields of a 1 x 1 struct."""

    name: str
    ids: npt.NDArray[np.generic] | None
    fields: dict[str, "_Matrix"]


def open_sbd_label(path: Location) -> npt.NDArray[np.uint8]:
    """Reads `GTcls.Segmentation`, H W ids 0..20 (SBD, `cls/*.mat`)."""
    classes = _read(path, "GTcls")
    return _ids(path, None if classes is None else classes.fields.get("Segmentation"))


def open_coco_stuff_label(path: Location) -> npt.NDArray[np.uint8]:
    """Reads `S`, H W ids 0..182 (COCO-Stuff 10k, `annotations/*.mat`)."""
    return _ids(path, _read(path, "S"))


def _read(path: Location, name: str) -> _Matrix | None:
    """The array of this name, or None if the file has no such array."""
    try:
        data = path.read_bytes()
        if len(data) < _HEADER or data[126:128] not in (b"IM", b"MI"):
            raise _Damaged("not a MATLAB 5 to 7.2 file")
        order = "<" if data[126:128] == b"IM" else ">"
        for element in _unpacked(_elements(memoryview(data)[_HEADER:], order), order):
            if element.kind == _MATRIX and (matrix := _matrix(element.content, order)).name == name:
                return matrix
    except (OSError, zlib.error, struct.error, ValueError, RecursionError) as error:
        raise UserError(f"{path}: missing or damaged .mat file ({error})") from error
    return None


def _unpacked(elements: Iterator[_Element], order: str) -> Iterator[_Element]:
    """The elements, with compressed ones replaced by their content."""
    for element in elements:
        if element.kind != _COMPRESSED:
            yield element
            continue
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(element.content, _LARGEST)
        if unpacking.unconsumed_tail:
            raise _Damaged(f"it unpacks to over {_LARGEST >> 20} MiB")
        yield from _elements(memoryview(data), order)


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # small: type and size share four bytes, the content follows directly
            kind, size, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        else:
            start = position + 8
            # All but compressed elements are padded to eight bytes.
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(data):
            raise _Damaged("an element reaches beyond the end")
        yield _Element(kind, data[start : start + size])
        position = end


def _matrix(content: memoryview, order: str) -> _Matrix:
    parts = _elements(content, order)
    (flags,) = struct.unpack_from(f"{order}I", _next(parts).content)
    shape = [int(side) for side in np.frombuffer(_next(parts).content, f"{order}i4")]
    name = bytes(_next(parts).content).decode("latin-1")
    kind = flags & 0xFF
    if kind == _STRUCT_CLASS and all(side == 1 for side in shape):
        return _Matrix(name, None, _fields(parts, order))
    if kind not in _NUMBER_CLASSES or flags & _COMPLEX:
        return _Matrix(name, None, {})
    numbers = _next(parts)
    if numbers.kind not in _NUMBERS:
        raise _Damaged(f"data type {numbers.kind} is not numeric")
    values = np.frombuffer(numbers.content, f"{order}{_NUMBERS[numbers.kind]}")
    return _Matrix(name, values.reshape(shape, order="F"), {})


def _fields(parts: Iterator[_Element], order: str) -> dict[str, _Matrix]:
    (length,) = struct.unpack_from(f"{order}i", _next(parts).content)
    names = bytes(_next(parts).content)
    if not 0 < length <= max(len(names), 1):
        raise _Damaged("field names of length 0")
    fields = {}
    for start in range(0, len(names), length):
        name = names[start : start + length].partition(b"\0")[0].decode("latin-1")
        fields[name] = _matrix(_next(parts).content, order)
    return fields


def _next(parts: Iterator[_Element]) -> _Element:
    part = next(parts, None)
    if part is None:
        raise _Damaged("it ends too early")
    return part


def _ids(path: Location, matrix: _Matrix | None) -> npt.NDArray[np.uint8]:
    ids = None if matrix is None else matrix.ids
    if ids is None or ids.ndim != 2:
        raise UserError(f"{path}: holds no label map where one is expected")
    whole = ids.astype(np.int64) if np.isfinite(ids).all() else np.full(ids.shape, -1)
    if ids.size and (whole.min() < 0 or whole.max() > 255):
        raise UserError(f"{path}: label ids must be 0..255, but there are {ids.min()}..{ids.max()}")
    return ids.astype(np.uint8)
