"""PASCAL Context without its background, 59 classes; the files are `pascal_context`'s."""

from pathlib import Path

from danet.data.catalog import pascal_context
from danet.data.files import PairedFiles, label_map
from danet.data.spec import CatalogEntry, DatasetSpec, constant

SPEC = DatasetSpec(
    "pascal_context_59", pascal_context.SPEC.classes[1:], pascal_context.SPEC.palette[1:]
)


def _open_split(root: Path | None, split: str) -> PairedFiles:
    train_ids = {i + 1: i for i in range(SPEC.num_classes)}
    ids = label_map({0: SPEC.ignore_index, **train_ids})
    return PairedFiles(SPEC, pascal_context.pairs(root, split), ids)


ENTRY = CatalogEntry(
    splits=pascal_context.ENTRY.splits,
    spec=constant(SPEC),
    open_split=_open_split,
    counts=pascal_context.ENTRY.counts,
)
