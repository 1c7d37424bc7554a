"""Generated street scenes in CamVid's classes; see `danet.data.scenes`."""

import operator
from collections.abc import Iterator
from pathlib import Path

from danet.data.catalog.camvid import SPEC as CAMVID
from danet.data.scenes import render
from danet.data.spec import CatalogEntry, DatasetSpec, Sample, constant
from danet.errors import UserError

SPEC = DatasetSpec(name="scenes", classes=CAMVID.classes, palette=CAMVID.palette)
_SPLITS = ("train", "val", "test")
_LENGTHS = {"train": 20_000, "val": 100, "test": 100}


class Scenes:
    """Draws each scene on access; every split has its own stream of scenes."""

    spec = SPEC

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return _LENGTHS[self.split]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        position = range(len(self))[operator.index(index)]  # no slice
        image, label = render(_SPLITS.index(self.split), position)
        return Sample(image, label, f"{self.split}_{position:05}")


def _open_split(root: Path | None, split: str) -> Scenes:
    if root is not None:
        raise UserError(f"data.root={root}: scenes are generated; do not set data.root")
    return Scenes(split)


ENTRY = CatalogEntry(
    splits=_SPLITS,
    spec=constant(SPEC),
    open_split=_open_split,
    generated=True,
)
