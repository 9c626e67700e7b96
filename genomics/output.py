"""What the commands on trained models share: which intervals to read, where results go, and tracks as files."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from core.errors import UserError
from core.training.folder import RunFolder, numbered
from core.training.report import Report
from genomics.fasta import Fasta
from genomics.intervals import Interval, read_bed, whole_records

RUNS = Path("runs")


class Results:
    """The folder of one command's results: files, metrics.json and report.html; its path is the last line printed.

    Args:
        command: Name of the command, such as ``embed``.
        out: The folder, which must not hold anything yet; None is the next ``runs/genomics/<command>/<n>``.

    Raises:
        UserError: If the folder is not empty.
    """

    def __init__(self, command: str, out: str | None) -> None:
        if out is None:
            self._folder = numbered(RUNS / "genomics" / command)
        else:
            path = Path(out).expanduser()
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"--out {path} exists and is not empty; name another folder")
            if path.is_dir():
                path.rmdir()
            self._folder = RunFolder(path)
        self.path = self._folder.path
        self.command = command

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Remove the folder if nothing came of it."""
        if kind is not None:
            self._folder.discard()

    def finish(self, metrics: Mapping[str, float], report: Report) -> None:
        """Write metrics, null where there is no number, and the page, and print the folder."""
        known = {name: None if math.isnan(value) else value for name, value in metrics.items()}  # JSON has no NaN
        (self.path / "metrics.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        report.write(self.path / "report.html")
        self._folder.start()
        self._folder.mark({"status": "finished", "command": self.command})
        print(self.path, flush=True)


def intervals(fasta: Fasta, bed: str | None) -> list[tuple[Interval, str]]:
    """Return the intervals of a BED file with their names, or all records with theirs."""
    if bed is None:
        return [(interval, interval.record) for interval in whole_records(fasta.lengths)]
    return [(interval, name or str(interval)) for interval, name in read_bed(bed, fasta.lengths)]


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Go through items beside a progress bar."""
    return track(items, description=what, transient=True)


def write_bedgraph(path: Path, rows: Iterable[tuple[str, int, int, float]], name: str) -> None:
    """Write a track as bedGraph, line by line as the rows come."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f'track type=bedGraph name="{name}"\n')
        for record, start, end, value in rows:
            file.write(f"{record}\t{start}\t{end}\t{value:.6g}\n")


def write_bigwig(path: Path, rows: Iterable[tuple[str, int, int, float]], lengths: Mapping[str, int]) -> None:
    """Write a track as bigWig.

    Raises:
        UserError: If pyBigWig is not installed.
    """
    try:
        import pyBigWig  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--format bigwig needs pyBigWig, which is not installed; run `pip install pyBigWig`") from None
    with pyBigWig.open(str(path), "w") as file:
        file.addHeader(list(lengths.items()))
        for batch in _batches(rows, 10_000):
            records, starts, ends, values = (list(column) for column in zip(*batch, strict=True))
            file.addEntries(records, starts, ends=ends, values=values)


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
