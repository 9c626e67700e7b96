"""Characters to ids and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from genomics.vocabulary import AMBIGUOUS, TOKENS, decode, encode, reverse_complement


def test_ids_are_those_of_hyenadna() -> None:
    assert TOKENS.index("[PAD]") == 4
    assert TOKENS.index("[MASK]") == 3
    assert encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert encode(b"acgtn").tolist() == [7, 8, 9, 10, 11]
    assert encode("ACGT").dtype == np.uint8


def test_rna_and_ambiguity_codes() -> None:
    assert encode("Uu").tolist() == [10, 10]
    assert set(encode(AMBIGUOUS + AMBIGUOUS.lower()).tolist()) == {11}


@pytest.mark.parametrize("junk", ["0", "9", "-", ".", "*", "X", " ", ">", "E", "é", "\x00"])
def test_junk_is_named_with_record_position_and_character(junk: str) -> None:
    with pytest.raises(UserError, match=r"'chr7'.*position 1,004") as error:
        encode("ACG" + junk + "ACG", "chr7", offset=1000)
    assert junk.isascii() is False or repr(junk) in str(error.value)


def test_empty_sequence() -> None:
    assert encode("").shape == (0,)
    assert decode([]) == ""


@given(st.text(alphabet="ACGTN", max_size=200))
def test_round_trip_and_strands(sequence: str) -> None:
    ids = encode(sequence)
    assert decode(ids) == sequence
    assert np.array_equal(reverse_complement(reverse_complement(ids)), ids)
    table = str.maketrans("ACGTN", "TGCAN")
    assert decode(reverse_complement(ids)) == sequence.translate(table)[::-1]


def test_special_tokens_have_no_complement() -> None:
    ids = np.arange(len(TOKENS), dtype=np.uint8)
    assert reverse_complement(ids)[::-1][:7].tolist() == list(range(7))
    assert decode([2, 7, 4]) == "[BOS]A[PAD]"


def test_every_batch_row_is_turned_by_itself() -> None:
    ids = np.stack([encode("AACG"), encode("TTTC")])
    assert [decode(row) for row in reverse_complement(ids)] == ["CGTT", "GAAA"]
