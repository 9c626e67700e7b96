"""Genome files turned into memory-mapped token ids once: FASTA, FASTQ (plain, gzip, bgzip) and 2bit.

One byte a base: the id of ``genomics.vocabulary`` and, where the file has lower case, a flag in the top bit. A map is
read-only and shared by all processes, forked or spawned, and reading a window is a copy of bytes.
"""

import gzip
import hashlib
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from core.errors import UserError
from genomics.vocabulary import ENCODE, INVALID, encode

LOWER = 0x80  # flag of a base in lower case
GZIP_MAGIC = b"\x1f\x8b"
TWOBIT_MAGIC = 0x1A412743
PIECE = 1 << 24
LAYOUT = 1  # of the cache; another number makes it anew


def _cased_table() -> bytes:
    table = ENCODE.copy()
    lower = np.arange(ord("a"), ord("z") + 1)
    table[lower[table[lower] != INVALID]] |= LOWER
    return table.tobytes()


CASED = _cased_table()
BLANKS = b" \t\r\n\v\f"


class Cached(NamedTuple):
    """The records of a file as one array."""

    lengths: dict[str, int]
    starts: dict[str, int]
    bases: np.ndarray  # (all bases,) uint8, read-only


def open_cached(path: Path) -> Cached:
    """Return the records of a genome file, from the cache where the file has not changed since.

    Args:
        path: FASTA, FASTQ or 2bit file; its name doesn't matter.

    Raises:
        UserError: If the file is missing, empty, of another kind, damaged, holds something other than bases, or two
            records have one name.
    """
    start = first_bytes(path)
    facts = path.stat()
    key = f"{LAYOUT}\0{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}"
    stem = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    index, data = stem.with_suffix(".json"), stem.with_suffix(".u8")
    if not (index.is_file() and data.is_file()):
        _convert(path, start, index, data)
    lengths: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))
    ends = np.cumsum(list(lengths.values())).tolist()
    starts = {name: end - length for (name, length), end in zip(lengths.items(), ends, strict=True)}
    return Cached(lengths, starts, np.memmap(data, np.uint8, "r").view(np.ndarray))  # plain: slices cost less


def _convert(path: Path, start: bytes, index: Path, data: Path) -> None:
    """Write the cache of a file, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=index.parent) as folder:
        draft = Path(folder) / "bases"
        lengths: dict[str, int] = {}
        with draft.open("wb") as out:
            for name, piece in _pieces(path, start):
                if name is not None:
                    if name in lengths:
                        raise UserError(f"{path}: two records are called {name!r}; names must differ")
                    _check_last(path, lengths)
                    lengths[name] = 0
                current = next(reversed(lengths))
                out.write(_tokens(path, piece, current, lengths[current]))
                lengths[current] += len(piece)
        _check_last(path, lengths)
        draft.replace(data)
        final = Path(folder) / "index"
        final.write_text(json.dumps(lengths), encoding="utf-8")
        final.replace(index)  # last: an index says that its bases are whole


def _check_last(path: Path, lengths: Mapping[str, int]) -> None:
    if lengths and lengths[last := next(reversed(lengths))] == 0:  # type: ignore[call-overload]
        raise UserError(f"{path}: record {last!r} has a header and no bases")


def _tokens(path: Path, piece: bytes, record: str, offset: int) -> bytes:
    ids = piece.translate(CASED)
    if bytes([INVALID]) in ids:
        try:
            encode(piece, record, offset)
        except UserError as error:
            raise UserError(f"{path}: {error}; correct the file, or give another") from None
    return ids


def _pieces(path: Path, start: bytes) -> Iterator[tuple[str | None, bytes]]:
    """Yield names and bases in order; a record's further pieces have no name."""
    if len(start) >= 4 and TWOBIT_MAGIC in (int.from_bytes(start[:4], e) for e in ("little", "big")):  # type: ignore[arg-type]
        yield from read_twobit(path)
        return
    opener = gzip.open if start[:2] == GZIP_MAGIC else open
    try:
        with cast(BinaryIO, opener(path, "rb")) as raw:
            file = cast(io.BufferedReader, raw)
            head = file.peek(1 << 12)[: 1 << 12].lstrip()
            if not head:
                raise UserError(f"{path} is empty; wanted FASTA records: a line '>name', then lines of bases")
            yield from read_fastq(path, file) if head.startswith(b"@") else read_fasta(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); copy or download it again") from None


