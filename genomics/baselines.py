"""What simple methods reach on the same data: Markov chains for perplexity; k-mer regression and a vote for classes.

Legend: B reads, L bases of a read, F features, M bases of a context, S species, P loci.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack

from genomics.vocabulary import A, N, T, reverse_complement

MARKOV_ORDERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
SHOWN_ORDERS = (0, 3, 6)
PRIOR_STRENGTH = 8.0  # counts that the shorter context's estimate weighs
KMER_LENGTHS = (4, 6, 8, 12)
VOTE_LENGTH = 31  # bases; two bits each, the longest odd k-mer that a 64-bit integer holds
CHUNK = 1 << 24  # bases that are counted at a time
MAX_FEATURES = 1 << 16  # longer k-mers share features by their code modulo this


def kmer_codes(ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the k-mers of sequences, the first base counting most, A C G T as 0 to 3.

    Args:
        ids: (..., L) token ids.
        k: Bases of a k-mer.

    Returns:
        Codes (..., L - k + 1) int64 and whether each k-mer consists of A, C, G and T alone.
    """
    count = max(ids.shape[-1] - k + 1, 0)
    digits = ids.astype(np.int64) - A
    valid = (ids >= A) & (ids <= T)
    codes, good = np.zeros((*ids.shape[:-1], count), np.int64), np.ones((*ids.shape[:-1], count), bool)
    for offset in range(k):
        codes = codes * 4 + digits[..., offset : offset + count]
        good &= valid[..., offset : offset + count]
    return codes, good


def markov_perplexities(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], both_strands: bool
) -> dict[str, float]:
    """Score Markov chains: exp of the mean negative log-probability of each A, C, G and T of the test.

    p_M(base | context) = (count + s p_{M-1}(base | shorter context)) / (total + s) with s = 8 and p_{-1} uniform, so a
    context never seen falls back to a shorter one. A context ends at the start of its sequence.

    Args:
        train: Sequences to count in, uint8 token ids.
        test: Sequences to score.
        both_strands: Count the reverse complements too.

    Returns:
        ``markov_0_perplexity``, ``..._3_...``, ``..._6_...``, and ``markov_best_perplexity``, the lowest of all orders
        up to 10: chosen on the test, so no chain does better.
    """
    counted = _join([*train, *map(reverse_complement, train)] if both_strands else train)
    scored = _join(test)
    bases = (scored >= A) & (scored <= T)
    estimate = np.full(int(bases.sum()), 0.25)
    found = {}
    for order in MARKOV_ORDERS:
        codes, good = kmer_codes(counted, order + 1)
        counts = np.bincount(codes[good], minlength=4 ** (order + 1))
        totals = counts.reshape(-1, 4).sum(1)
        codes, good = kmer_codes(scored, order + 1)
        codes, place = codes[good], (np.cumsum(bases) - 1)[order:][good]  # of the k-mer's last base among those scored
        estimate[place] = (counts[codes] + PRIOR_STRENGTH * estimate[place]) / (totals[codes // 4] + PRIOR_STRENGTH)
        found[order] = float(np.exp(-np.log(estimate).mean()))
    best = min(found.values())
    return {**{f"markov_{order}_perplexity": found[order] for order in SHOWN_ORDERS}, "markov_best_perplexity": best}


def _join(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Lay sequences end to end with an N between, which no k-mer passes."""
    return np.concatenate([part for sequence in sequences for part in (sequence, np.array([N], np.uint8))])


def kmer_features(reads: np.ndarray, k: int) -> csr_matrix:
    """Return square roots of the counts of canonical k-mers: a k-mer and its reverse complement are one feature.

    Args:
        reads: (B, L) token ids of A, C, G and T.
        k: Bases of a k-mer.

    Returns:
        (B, F) float32, F = 4^k or, for long k-mers, a fixed number of features that several k-mers share.
    """
    features, size = min(4**k, MAX_FEATURES), max(CHUNK // max(reads.shape[1], 1), 1)
    return vstack([_counts(reads[i : i + size], k, features) for i in range(0, len(reads), size)], "csr")


def _counts(reads: np.ndarray, k: int, features: int) -> csr_matrix:
    codes, good = canonical_codes(reads, k)
    columns = codes % features
    rows = np.broadcast_to(np.arange(len(reads))[:, None], columns.shape)
    ones = np.ones(int(good.sum()), np.float32)
    counts = csr_matrix((ones, (rows[good], columns[good])), shape=(len(reads), features))
    counts.data = np.sqrt(counts.data)
    return counts


def canonical_codes(ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Number k-mers as ``kmer_codes`` does, a k-mer and its reverse complement alike: the smaller number."""
    forward, good = kmer_codes(ids, k)
    return np.minimum(forward, kmer_codes(reverse_complement(ids), k)[0][..., ::-1]), good


def vote_accuracies(references: np.ndarray, tests: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Let each exact 31-mer of a read, on either strand, vote for the species whose reference holds it.

    A 31-mer that several species hold votes for all of them, so that those of one species decide. Where n species have
    the most votes the answer counts as right by 1/n, if the true one is among them: what guessing gives on average.

    Args:
        references: (S, P, L) token ids of the loci that reads are from.
        tests: Sets of reads (B, L) and labels (B,) to score.

    Returns:
        The accuracy on each set.
    """
    held = []
    for loci in references:
        codes, good = canonical_codes(loci, VOTE_LENGTH)
        held.append(np.unique(codes[good]))
    found = []
    for reads, labels in tests:
        codes, good = canonical_codes(reads, VOTE_LENGTH)
        votes = np.stack([(np.isin(codes, known) & good).sum(1) for known in held], axis=1)
        most = votes == votes.max(1, keepdims=True)
        found.append(float((most[np.arange(len(labels)), labels] / most.sum(1)).mean()))
    return found


def kmer_accuracies(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    tests: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[int, list[float]]:
    """Train a k-mer logistic regression and score it.

    The length k is that of 4, 6, 8 and 12 which is best in validation.

    Args:
        train: Reads (B, L) and labels (B,).
        val: The same for the choice of k.
        tests: Sets of reads to score.

    Returns:
        k, and the accuracy on each set.
    """
    from sklearn.linear_model import LogisticRegression

    best: tuple[float, int, LogisticRegression] | None = None
    for k in KMER_LENGTHS:
        if k > train[0].shape[1]:
            break
        model = LogisticRegression(max_iter=2000).fit(kmer_features(train[0], k), train[1])
        accuracy = float(model.score(kmer_features(val[0], k), val[1]))
        if best is None or accuracy > best[0]:
            best = (accuracy, k, model)
    assert best is not None
    _, k, model = best
    return k, [float(model.score(kmer_features(reads, k), labels)) for reads, labels in tests]
