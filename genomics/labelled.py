"""Labelled sequences for fine-tuning, in the layouts that benchmarks come in, and splits that keep relatives together.

Read are: a folder ``{train,test}/<class>/<id>.txt`` (Genomic Benchmarks); a folder of ``train.csv`` and ``test.csv``,
or one CSV file, with columns ``sequence`` and ``label``; FASTA files ``train.fna`` and ``test.fna`` whose record names
end in ``|label`` (Nucleotide Transformer).

Legend: B sequences, L bases, K classes.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError
from genomics.fasta import Fasta
from genomics.vocabulary import encode, reverse_complement

FASTA_SUFFIXES = (".fa", ".fna", ".fasta", ".fa.gz", ".fna.gz", ".fasta.gz")
SHARED_KMER = 31  # sequences that share one are taken for relatives


class Labelled(NamedTuple):
    """Sequences with labels."""

    sequences: list[np.ndarray]  # (L,) uint8 each
    labels: list[str]

    def take(self, places: Sequence[int]) -> "Labelled":
        """The sequences at these places."""
        return Labelled([self.sequences[i] for i in places], [self.labels[i] for i in places])


def read_labelled(path: str | Path) -> tuple[Labelled, Labelled | None]:
    """Read a data set: its training part, and its test part where it has one.

    Raises:
        UserError: If the layout is none of those known, or a part is empty or damaged.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return _read_file(root), None
    if not root.is_dir():
        raise UserError(f"no data set at {root}; wanted a folder or a CSV or FASTA file")
    parts = {}
    for part in ("train", "test"):
        found = [file for file in sorted(root.glob(f"{part}.*")) if file.is_file()]
        if (root / part).is_dir():
            parts[part] = _read_folder(root / part)
        elif found:
            parts[part] = _read_file(found[0])
    if "train" not in parts:
        raise UserError(f"{root} has no training part; wanted train/<class>/*.txt, train.csv, or train.fna")
    return parts["train"], parts.get("test")


def _read_folder(folder: Path) -> Labelled:
    sequences, labels = [], []
    for kind in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for file in sorted(kind.glob("*.txt")):
            text = file.read_bytes().strip()
            if not text:
                raise UserError(f"{file} is empty; wanted a sequence")
            sequences.append(encode(text, str(file)))
            labels.append(kind.name)
    if not sequences:
        raise UserError(f"{folder} holds no <class>/*.txt files")
    return Labelled(sequences, labels)


def _read_file(path: Path) -> Labelled:
    if path.name.endswith(FASTA_SUFFIXES):
        fasta = Fasta(path)
        names = list(fasta.lengths)
        if bad := [name for name in names if "|" not in name]:
            raise UserError(f"{path}: record {bad[0]!r} has no label; wanted names such as seq1|0")
        return Labelled([fasta.read(name) for name in names], [name.rpartition("|")[2] for name in names])
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            columns, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from None
    if not {"sequence", "label"} <= set(columns):
        raise UserError(
            f"{path}: wanted a table with the columns sequence and label, got {', '.join(columns) or 'none'}"
        )
    if not rows:
        raise UserError(f"{path} has a head and no rows; wanted a sequence and a label in each")
    for number, row in enumerate(rows, 1):
        if not row["sequence"] or not row["label"]:
            missing = "label" if row["sequence"] else "sequence"
            raise UserError(f"{path}, row {number} has no {missing}; wanted a sequence and a label in each")
    return Labelled(
        [encode(row["sequence"], f"{path}, row {i}") for i, row in enumerate(rows, 1)], [row["label"] for row in rows]
    )


def families(sequences: Sequence[np.ndarray], k: int = SHARED_KMER) -> np.ndarray:
    """Number the families of sequences that share a k-mer, on either strand, directly or through others.

    Args:
        sequences: (L,) uint8 each.
        k: Bases that count as shared; shorter sequences are compared whole.

    Returns:
        (B,) int64: the same number for the same family.
    """
    parent = list(range(len(sequences)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[bytes, int] = {}
    for i, ids in enumerate(sequences):
        for strand in (ids, np.ascontiguousarray(reverse_complement(ids))):
            data, width = strand.tobytes(), min(k, len(ids))
            for start in range(len(data) - width + 1):
                j = owner.setdefault(data[start : start + width], i)
                if j != i:
                    parent[root(i)] = root(j)
    return np.array([root(i) for i in range(len(sequences))])


def folds(groups: np.ndarray, labels: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Assign sequences to folds, families whole, each fold with its share of every class as far as that goes.

    Args:
        groups: (B,) family of each sequence.
        labels: (B,) classes.
        count: Folds.
        seed: Of the order in which families are dealt.

    Returns:
        (B,) int64 from 0 to count - 1.

    Raises:
        UserError: If there are fewer families than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if len(np.unique(groups)) < count:
        raise UserError(
            f"got {len(np.unique(groups))} families of related sequences, wanted {count} folds; ask for fewer, or "
            "give --homology false if sequences may share bases with the test"
        )
    found = np.zeros(len(groups), np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for fold, (_, places) in enumerate(splitter.split(np.zeros(len(groups)), list(labels), groups)):
        found[places] = fold
    return found
