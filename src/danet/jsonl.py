"""Files of one JSON object a line, to which killed processes may have written unfinished lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of all lines that are whole; none where there is no such file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows that a run logged: whole lines of numbers, with a step; none without the file."""
    return [
        row
        for row in read_whole_lines(path)
        if "step" in row and all(isinstance(value, int | float) for value in row.values())
    ]