def read_fasta(path: Path, file: BinaryIO) -> Iterator[tuple[str | None, bytes]]:
    """Yield records of FASTA text in pieces, of any line lengths, at the speed of the disk.

    Raises:
        UserError: For text before the first header, or a header without a name.
    """
    named, rest = False, b""
    while chunk := file.read(PIECE):
        chunk = rest + chunk
        cut = chunk.rfind(b"\n") + 1  # a header line must not be cut
        rest, lines = chunk[cut:], chunk[:cut]
        for name, bases in _split(path, lines, named):
            named = True
            yield name, bases
    for name, bases in _split(path, rest, named):
        named = True
        yield name, bases
    if not named:
        raise UserError(f"{path} is empty; wanted FASTA records: a line '>name', then lines of bases")


def _split(path: Path, lines: bytes, named: bool) -> Iterator[tuple[str | None, bytes]]:
    """Split whole lines at headers; what comes first belongs to the record before, if there is one."""
    before, *records = (b"\n" + lines).split(b"\n>")
    if named:
        if bases := before.translate(None, BLANKS):
            yield None, bases
    else:
        for line in before.split(b"\n"):
            if line.strip() and not line.startswith(b";"):  # comments of the original format
                found = line.strip()[:20].decode("latin-1")
                raise UserError(f"{path} is no FASTA file: it starts with {found!r}, wanted a header line '>name'")
    for record in records:
        header, _, bases = record.partition(b"\n")
        words = header.split()
        if not words:
            raise UserError(f"{path}: a header line has no name; wanted '>name'")
        yield words[0].decode("utf-8", "replace"), bases.translate(None, BLANKS)


def read_fastq(path: Path, file: BinaryIO) -> Iterator[tuple[str | None, bytes]]:
    """Yield the reads of FASTQ text: four lines each, name, bases, ``+`` and qualities, which are dropped.

    Raises:
        UserError: For a read of another shape, with its line.
    """
    number = 0
    while line := file.readline():
        number += 1
        if not line.strip():
            continue
        bases, plus, quality = (file.readline().strip() for _ in range(3))
        words = line[1:].split()
        if not line.startswith(b"@") or not words or not plus.startswith(b"+") or len(bases) != len(quality):
            raise UserError(
                f"{path}, line {number}: no FASTQ read; wanted four lines: @name, bases, + and as many qualities"
            )
        number += 3
        yield words[0].decode("utf-8", "replace"), bases


def read_twobit(path: Path) -> Iterator[tuple[str | None, bytes]]:
    """Yield the records of a 2bit file (UCSC's format, version 0 or 1), N and lower case restored.

    Raises:
        UserError: If the file is cut off or of another version.
    """
    data = np.memmap(path, np.uint8, "r")
    order = "<" if int.from_bytes(data[:4].tobytes(), "little") == TWOBIT_MAGIC else ">"

    def numbers(place: int, count: int, kind: str = "u4") -> np.ndarray:
        dtype = np.dtype(order + kind)
        if place + count * dtype.itemsize > len(data):
            raise UserError(f"{path} is a damaged 2bit file: it ends early; copy or download it again")
        return np.frombuffer(data, dtype, count, place).astype(np.int64)

    _, version, count, _ = numbers(0, 4).tolist()
    if version not in (0, 1):
        raise UserError(f"{path} is a 2bit file of version {version}; wanted 0 or 1")
    place, entries = 16, []
    for _ in range(count):
        size = int(numbers(place, 1, "u1")[0])
        name = data[place + 1 : place + 1 + size].tobytes().decode("utf-8", "replace")
        entries.append((name, int(numbers(place + 1 + size, 1, "u8" if version else "u4")[0])))
        place += 1 + size + (8 if version else 4)
    letters = np.frombuffer(b"TCAG", np.uint8)
    for name, place in entries:
        length, place = int(numbers(place, 1)[0]), place + 4
        blocks = []
        for _ in range(2):  # N, then lower case
            many = int(numbers(place, 1)[0])
            blocks.append((numbers(place + 4, many), numbers(place + 4 + 4 * many, many)))
            place += 4 + 8 * many
        packed = numbers(place + 4, (length + 3) // 4, "u1").astype(np.uint8)
        bases = letters[(packed[:, None] >> np.array([6, 4, 2, 0], np.uint8)) & 3].reshape(-1)[:length].copy()
        for start, size in zip(*blocks[0], strict=True):
            bases[start : start + size] = ord("N")
        for start, size in zip(*blocks[1], strict=True):
            bases[start : start + size] |= 0x20
        yield name, bases.tobytes()


def first_bytes(path: Path) -> bytes:
    """Return the start of a file.

    Raises:
        UserError: If it cannot be read, or holds nothing.
    """
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


def cache_folder() -> Path:
    """A folder of our own: in the user's cache, or in the temporary folder where that cannot be written.

    Raises:
        UserError: If neither can.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    places = [Path(home) if home else Path.home() / ".cache", Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"]
    for place in places:
        folder = place / "triscan" / "genomes"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"no folder for genomes can be written: tried {' and '.join(map(str, places))}")
