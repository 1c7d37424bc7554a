"""ADE20K's scene parsing benchmark, 150 classes: 20210 / 2000 pictures.

Layout: `ADEChallengeData2016/{images,annotations}/{training,validation}`, label 0 ignored; or
`ADEChallengeData2016.zip` as it is.
"""

from pathlib import Path

from danet.data.classes import read_spec
from danet.data.files import PairedFiles, find_folder, label_map, pair_by_stem, require_root
from danet.data.spec import CatalogEntry, SubmissionFormat, constant

SPEC = read_spec("ade20k")
_PLACES = ("ADEChallengeData2016/", "", "ADEChallengeData2016.zip/ADEChallengeData2016/")
_FOLDERS = {"train": "training", "val": "validation"}


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(SPEC.name, root)
    images, labels = (
        find_folder(folder, *(f"{place}{kind}" for place in _PLACES)) / _FOLDERS[split]
        for kind in ("images", "annotations")
    )
    train_ids = {i + 1: i for i in range(SPEC.num_classes)}
    pairs = pair_by_stem(images, labels)
    return PairedFiles(SPEC, pairs, label_map({0: SPEC.ignore_index, **train_ids}))


ENTRY = CatalogEntry(
    splits=("train", "val"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=constant({"train": 20_210, "val": 2_000}),
    submission=SubmissionFormat(tuple(range(1, 151)), ".png"),
)
