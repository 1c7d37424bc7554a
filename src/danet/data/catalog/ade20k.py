"""ADE20K's scene parsing benchmark, 150 classes: 20210 / 2000 / 3352 pictures.

Layout: `ADEChallengeData2016/{images,annotations}/{training,validation}`, label 0 ignored; or
`ADEChallengeData2016.zip` as it is. The test split, `release_test/testing` or `release_test.zip`,
has no labels.
"""

from pathlib import Path

from danet.data.classes import read_spec
from danet.data.files import (
    PairedFiles,
    find_folder,
    ids_from_one,
    images_by_stem,
    pair_by_stem,
    require_root,
    without_labels,
)
from danet.data.spec import CatalogEntry, SubmissionFormat, constant

SPEC = read_spec("ade20k")
_PLACES = ("ADEChallengeData2016/", "", "ADEChallengeData2016.zip/ADEChallengeData2016/")
_FOLDERS = {"train": "training", "val": "validation"}
_TEST_PLACES = ("", "../", "ADEChallengeData2016/", "release_test.zip/")


def _open_split(root: Path | None, split: str) -> PairedFiles:
    folder = require_root(SPEC.name, root)
    train_ids = ids_from_one(SPEC.num_classes)
    if split == "test":
        testing = find_folder(folder, *(f"{place}release_test/testing" for place in _TEST_PLACES))
        return PairedFiles(SPEC, without_labels(images_by_stem(testing)), train_ids)
    images, labels = (
        find_folder(folder, *(f"{place}{kind}" for place in _PLACES)) / _FOLDERS[split]
        for kind in ("images", "annotations")
    )
    return PairedFiles(SPEC, pair_by_stem(images, labels), train_ids)


ENTRY = CatalogEntry(
    splits=("train", "val", "test"),
    spec=constant(SPEC),
    open_split=_open_split,
    counts=constant({"train": 20_210, "val": 2_000, "test": 3_352}),
    submission=SubmissionFormat(tuple(range(1, 151)), ".png"),
)
