"""Random access to genome files, safe in forked and spawned workers.

A file is checked and turned into memory-mapped token ids when it is first opened (see ``genomics.cache``), one byte a
base in the user's cache folder, never beside the file; after that a window is a copy of bytes.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.errors import UserError
from genomics.cache import LOWER, Cached, open_cached
from genomics.vocabulary import PAD, N

Lower = Literal["keep", "mask"]
SUFFIXES = (".fa", ".fna", ".fasta", ".fas", ".fq", ".fastq", ".2bit")  # of the genome files in a folder


class Fasta:
    """The records of one genome file as token ids (see ``genomics.vocabulary`` for what each character becomes).

    Args:
        path: FASTA or FASTQ, plain, gzipped or bgzipped, or 2bit; any name.
        lower: What lower case, which marks repeats in most genome files, becomes: ``keep`` reads it as upper case,
            ``mask`` as N.

    Attributes:
        lengths: Name of each record, up to the first blank, and its length in bases, in the file's order.

    Raises:
        UserError: If the file is missing, empty, of another kind, damaged, holds something other than bases, or two
            records have one name.
    """

    def __init__(self, path: str | Path, lower: Lower = "keep") -> None:
        self.path, self.lower = Path(path), lower
        self._cached: Cached | None = open_cached(self.path)
        self.lengths: Mapping[str, int] = self._cached.lengths

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
        if self._cached is None:  # in a spawned worker
            self._cached = open_cached(self.path)
        place = self._cached.starts[record]
        bases = self._cached.bases[place + start : place + end]
        if self.lower == "mask":
            return np.where(bases & LOWER, np.uint8(N), bases)
        return np.bitwise_and(bases, np.uint8(~LOWER & 0xFF))

    def read_padded(self, record: str, start: int, end: int) -> np.ndarray:
        """Return a window that may reach beyond its record, [PAD] there: (end - start,) uint8."""
        low, high = max(start, 0), min(end, self.lengths.get(record, end))
        if low == start and high == end:
            return self.read(record, start, end)
        ids = np.full(end - start, PAD, np.uint8)
        if low < high:
            ids[low - start : high - start] = self.read(record, low, high)
        return ids

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map behind, whose pages would be copied: a spawned worker opens its own."""
        return {**self.__dict__, "_cached": None}


class Genomes(Fasta):
    """Several genome files as one; a record is called ``file:record``, by the file's name up to the first dot.

    Args:
        paths: The files, or folders of them; of a single one the records keep their own names.
        lower: See ``Fasta``.
        own_names: Let records keep their own names where no two are alike.

    Raises:
        UserError: See ``Fasta``; and if two files have one name.
    """

    def __init__(self, paths: Sequence[str | Path], lower: Lower = "keep", own_names: bool = False) -> None:
        if not paths:
            raise UserError("got no genome files, wanted one or more")
        self.files = [open_genome(path, lower) for path in paths]
        self.path, self.lower, self._cached = self.files[0].path, lower, None
        names = [Path(path).name.split(".")[0] for path in paths]
        records = [record for file in self.files for record in file.lengths]
        if own_names and len(set(records)) == len(records):
            names = [""] * len(paths)
        elif len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"two genome files are called {double!r}; rename one, so that records have names of their own"
            )
        prefixes = [f"{name}:" if name else "" for name in names] if len(names) > 1 else [""]
        self.places = {
            prefix + record: (file, record)
            for prefix, file in zip(prefixes, self.files, strict=True)
            for record in file.lengths
        }
        self.lengths = {name: file.lengths[record] for name, (file, record) in self.places.items()}

    def read(self, record: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return bases of a record; see ``Fasta.read``."""
        if record not in self.places:
            first = ", ".join(list(self.lengths)[:5])
            raise UserError(f"no record {record!r} in the genome files; the first ones are {first}")
        file, name = self.places[record]
        return file.read(name, start, end)


def open_genome(path: str | Path, lower: Lower = "keep") -> Fasta:
    """Open a genome file, or a folder of them: one genome in several files, such as one a chromosome.

    Args:
        path: The file or folder. In a folder files that end in ``SUFFIXES``, perhaps with .gz, are read, in the order
            of their names and the numbers in them; others are passed over. Their records keep their names where no two
            are alike, else they are called ``file:record``.
        lower: See ``Fasta``.

    Raises:
        UserError: See ``Fasta``; and if a folder holds no such file.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return Fasta(place, lower)
    files = [file for file in place.iterdir() if file.is_file() and file.name.removesuffix(".gz").endswith(SUFFIXES)]
    if not files:
        raise UserError(f"the folder {place} holds no genome files; wanted names in {', '.join(SUFFIXES)}, or with .gz")
    genome = Genomes(sorted(files, key=_by_number), lower, own_names=True)
    genome.path = place
    return genome


def _by_number(path: Path) -> list[tuple[int, str]]:
    """What sorts chr2 before chr10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
