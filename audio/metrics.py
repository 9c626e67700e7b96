"""Scores of generated sound through a classifier: FID, IS, mIS, AM, and rejection by likelihood.

As in SaShiMi's appendix C.3 (Goel et al. 2022) and Kong et al. 2021 (DiffWave); computed in float64. Beside the correct
inception score and threshold search stand those of the scorer that published figures come from: each has an error.

Dimension letters: S clips, F features, K classes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # added to probabilities under a logarithm


class Moments(NamedTuple):
    """Mean and covariance of features, in float64."""

    mean: Tensor  # (F,)
    covariance: Tensor  # (F, F)


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features (S, F).

    Raises:
        ValueError: For fewer than two clips.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"got features {tuple(features.shape)}, wanted (S, F) of at least 2 clips for a covariance")
    x = features.double()
    return Moments(x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1))


def frechet_distance(features: Tensor | Moments, reference: Tensor | Moments) -> float:
    """|mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two sets of features (FID, Heusel et al. 2017).

    The trace of the root is the sum of the square roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric:
    no root of a non-symmetric, nearly singular matrix is taken.

    Args:
        features: (S, F), of what is judged, or their moments.
        reference: (S', F), of recordings, or their moments.

    Raises:
        ValueError: For fewer than two clips on either side, or features of two sizes.
    """
    x, y = (side if isinstance(side, Moments) else moments(side) for side in (features, reference))
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"got {len(x.mean)} and {len(y.mean)} features, wanted those of one classifier")
    values, vectors = torch.linalg.eigh(x.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ y.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace() - 2 * crossed
    return max(float(distance), 0.0)


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean of KL(p(y|x) || p(y)) over clips x (IS, Salimans et al. 2016): 1 to K, higher is better.

    Args:
        probabilities: (S, K), the classifier's for each clip.
    """
    p = _checked(probabilities)
    return math.exp(float(_kl(p, p.mean(0)).mean()))


def inception_score_sashimi(probabilities: Tensor) -> float:
    """The inception score as the published scorer computes it, to compare with figures that come from it.

    It takes the divergence over the clips instead of over the classes, of columns that it scales to sum to 1: for each
    class k, sum_x q(x|k) log(q(x|k) S) with q(x|k) = p(k|x) / sum_x p(k|x). The mean over the classes then tells how
    unevenly each class is spread over the clips, whatever the classes' shares: samplers that say one thing score high.
    Where all classes are equally frequent it is about the inception score.
    """
    p = _checked(probabilities)
    q = p / p.sum(0, keepdim=True).clamp(min=EPS)
    return math.exp(float((q * ((q + EPS) * len(p)).log()).sum(0).mean()))


def modified_inception_score(probabilities: Tensor, pairs: int = 10000, seed: int = 0) -> float:
    """exp of the mean of KL(p(y|x) || p(y|x')) over pairs of clips (mIS, Gurumurthy et al. 2017), higher is better.

    Args:
        probabilities: (S, K).
        pairs: Number of random pairs; 0 takes all there are.
        seed: Of the pairs.
    """
    p = _checked(probabilities)
    if not pairs:
        negative = -(p * (p + EPS).log()).sum(1).mean()
        return math.exp(float(-negative - (p.mean(0) * (p + EPS).log().mean(0)).sum()))
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(len(p), (pairs,), generator=generator) for _ in range(2))
    return math.exp(float(_kl(p[first], p[second]).mean()))


def am_score(probabilities: Tensor, reference: Tensor) -> float:
    """KL(p_data(y) || p(y)) + mean entropy of p(y|x) (AM, Zhou et al. 2018): lower is better.

    Args:
        probabilities: (S, K), of what is judged.
        reference: (S', K), of recordings.
    """
    p, r = _checked(probabilities), _checked(reference)
    entropy = -(p * (p + EPS).log()).sum(1).mean()
    return float(_kl(r.mean(0)[None], p.mean(0)).mean() + entropy)


class Thresholds(NamedTuple):
    """Which part of the clips, sorted by likelihood, is kept."""

    lower: float  # part that is rejected at the unlikely end
    upper: float  # clips above this part are rejected at the likely end


GRID = tuple(Thresholds(a, b) for a in (0.0, 0.1, 0.2, 0.3, 0.4) for b in (1.0, 0.99, 0.98, 0.97, 0.96, 0.95))


def tuned_thresholds(
    features: Tensor, log_likelihoods: Tensor, reference: Tensor | Moments, compat: bool = False
) -> Thresholds:
    """The thresholds at which the Frechet distance of a tuning set is smallest.

    Args:
        features: (S, F) of the tuning set; score other clips with what it gives.
        log_likelihoods: (S,) of its clips.
        reference: (S', F) of recordings, or their moments.
        compat: Search as the published scorer does, which never remembers its best value and so returns the last cell
            of the grid: the 40 % least and the 5 % most likely are rejected, whatever the clips.

    Raises:
        ValueError: For fewer than two clips.
    """
    if compat:
        return GRID[-1]
    if len(features) < 2:
        raise ValueError(f"got {len(features)} clips to tune thresholds with, wanted at least 2")
    kept = {cell: within(log_likelihoods, cell) for cell in GRID}
    distances = {cell: frechet_distance(features[c], reference) for cell, c in kept.items() if len(c) > 1}
    return min(distances, key=lambda cell: distances[cell])


def within(log_likelihoods: Tensor, thresholds: Thresholds) -> Tensor:
    """Indices of the clips that are kept, from the least to the most likely one."""
    order = log_likelihoods.argsort(stable=True)
    return order[int(thresholds.lower * len(order)) : max(1, int(thresholds.upper * len(order)))]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of rows (S, K), in nats."""
    return (p * ((p + EPS).log() - (q + EPS).log())).sum(-1)


def _checked(probabilities: Tensor) -> Tensor:
    """The rows in float64.

    Raises:
        ValueError: If they are no distributions.
    """
    p = probabilities.double()
    if p.ndim != 2 or not len(p):
        raise ValueError(f"got probabilities {tuple(p.shape)}, wanted (clips, classes) with at least one clip")
    if not torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype), atol=1e-4) or bool((p < 0).any()):
        raise ValueError("got rows that are no probabilities, wanted numbers from 0 that sum to 1")
    return p
