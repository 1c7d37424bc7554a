"""PASCAL Context without its background, 59 classes; the files are `pascal_context`'s."""

from pathlib import Path

from danet.data.catalog import pascal_context
from danet.data.files import PairedFiles, ids_from_one
from danet.data.spec import CatalogEntry, DatasetSpec, constant

SPEC = DatasetSpec(
    "pascal_context_59", pascal_context.SPEC.classes[1:], pascal_context.SPEC.palette[1:]
)


def _open_split(root: Path | None, split: str) -> PairedFiles:
    return PairedFiles(SPEC, pascal_context.pairs(root, split), ids_from_one(SPEC.num_classes))


ENTRY = CatalogEntry(
    splits=pascal_context.ENTRY.splits,
    spec=constant(SPEC),
    open_split=_open_split,
    counts=pascal_context.ENTRY.counts,
)
