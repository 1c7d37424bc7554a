"""Class names and official colours of the larger datasets, one CSV file per dataset."""

import csv
from importlib import resources

from danet.data.spec import DatasetSpec


def read_spec(name: str) -> DatasetSpec:
    """Reads the classes of dataset `name` in the order of their train ids."""
    text = resources.files(__name__).joinpath(f"{name}.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return DatasetSpec(
        name,
        classes=tuple(row["name"] for row in rows),
        palette=tuple((int(row["red"]), int(row["green"]), int(row["blue"])) for row in rows),
    )
