"""FASTA files of every kind, read at random by forked and spawned workers."""

import gzip
import pickle
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from genomics.cache import PIECE, TWOBIT_MAGIC
from genomics.fasta import Fasta, Genomes, open_genome
from genomics.vocabulary import decode, encode


def random_records(count: int = 7, longest: int = 5000) -> dict[str, str]:
    rng = np.random.default_rng(0)
    return {f"chr{i}": "".join(rng.choice(list("ACGTacgtN"), int(rng.integers(1, longest)))) for i in range(count)}


def as_fasta(records: dict[str, str], width: int = 61, end: str = "\n") -> str:
    lines = []
    for name, bases in records.items():
        lines += [f">{name} some words", *(bases[i : i + width] for i in range(0, len(bases), width))]
    return end.join(lines) + end


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", ["a.fa", "a.fa.gz", "a", "renamed.gz.txt"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("width", [1, 61, 10**6])
def test_reads_what_is_there(tmp_path: Path, name: str, end: str, width: int) -> None:
    records = random_records(3, 500)
    fasta = Fasta(write(tmp_path / name, as_fasta(records, width, end)))
    assert dict(fasta.lengths) == {key: len(bases) for key, bases in records.items()}
    for key, bases in records.items():
        assert decode(fasta.read(key)) == bases.upper()
        assert decode(fasta.read(key, 1, len(bases) // 2 + 1)) == bases[1 : len(bases) // 2 + 1].upper()
        assert fasta.read(key, len(bases), len(bases)).shape == (0,)


def test_plain_text_called_gz(tmp_path: Path) -> None:
    path = tmp_path / "plain.fa.gz"
    path.write_text(">a\nACGT\n")
    assert decode(Fasta(path).read("a")) == "ACGT"


def test_irregular_lines_blank_lines_and_comments(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", ";a comment\n\n>one\nAC\nGTACGT\n\nA\n\n>two\nTTT")
    fasta = Fasta(path)
    assert decode(fasta.read("one")) == "ACGTACGTA"
    assert decode(fasta.read("two")) == "TTT"


def test_concatenated_gzip_members_as_bgzip_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(b">a\nACG") + gzip.compress(b"T\n>b\nGG\n"))
    assert decode(Fasta(path).read("a")) == "ACGT"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("ACGT\n", "no FASTA file.*'ACGT"),
        (">a\nACGT\n>a\nGG\n", "two records are called 'a'"),
        (">a\nACG7T\n", r"'a': character '7' at position 4"),
        (">a\nAC\nG7\n>b\nA-T\n", r"'a': character '7' at position 4"),
        (">a\nACGT\n>b\n", "'b' has a header and no bases"),
        (">\nACGT\n", "no name"),
        (">a\nACGT\nMTEYK\n", r"character 'E' at position 7"),
    ],
)
@pytest.mark.parametrize("name", ["a.fa", "a.fa.gz"])
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    for _ in range(2):  # nothing of a refused file is kept
        with pytest.raises(UserError, match=message):
            Fasta(path)


