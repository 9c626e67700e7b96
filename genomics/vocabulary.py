"""The characters of DNA as token ids, with the ids of HyenaDNA (Nguyen et al. 2023), which later models share.

What each character becomes:

- ``A C G T`` in either case: ids 7 to 10. Lower case marks repeats in most genome files; it is not kept.
- ``U`` and ``u``: the id of T, so that RNA reads as DNA.
- ``N`` and the other IUPAC codes for several bases (``R Y S W K M B D H V``), in either case: id 11, N.
- everything else, gaps (``-``, ``.``) and digits included: an error that names the record and the position.

Legend: L length.
"""

from collections.abc import Sequence

import numpy as np

from core.errors import UserError

TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, A, C, G, T, N = range(12)
BASES = "ACGT"
AMBIGUOUS = "NRYSWKMBDHV"
INVALID = 255


def _encode_table() -> np.ndarray:
    table = np.full(256, INVALID, np.uint8)
    letters = [("A", A), ("C", C), ("G", G), ("T", T), ("U", T), *((letter, N) for letter in AMBIGUOUS)]
    for letter, token in letters:
        table[[ord(letter), ord(letter.lower())]] = token
    return table


def _complement_table() -> np.ndarray:
    table = np.arange(len(TOKENS), dtype=np.uint8)
    table[[A, C, G, T]] = [T, G, C, A]
    return table


ENCODE = _encode_table()
"""Byte -> id, (256,) uint8; ``INVALID`` where there is none."""

COMPLEMENT = _complement_table()
"""Id -> id of the complement, (12,) uint8; N and the special tokens stay as they are."""


def encode(sequence: bytes | str, record: str = "sequence", offset: int = 0) -> np.ndarray:
    """Turn characters into token ids.

    Args:
        sequence: L characters.
        record: Name of the sequence, for the message.
        offset: Position of its first character in the record, for the message.

    Returns:
        (L,) uint8.

    Raises:
        UserError: For a character that is no IUPAC code, with the record and the position, which counts from 1.
    """
    data = sequence if isinstance(sequence, bytes) else sequence.encode("utf-8", "replace")
    ids = ENCODE[np.frombuffer(data, np.uint8)]
    if ids.size and ids.max() == INVALID:
        place = int(np.argmax(ids == INVALID))
        character = data[place : place + 1].decode("latin-1")
        raise UserError(
            f"record {record!r}: character {character!r} at position {offset + place + 1:,} is no base; wanted A, C, "
            f"G, T, U, N or another IUPAC code ({AMBIGUOUS[1:]}), in either case"
        )
    return ids


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """Turn token ids into characters; special tokens appear by their name, such as ``[BOS]``.

    Args:
        ids: (L,) integers from 0 to 11.
    """
    return "".join(TOKENS[token] for token in ids)


def reverse_complement(ids: np.ndarray) -> np.ndarray:
    """Return the other strand, read in its own direction.

    Args:
        ids: (..., L) token ids.

    Returns:
        (..., L) uint8.
    """
    return COMPLEMENT[ids][..., ::-1]
