"""Labels in MATLAB files: SBD's and COCO-Stuff 10k's."""

from typing import Any

import numpy as np
import numpy.typing as npt

from danet.data.archives import Location, ZipPath
from danet.errors import UserError


def open_sbd_label(path: Location) -> npt.NDArray[np.uint8]:
    """Reads `GTcls.Segmentation`, H W ids 0..20 (SBD, `cls/*.mat`)."""
    classes = _read(path).get("GTcls")
    if not isinstance(classes, np.ndarray) or classes.size != 1 or classes.dtype.names is None:
        return _ids(path, None)
    fields = dict(zip(classes.dtype.names, classes.item(), strict=True))
    return _ids(path, fields.get("Segmentation"))


def open_coco_stuff_label(path: Location) -> npt.NDArray[np.uint8]:
    """Reads `S`, H W ids 0..182 (COCO-Stuff 10k, `annotations/*.mat`)."""
    return _ids(path, _read(path).get("S"))


def _read(path: Location) -> dict[str, Any]:
    try:
        from scipy.io import loadmat  # noqa: PLC0415 - only these two datasets need it
    except ImportError as error:
        raise UserError(f"{path}: reading .mat labels needs scipy; pip install scipy") from error
    try:
        content: dict[str, Any] = loadmat(path.open() if isinstance(path, ZipPath) else path)
    # scipy's reader raises many types on a damaged file.
    except Exception as error:
        raise UserError(f"{path}: missing or damaged .mat file ({error})") from error
    return content


def _ids(path: Location, ids: Any) -> npt.NDArray[np.uint8]:
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.number):
        raise UserError(f"{path}: holds no label map where one is expected")
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise UserError(f"{path}: label ids must be 0..255, but there are {ids.min()}..{ids.max()}")
    return ids.astype(np.uint8)
