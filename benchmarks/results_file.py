"""Rows of a results file."""

import argparse
import csv
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def add_results_option(
    parser: argparse.ArgumentParser, help_text: str = "where the rows go; %(default)s"
) -> None:
    """Adds --results, for a try that must not replace the rows that are kept."""
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help=help_text,
    )


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=RESULTS)
    return done.stdout.strip()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a file, which the first ones start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def renew_rows(path: Path, rows: list[dict[str, Any]], case: tuple[str, ...]) -> None:
    """Adds rows to a file in place of those that are alike in the columns `case`."""

    def case_of(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in case)

    renewed = {case_of(row) for row in rows}
    write_rows(path, [row for row in read_rows(path) if case_of(row) not in renewed] + rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a file anew."""
    path.unlink(missing_ok=True)
    append_rows(path, rows)
