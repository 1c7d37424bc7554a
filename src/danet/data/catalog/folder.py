"""A user's own pictures: `images/{split}` and `labels/{split}` (or `masks/{split}`).

An image and its label share the stem. Labels hold ids 0.., 255 is ignored. `classes.txt` in the
root names the classes in the order of their ids, one per line, each optionally followed by its
colour as three numbers 0..255; lines that begin with # are comments. Without that file, the largest
id in the labels gives the number: every label of every split is read for it, once in a process.
"""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from danet.data.archives import Location
from danet.data.files import PairedFiles, list_images, pair_by_stem, require_root, same_ids
from danet.data.images import open_label
from danet.data.spec import IGNORE_INDEX, CatalogEntry, DatasetSpec
from danet.errors import UserError
from danet.palette import Color, default_palette
from danet.threads import map_ahead

NAME = "folder"
_LABEL_FOLDERS = ("labels", "masks")
_CLASSES_FILE = "classes.txt"
_COLOR_WITH_COMMAS = re.compile(r"[,;]\s*\d+\s*[,;]\s*\d+\s*[,;]\s*\d+$")


def _spec(root: Path | None) -> DatasetSpec:
    folder = require_root(NAME, root)
    listing = folder / _CLASSES_FILE
    return _read_classes(listing) if listing.is_file() else _count_classes(folder)


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(NAME, root)
    pairs = pair_by_stem(folder / "images" / split, _label_folder(folder) / split)
    classes = _spec(root)
    return PairedFiles(classes, pairs, same_ids(classes.num_classes))


def _label_folder(root: Location) -> Location:
    for name in _LABEL_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root} has neither labels/ nor masks/; put the label images there")


def _read_classes(listing: Location) -> DatasetSpec:
    names: list[str] = []
    colors: list[Color | None] = []
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listing}: cannot be read as UTF-8 text ({error})") from error
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("#"):
            continue
        *words, red, green, blue = ["", "", "", *line.split()]
        numbers = [int(word) for word in (red, green, blue) if word.isdecimal()]
        has_color = len(numbers) == 3 and any(words)
        if has_color and max(numbers) > 255:
            raise UserError(
                f"{listing}: the colour at the end of {line!r} is not three numbers in 0..255"
            )
        if _COLOR_WITH_COMMAS.search(line):
            raise UserError(f"{listing}: {line!r}: separate a colour's numbers by spaces")
        names.append(" ".join(filter(None, words)) if has_color else line)
        colors.append((numbers[0], numbers[1], numbers[2]) if has_color else None)
    if len(names) > 1 and all(name.split()[0] == str(i) for i, name in enumerate(names)):
        raise UserError(f"{listing}: every line begins with its id; write the names alone")
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise UserError(f"{listing}: {len(names)} classes; name 1 to {IGNORE_INDEX}, one a line")
    if len(set(names)) < len(names):
        raise UserError(f"{listing}: a class is named twice; names must differ")
    palette = [
        color or fallback
        for color, fallback in zip(colors, default_palette(len(names)), strict=True)
    ]
    return DatasetSpec(NAME, tuple(names), tuple(palette))


def _count_classes(root: Location) -> DatasetSpec:
    labels = _label_folder(root)
    largest = _largest_id(labels.resolve() if isinstance(labels, Path) else labels)
    if largest < 0:
        raise UserError(
            f"{root}: no readable label holds a class id; name the classes in {_CLASSES_FILE}"
        )
    if largest == 0:
        raise UserError(
            f"{root}: the labels hold no class other than 0 (in masks of 0 and 255, 0 is a "
            f"class and 255 is ignored); give objects id 1, or name the classes in {_CLASSES_FILE}"
        )
    return DatasetSpec(NAME, tuple(f"class {index}" for index in range(largest + 1)))


@functools.cache
def _largest_id(label_folder: Location) -> int:
    """The largest class id in the labels of all splits; -1 if there is none."""
    splits = [path for path in label_folder.iterdir() if path.is_dir()]
    paths = (path for split in splits for path in list_images(split))
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        found = (ids for _, ids in map_ahead(pool, _largest_id_of, paths, 4 * workers))
        return max(found, default=-1)


def _largest_id_of(path: Location) -> int:
    try:
        ids = open_label(path)
    except UserError:  # reported where the picture is read
        return -1
    counts = np.bincount(ids.ravel(), minlength=IGNORE_INDEX + 1)
    return int(np.flatnonzero(counts[:IGNORE_INDEX]).max(initial=-1))


ENTRY = CatalogEntry(
    splits=("train", "val", "test"),
    spec=_spec,
    open_split=_open_split,
)
