"""Intervals on records: BED files, splits into training, validation and test parts, and tiling with windows.

Coordinates are 0-based and half-open, as in BED.
"""

import gzip
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError

PARTS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "valid": "val", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, order=True)
class Interval:
    """Bases ``start`` to ``end`` of a record."""

    record: str
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.record}:{self.start}-{self.end}"


def whole_records(lengths: Mapping[str, int]) -> list[Interval]:
    """Return each record as one interval.

    Args:
        lengths: Name and length of the records.
    """
    return [Interval(name, 0, length) for name, length in lengths.items()]


def read_bed(path: str | Path, lengths: Mapping[str, int]) -> list[tuple[Interval, str]]:
    """Read the intervals of a BED file and the name in its fourth column, empty where there is none.

    Args:
        path: The file, plain or gzipped; blank lines, comments, ``track`` and ``browser`` lines are skipped.
        lengths: Name and length of the records the intervals lie on.

    Raises:
        UserError: For a line that is none of this, or an interval outside its record; the message names the line.
    """
    found = []
    for number, line in enumerate(read_lines(Path(path), "BED"), 1):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) < 3 or not (columns[1].strip().isdigit() and columns[2].strip().isdigit()):
            raise UserError(f"{path}, line {number}: got {line[:60]!r}, wanted record, start and end, tabs between")
        interval = Interval(columns[0], int(columns[1]), int(columns[2]))
        if interval.record not in lengths:
            near = ", ".join(list(lengths)[:3])
            raise UserError(f"{path}, line {number}: no record {interval.record!r} in the FASTA file, which has {near}")
        if not interval.start < interval.end <= lengths[interval.record]:
            length = lengths[interval.record]
            raise UserError(f"{path}, line {number}: {interval} is empty or ends beyond the record's {length:,} bases")
        found.append((interval, columns[3].strip() if len(columns) > 3 else ""))
    if not found:
        raise UserError(f"{path} holds no intervals; wanted lines of record, start and end")
    return found


def read_lines(path: Path, kind: str) -> list[str]:
    """The lines of a text file, plain or gzipped.

    Args:
        path: The file; its name doesn't matter.
        kind: What it should be, for the message.

    Raises:
        UserError: If it is missing, damaged or no text.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or f"damaged gzip file: {error}"
    except (EOFError, zlib.error) as error:
        reason = f"damaged gzip file: {error}"
    except UnicodeDecodeError:
        reason = "it is no text"
    raise UserError(f"{path} cannot be read as a {kind} file ({reason}); give another, plain or gzipped")


def split_by_records(
    intervals: Iterable[Interval], val: Sequence[str], test: Sequence[str]
) -> dict[str, list[Interval]]:
    """Split by record, such as by chromosome: those named go to validation and test, the others train.

    Raises:
        UserError: If a name is no record, is given for both, or a part stays empty.
    """
    intervals = list(intervals)
    known = {interval.record for interval in intervals}
    for name in [*val, *test]:
        if name not in known:
            raise UserError(f"no record {name!r} to hold out; the first ones are {', '.join(sorted(known)[:5])}")
    if both := set(val) & set(test):
        raise UserError(f"record {min(both)!r} is in both the validation and the test part; a record goes to one")
    part_of = {**dict.fromkeys(val, "val"), **dict.fromkeys(test, "test")}
    parts: dict[str, list[Interval]] = {part: [] for part in PARTS}
    for interval in intervals:
        parts[part_of.get(interval.record, "train")].append(interval)
    return _not_empty(parts)


def split_by_coordinate(
    intervals: Iterable[Interval], val: float = 0.15, test: float = 0.15
) -> dict[str, list[Interval]]:
    """Split by position: in the given order the first bases train, then come validation and test.

    An interval that a boundary falls into is cut there.

    Args:
        intervals: What is split, in the order of the genome.
        val: Share of the bases for validation.
        test: Share of the bases for the test.

    Raises:
        UserError: If the shares leave no room, or a part stays empty.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise UserError(f"the validation and test shares are {val} and {test}; wanted both above 0 and a sum below 1")
    intervals = list(intervals)
    total = sum(len(interval) for interval in intervals)
    first, second = round((1 - val - test) * total), round((1 - test) * total)
    bounds = {"train": (0, first), "val": (first, second), "test": (second, total)}
    parts: dict[str, list[Interval]] = {part: [] for part in PARTS}
    position = 0
    for interval in intervals:
        for part, (low, high) in bounds.items():
            start, end = max(low, position) - position, min(high, position + len(interval)) - position
            if start < end:
                parts[part].append(Interval(interval.record, interval.start + start, interval.start + end))
        position += len(interval)
    return _not_empty(parts)


def check_lengths(intervals: Iterable[Interval], length: int) -> None:
    """Make sure that every interval holds at least one window.

    Raises:
        UserError: Naming the first one that is shorter.
    """
    for interval in intervals:
        if len(interval) < length:
            raise UserError(
                f"{interval} has {len(interval):,} bases, shorter than the window of {length:,}; give a shorter "
                "--data.window, or pad short sequences with --data.pad true"
            )


def tile(intervals: Iterable[Interval], length: int) -> list[Interval]:
    """Cover intervals with windows so that every base lies in exactly one.

    The last window of an interval is shorter where the length doesn't divide it; who reads it pads it.

    Args:
        intervals: What is covered.
        length: Bases of a window.
    """
    return [
        Interval(interval.record, start, min(start + length, interval.end))
        for interval in intervals
        for start in range(interval.start, interval.end, length)
    ]


def _not_empty(parts: dict[str, list[Interval]]) -> dict[str, list[Interval]]:
    for part, intervals in parts.items():
        if not intervals:
            raise UserError(f"nothing is left for the {part} part; hold out less, or give more sequence")
    return parts