def test_missing_file_folder_and_damaged_gzip(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no FASTA file at"):
        Fasta(tmp_path / "none.fa")
    with pytest.raises(UserError, match="cannot be read"):
        Fasta(tmp_path)
    path = write(tmp_path / "a.fa.gz", as_fasta(random_records()))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged gzip"):
        Fasta(path)


def test_places_outside_are_refused(tmp_path: Path) -> None:
    fasta = Fasta(write(tmp_path / "a.fa", ">a\nACGT\n"))
    with pytest.raises(UserError, match="no record 'b'"):
        fasta.read("b")
    for start, end in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(UserError, match="outside the record"):
            fasta.read("a", start, end)


def test_nothing_is_written_beside_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "users"
    folder.mkdir()
    path = write(folder / "a.fa", ">a\nACGT\n")
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        Fasta(path).read("a")
        assert [file.name for file in folder.iterdir()] == ["a.fa"]
    finally:
        folder.chmod(0o755)
    assert list((tmp_path / "cache" / "triscan" / "genomes").glob("*.u8"))


def test_a_cache_that_cannot_be_made_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert decode(Fasta(write(tmp_path / "a.fa", ">a\nACGT\n")).read("a")) == "ACGT"


def test_a_changed_file_is_indexed_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", ">a\nACGT\n")
    assert decode(Fasta(path).read("a")) == "ACGT"
    write(path, ">a\nACGTTTT\n>b\nGG\n")
    assert decode(Fasta(path).read("b")) == "GG"


class _RandomWindows(Dataset):
    def __init__(self, fasta: Fasta, places: list[tuple[str, int, int]]) -> None:
        self.fasta, self.places = fasta, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return index, self.fasta.read(*self.places[index]).tobytes()


@pytest.mark.parametrize("name", ["a.fa", "a.fa.gz"])
def test_10000_random_windows_from_forked_workers_equal_the_file(tmp_path: Path, name: str) -> None:
    records = random_records(9, 20000)
    fasta = Fasta(write(tmp_path / name, as_fasta(records)))
    rng = np.random.default_rng(1)
    places = []
    for _ in range(10_000):
        key = f"chr{rng.integers(9)}"
        start = int(rng.integers(len(records[key])))
        places.append((key, start, min(start + 200, len(records[key]))))
    fasta.read("chr0", 0, 1)  # the parent's handle is open before the fork
    loader = DataLoader(
        _RandomWindows(fasta, places), batch_size=None, num_workers=2, multiprocessing_context="fork", shuffle=True
    )
    seen = 0
    for index, found in loader:
        key, start, end = places[index]
        assert found == encode(records[key][start:end]).tobytes()
        seen += 1
    assert seen == 10_000


def test_spawned_workers_get_a_copy_without_the_handle(tmp_path: Path) -> None:
    fasta = Fasta(write(tmp_path / "a.fa", ">a\nACGT\n"))
    fasta.read("a")
    assert decode(pickle.loads(pickle.dumps(fasta)).read("a", 1)) == "CGT"


def as_twobit(records: dict[str, str], order: str) -> bytes:
    """UCSC's format, written out by its description."""
    place = 16 + sum(5 + len(name) for name in records)
    index, body = b"", b""
    for name, bases in records.items():
        index += bytes([len(name)]) + name.encode() + struct.pack(order + "I", place + len(body))
        body += struct.pack(order + "I", len(bases))
        for inside in (lambda c: c in "Nn", str.islower):
            flags = [0, *(int(inside(c)) for c in bases), 0]
            starts = [i for i in range(len(bases)) if flags[i + 1] > flags[i]]
            ends = [i for i in range(1, len(bases) + 1) if flags[i] > flags[i + 1]]
            sizes = [end - start for start, end in zip(starts, ends, strict=True)]
            body += struct.pack(f"{order}I{2 * len(starts)}I", len(starts), *starts, *sizes)
        codes = ["TCAG".find(c) if c in "TCAG" else 0 for c in bases.upper()] + [0] * (-len(bases) % 4)
        quads = [codes[i : i + 4] for i in range(0, len(codes), 4)]
        body += struct.pack(order + "I", 0) + bytes(a << 6 | b << 4 | c << 2 | d for a, b, c, d in quads)
    return struct.pack(order + "4I", TWOBIT_MAGIC, 0, len(records), 0) + index + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_twobit(tmp_path: Path, order: str) -> None:
    records = random_records(4, 300)
    path = tmp_path / "genome.2bit"
    path.write_bytes(as_twobit(records, order))
    text = Fasta(write(tmp_path / "a.fa", as_fasta(records)), lower="mask")
    binary = Fasta(path, lower="mask")
    assert dict(binary.lengths) == dict(text.lengths)
    for name, bases in records.items():
        assert decode(Fasta(path).read(name)) == bases.upper()
        assert np.array_equal(binary.read(name), text.read(name))
        assert decode(binary.read(name)) == "".join("N" if c.islower() else c for c in bases)
    path.write_bytes(as_twobit(records, order)[:-30] + b"")
    with pytest.raises(UserError, match="ends early"):
        Fasta(path)


def test_fastq(tmp_path: Path) -> None:
    path = write(tmp_path / "reads.fq.gz", "@r1 1:N\nACGT\n+\n@@II\n@r2\nNN\n+r2\nII\n")
    reads = Fasta(path)
    assert [(name, decode(reads.read(name))) for name in reads.lengths] == [("r1", "ACGT"), ("r2", "NN")]
    with pytest.raises(UserError, match="line 1: no FASTQ read"):
        Fasta(write(tmp_path / "bad.fq", "@r1\nACGT\n+\nIII\n"))


def test_pieces_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = random_records(3, 200)
    for size in (1, 7, 64):
        monkeypatch.setattr("genomics.cache.PIECE", size)
        path = write(tmp_path / f"{size}.fa", as_fasta(records, 9))
        fasta = Fasta(path)
        assert {name: decode(fasta.read(name)) for name in records} == {n: b.upper() for n, b in records.items()}
    assert PIECE > 64


def test_several_genomes_and_windows_beyond_the_end(tmp_path: Path) -> None:
    both = Genomes([write(tmp_path / "a.fa", ">x\nACGT\n"), write(tmp_path / "b.fa", ">x\nTT\n")])
    assert dict(both.lengths) == {"a:x": 4, "b:x": 2}
    assert decode(both.read("b:x")) == "TT"
    assert decode(both.read_padded("a:x", -1, 6)) == "[PAD]ACGT[PAD][PAD]"
    assert dict(Genomes([tmp_path / "a.fa"]).lengths) == {"x": 4}
    with pytest.raises(UserError, match="two genome files are called 'a'"):
        Genomes([tmp_path / "a.fa", tmp_path / "a.fa"])


def test_a_folder_is_one_genome(tmp_path: Path) -> None:
    """Chromosome by chromosome in the order of their numbers; records of one name are told apart by their files."""
    folder = tmp_path / "species"
    folder.mkdir()
    with pytest.raises(UserError, match=r"the folder .*species holds no genome files; wanted names in .fa, .fna"):
        open_genome(folder)
    for number in (10, 2, 1):
        write(folder / f"chr{number}.fna", f">chr{number}\n{'ACGT' * number}\n")
    write(folder / "notes.txt", "not a genome")
    genome = pickle.loads(pickle.dumps(open_genome(folder)))
    assert dict(genome.lengths) == {"chr1": 4, "chr2": 8, "chr10": 40}
    assert decode(genome.read("chr2", 3, 6)) == "TAC"
    assert genome.path == folder
    write(folder / "more.fa", ">chr2\nTTT\n")
    assert dict(open_genome(folder).lengths) == {"chr1:chr1": 4, "chr2:chr2": 8, "chr10:chr10": 40, "more:chr2": 3}
    both = Genomes([folder, write(tmp_path / "b.fa", ">x\nAC\n")])
    assert decode(both.read("species:more:chr2")) == "TTT"
