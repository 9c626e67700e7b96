"""Scores of generated sound against plain definitions in float64, known values and constructed samplers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from audio.metrics import (
    GRID,
    Thresholds,
    am_score,
    frechet_distance,
    inception_score,
    inception_score_sashimi,
    modified_inception_score,
    tuned_thresholds,
    within,
)


def distributions(count: int, classes: int, sharp: float, weights: list[float] | None = None, seed: int = 0) -> Tensor:
    """Rows that put most of their mass on a class drawn by ``weights``."""
    draws = np.random.default_rng(seed)
    chosen = draws.choice(classes, count, p=weights)
    logits = draws.normal(size=(count, classes))
    logits[np.arange(count), chosen] += sharp
    return torch.from_numpy(logits).softmax(1)


def plain_inception(p: np.ndarray) -> float:
    mean = [sum(row[k] for row in p) / len(p) for k in range(p.shape[1])]
    total = sum(row[k] * math.log(row[k] / mean[k]) for row in p for k in range(p.shape[1]))
    return math.exp(total / len(p))


def test_scores_are_their_definitions() -> None:
    p, r = distributions(40, 5, 3.0), distributions(30, 5, 3.0, seed=1)
    x, y = p.numpy(), r.numpy()
    assert inception_score(p) == pytest.approx(plain_inception(x), rel=1e-9)
    pairs = [sum(a[k] * math.log(a[k] / b[k]) for k in range(5)) for a in x for b in x]
    assert modified_inception_score(p, pairs=0) == pytest.approx(math.exp(np.mean(pairs)), rel=1e-6)
    assert modified_inception_score(p, pairs=200000) == pytest.approx(math.exp(np.mean(pairs)), rel=0.05)
    px, py = x.mean(0), y.mean(0)
    am = sum(py * np.log(py / px)) - np.mean([sum(a * np.log(a)) for a in x])
    assert am_score(p, r) == pytest.approx(am, rel=1e-9)


def test_the_published_inception_score_is_taken_over_clips() -> None:
    p = distributions(50, 4, 2.0).numpy()
    q = p / p.sum(0)
    m = np.full_like(q, 1 / len(q))  # p(y), repeated for each clip, normalised over them
    wanted = math.exp((q * np.log(q / m)).sum(0).mean())
    assert inception_score_sashimi(torch.from_numpy(p)) == pytest.approx(wanted, rel=1e-9)


def test_a_collapsed_sampler_scores_badly_but_not_in_the_published_score() -> None:
    real = distributions(500, 10, 9.0, seed=1)
    even = distributions(500, 10, 9.0, seed=2)
    collapsed = distributions(500, 10, 9.0, weights=[0.91] + [0.01] * 9, seed=3)
    unsure = torch.full((500, 10), 0.1, dtype=torch.float64)
    assert inception_score(even) > 8
    assert inception_score(collapsed) < 2
    assert inception_score(unsure) == pytest.approx(1.0)
    assert inception_score_sashimi(even) == pytest.approx(inception_score(even), rel=0.1)
    assert inception_score_sashimi(collapsed) > 20  # more than there are classes: the error
    assert am_score(even, real) < 0.2 < 1 < am_score(collapsed, real)
    assert am_score(unsure, real) == pytest.approx(math.log(10), abs=0.02)
    assert modified_inception_score(even) > 50 * modified_inception_score(collapsed)


def test_frechet_distance_of_known_sets() -> None:
    draws = np.random.default_rng(0)
    x = torch.from_numpy(draws.normal(size=(300, 6)))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x + 2, x) == pytest.approx(4 * 6, rel=1e-9)
    assert frechet_distance(3 * x, x) == pytest.approx(
        float(4 * torch.cov(x.T).trace() + (2 * x.mean(0)).square().sum())
    )
    y = torch.from_numpy(draws.normal(size=(200, 6)) @ draws.normal(size=(6, 6)))
    a, b = np.cov(x.T), np.cov(y.T)
    values = np.linalg.eigvals(a @ b)  # their roots' sum is the trace of the root of the product
    wanted = (
        ((x.mean(0) - y.mean(0)) ** 2).sum()
        + np.trace(a)
        + np.trace(b)
        - 2 * np.sqrt(values.astype(complex)).real.sum()
    )
    assert frechet_distance(x, y) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(x[:3], y) > 0  # fewer clips than features


def test_thresholds_find_the_good_clips() -> None:
    draws = np.random.default_rng(0)
    reference = torch.from_numpy(draws.normal(size=(400, 3)))
    good, bad = torch.from_numpy(draws.normal(size=(160, 3))), torch.from_numpy(4 + draws.normal(size=(40, 3)))
    features = torch.cat([bad, good])
    likelihoods = torch.arange(200.0)  # the bad ones are the least likely fifth
    found = tuned_thresholds(features, likelihoods, reference)
    assert found.lower == 0.2
    assert set(within(likelihoods, found).tolist()) <= set(range(40, 200))
    assert tuned_thresholds(features, likelihoods, reference, compat=True) == Thresholds(0.4, 0.95) == GRID[-1]
    assert within(torch.tensor([3.0, 1.0, 2.0]), Thresholds(0.0, 1.0)).tolist() == [1, 2, 0]
    assert len(within(torch.zeros(100), Thresholds(0.4, 0.95))) == 55


def test_what_is_no_distribution_is_refused() -> None:
    for wrong in (torch.ones(3, 2), torch.zeros(0, 4), torch.tensor([[1.5, -0.5]])):
        with pytest.raises(ValueError, match="probabilities"):
            inception_score(wrong)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="wanted"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(5, 2))
