"""A CSV file that grows by a row at a time, so that a study cut short keeps what it has measured."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file, which begins with the names of the columns. What a crash left of a row stays apart from it.

    Args:
        path: The file; it and its folder are made where they are missing.
        row: A value for each column, in the order of the columns.
    """
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        elif not path.read_bytes().endswith(b"\n"):
            file.write("\n")
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a file; none if there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row and None not in row.values()]
