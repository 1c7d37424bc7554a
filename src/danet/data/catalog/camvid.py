"""CamVid as the SegNet tutorial splits it: 367 / 101 / 233 street scenes of 480x360.

Layout: `{train,val,test}/*.png|jpg` and `{train,val,test}annot/*.png` with ids 0..10 and 11 = void.
"""

from pathlib import Path

from danet.data.files import PairedFiles, label_map, pair_by_stem, require_root
from danet.data.spec import CatalogEntry, DatasetSpec, constant

VOID_ID = 11

SPEC = DatasetSpec(
    name="camvid",
    classes=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(SPEC.name, root)
    pairs = pair_by_stem(folder / split, folder / f"{split}annot")
    train_ids = {train_id: train_id for train_id in range(SPEC.num_classes)}
    return PairedFiles(SPEC, pairs, label_map({**train_ids, VOID_ID: SPEC.ignore_index}))


ENTRY = CatalogEntry(
    splits=("train", "val", "test"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=constant({"train": 367, "val": 101, "test": 233}),
)
