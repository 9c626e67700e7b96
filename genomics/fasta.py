"""Random access to FASTA files, plain or gzipped, safe in forked and spawned workers.

A plain file is read through pyfaidx. Its index goes to a cache folder, never beside the user's file, and a handle is
opened anew in every process: one that two processes share returns wrong bases without a word. Gzip has no random
access, so a gzipped file (bgzip included) is read into memory once, one byte a base; so is a plain file whose lines
have irregular lengths, which cannot be indexed.
"""

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pyfaidx import Fasta as Handle
from pyfaidx import FastaIndexingError, UnsupportedCompressionFormat

from core.errors import UserError
from genomics.vocabulary import encode

GZIP_MAGIC = b"\x1f\x8b"
PIECE = 1 << 24  # bases that are checked at a time


class Fasta:
    """The records of one FASTA file as token ids (see ``genomics.vocabulary`` for what each character becomes).

    The whole file is checked when it is opened; for a plain file that is done once, and kept with the index for as
    long as the file's size and time stay the same.

    Args:
        path: The file, ``.fa``, ``.fasta`` or any other name, perhaps gzipped.

    Attributes:
        lengths: Name of each record, up to the first blank, and its length in bases, in the file's order.

    Raises:
        UserError: If the file is missing, empty, no FASTA, damaged, holds something other than bases, or two records
            have one name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._memory: dict[str, np.ndarray] | None = None
        self._index: Path | None = None  # of a file that is not in memory
        self._handle: tuple[int, Handle] | None = None  # process id, handle
        start = _first_bytes(self.path)
        if start[:2] == GZIP_MAGIC:
            self._memory = _read_all(self.path, gzip.open)
        else:
            _check_start(self.path, start)
            self._index = _index(self.path)
            self._memory = _read_all(self.path, open) if self._index is None else None
        self.lengths: Mapping[str, int] = self._lengths()

    def __len__(self) -> int:
        """Number of records."""
        return len(self.lengths)

    def read(self, record: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return bases ``start`` to ``end`` (0-based, half-open) of a record.

        Args:
            record: Name of the record.
            start: First base.
            end: Base after the last; None is the record's end.

        Returns:
            (end - start,) uint8 token ids.

        Raises:
            UserError: If there is no such record, or it does not reach that far.
        """
        if record not in self.lengths:
            first = ", ".join(list(self.lengths)[:5])
            raise UserError(f"{self.path} has no record {record!r}; its first ones are {first}")
        end = self.lengths[record] if end is None else end
        if not 0 <= start <= end <= self.lengths[record]:
            raise UserError(
                f"{self.path}: {record}:{start}-{end} lies outside the record, which has {self.lengths[record]:,} bases"
            )
        if self._memory is not None:
            return self._memory[record][start:end]
        if end == start:
            return np.empty(0, np.uint8)
        return _encode(self.path, self._open()[record][start:end], record, start)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the handle behind: a spawned worker opens its own."""
        return {**self.__dict__, "_handle": None}

    def _open(self) -> Handle:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), _handle(self.path, self._index))
        return self._handle[1]

    def _lengths(self) -> dict[str, int]:
        if self._memory is not None:
            return {name: len(ids) for name, ids in self._memory.items()}
        lengths = {name: int(entry.rlen) for name, entry in self._open().faidx.index.items()}
        _check_lengths(self.path, lengths)
        return lengths


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except FileNotFoundError:
        raise UserError(f"no FASTA file at {path}; give the path of one, plain or gzipped") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as a FASTA file: {error.strerror}") from None
    if not start.strip():
        raise UserError(f"{path} is empty; wanted FASTA records: a line '>name', then lines of bases")
    return start


def _check_start(path: Path, start: bytes) -> None:
    if not start.lstrip().startswith((b">", b";")):
        found = start.lstrip()[:20].decode("latin-1")
        raise UserError(f"{path} is no FASTA file: it starts with {found!r}, wanted a header line '>name'")


def _encode(path: Path, sequence: bytes | str, record: str, start: int = 0) -> np.ndarray:
    """Encode, and name the file where that fails."""
    try:
        return encode(sequence, record, start)
    except UserError as error:
        raise UserError(f"{path}: {error}; correct the file, or give another") from None


def _check_lengths(path: Path, lengths: Mapping[str, int]) -> None:
    for name, length in lengths.items():
        if length == 0:
            raise UserError(f"{path}: record {name!r} has a header and no bases")


def _handle(path: Path, index: Path | None) -> Handle:
    return Handle(str(path), indexname=str(index), as_raw=True, rebuild=False)


def _cache() -> Path:
    """A folder of our own for indices: the user's cache, or the temporary folder where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME")
    places = [Path(home) if home else Path.home() / ".cache", Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"]
    for place in places:
        folder = place / "triscan" / "fasta"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"no folder for the index of FASTA files can be written: tried {' and '.join(map(str, places))}")


def _index(path: Path) -> Path | None:
    """Return the index of a plain file, after a check of all its bases; None if it can't have one."""
    facts = path.stat()
    key = f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}"
    final = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.fai"
    if final.is_file():
        return final
    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        draft = Path(folder) / "index.fai"
        try:
            records = _handle(path, draft)
        except (FastaIndexingError, UnsupportedCompressionFormat, ImportError, ValueError):
            return None  # irregular lines, or a mistake, which reading the file into memory will name
        lengths = {name: int(entry.rlen) for name, entry in records.faidx.index.items()}
        _check_lengths(path, lengths)
        for name, length in lengths.items():
            for start in range(0, length, PIECE):
                _encode(path, records[name][start : start + PIECE], name, start)
        records.close()
        draft.replace(final)  # only a file that was checked has an index
    return final


def _read_all(path: Path, opener: Any) -> dict[str, np.ndarray]:
    """Read and check every record of a file, of any line lengths."""
    records: dict[str, np.ndarray] = {}
    try:
        with opener(path, "rb") as file:
            for name, sequence in _parse(path, file):
                if name in records:
                    raise UserError(f"{path}: two records are called {name!r}; names must differ")
                records[name] = _encode(path, sequence, name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); copy or download it again") from None
    _check_lengths(path, {name: len(ids) for name, ids in records.items()})
    return records


def _parse(path: Path, lines: Any) -> Iterator[tuple[str, bytes]]:
    name, parts = None, []
    for line in lines:
        line = line.strip()
        if line.startswith(b">"):
            if name is not None:
                yield name, b"".join(parts)
            words = line[1:].split()
            if not words:
                raise UserError(f"{path}: a header line has no name; wanted '>name'")
            name, parts = words[0].decode("utf-8", "replace"), []
        elif line and not (name is None and line.startswith(b";")):  # comments of the original format
            if name is None:
                _check_start(path, line)
            parts.append(line)
    if name is None:
        raise UserError(f"{path} is empty; wanted FASTA records: a line '>name', then lines of bases")
    yield name, b"".join(parts)
