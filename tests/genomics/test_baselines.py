"""Markov chains and k-mer regression against counts by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest

from genomics.baselines import (
    PRIOR_STRENGTH,
    kmer_accuracies,
    kmer_codes,
    kmer_features,
    markov_perplexities,
    vote_accuracies,
)
from genomics.classifier import wilson_interval
from genomics.vocabulary import encode, reverse_complement


def test_kmer_codes() -> None:
    codes, good = kmer_codes(encode("ACGTNACG"), 3)
    assert codes[good].tolist() == [0 * 16 + 1 * 4 + 2, 1 * 16 + 2 * 4 + 3, 6]
    assert good.tolist() == [True, True, False, False, False, True]
    assert kmer_codes(encode("AC"), 3)[0].shape == (0,)


def test_markov_chain_by_hand() -> None:
    train, test = encode("AACAGNAT"), encode("ACNGA")
    counts: dict[str, dict[str, int]] = {c: dict.fromkeys("ACGT", 0) for c in ["", *"ACGT"]}
    for part in ("AACAG", "AT"):
        for base in part:
            counts[""][base] += 1
        for before, base in pairwise(part):
            counts[before][base] += 1

    def p(context: str, base: str) -> float:
        shorter = 0.25 if context == "" else p("", base)
        return (counts[context][base] + PRIOR_STRENGTH * shorter) / (sum(counts[context].values()) + PRIOR_STRENGTH)

    zero = math.exp(-np.mean([math.log(p("", base)) for base in "ACGA"]))
    one = math.exp(-np.mean([math.log(p("", "A")), math.log(p("A", "C")), math.log(p("", "G")), math.log(p("G", "A"))]))
    found = markov_perplexities([train], [test], both_strands=False)
    assert found["markov_0_perplexity"] == pytest.approx(zero)
    assert found["markov_best_perplexity"] <= min(zero, one) + 1e-12


def test_markov_chain_learns_a_pattern_and_uses_both_strands() -> None:
    rng = np.random.default_rng(0)
    noise = encode("".join(rng.choice(list("ACGT"), 20000)))
    found = markov_perplexities([noise], [encode("".join(rng.choice(list("ACGT"), 20000)))], both_strands=True)
    assert 3.97 < found["markov_best_perplexity"] < 4.03
    pattern = encode("AACCGT" * 500)
    assert markov_perplexities([pattern], [pattern], both_strands=False)["markov_6_perplexity"] < 1.1
    other = [reverse_complement(pattern)]
    alone = markov_perplexities([pattern], other, both_strands=False)
    both = markov_perplexities([pattern], other, both_strands=True)
    assert both["markov_6_perplexity"] < 1.2 < alone["markov_6_perplexity"]


@pytest.mark.parametrize("k", [4, 6, 12])
def test_kmer_features_are_the_same_for_both_strands(k: int) -> None:
    reads = np.random.default_rng(0).integers(7, 11, (5, 60)).astype(np.uint8)
    features = kmer_features(reads, k)
    assert (features != kmer_features(reverse_complement(reads), k)).nnz == 0
    assert features.power(2).sum(axis=1) == pytest.approx(61 - k)


def test_kmer_regression_tells_apart_what_differs_and_not_what_does_not() -> None:
    rng = np.random.default_rng(0)

    def reads(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 2
        rich = rng.random((count, 200)) < np.where(labels, 0.5 + share, 0.5 - share)[:, None]
        return np.where(rich, rng.choice([8, 9], (count, 200)), rng.choice([7, 10], (count, 200))).astype(
            np.uint8
        ), labels

    k, (easy, hard) = kmer_accuracies(reads(200, 0.2), reads(100, 0.2), [reads(200, 0.2), reads(200, 0.0)])
    assert k in (4, 6, 8, 12)
    assert easy > 0.95
    assert 0.3 < hard < 0.7


def test_the_vote_finds_exact_matches_on_either_strand_and_shares_ties() -> None:
    references = np.random.default_rng(0).integers(7, 11, (4, 2, 90)).astype(np.uint8)
    references[3] = references[2]
    labels = np.arange(4)
    reads = references[:, 1, 20:80].copy()
    reads[1] = reverse_complement(reads[1])
    reads[0, ::20] = 7 + (reads[0, ::20] - 6) % 4  # no 31-mer is left whole: all four tie
    stranger = np.full((4, 60), 7, np.uint8)
    found = vote_accuracies(references, [(reads, labels), (stranger, labels)])
    assert found == pytest.approx([(1 / 4 + 1 + 1 / 2 + 1 / 2) / 4, 1 / 4])


def test_wilson_interval() -> None:
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    low, high = wilson_interval(2000, 2000)
    assert 0.998 < low < high == pytest.approx(1)
