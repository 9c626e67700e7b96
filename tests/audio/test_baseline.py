"""Markov models over levels, against their definition."""

import math

import pytest
import torch

from audio.baseline import MarkovModel


def by_definition(order: int, weights: list[float], train: list, test: list, levels: int, start: int) -> float:
    def context(window: list[int], t: int, k: int) -> tuple[int, ...]:
        return tuple(([start] * k + window)[t : t + k])

    def p(window: list[int], t: int, k: int) -> float:
        if k < 0:
            return 1 / levels
        seen = [w[s] for w in train for s in range(len(w)) if context(w, s, k) == context(window, t, k)]
        return (seen.count(window[t]) + weights[k] * p(window, t, k - 1)) / (len(seen) + weights[k])

    bits = [-math.log2(p(w, t, order)) for w in test for t in range(len(w))]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_against_the_definition(order: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train, val, test = (
        [torch.randint(0, 4, (n,), generator=generator).to(torch.uint8) for n in sizes]
        for sizes in ((30, 1, 12), (9, 4), (20, 3, 1))
    )
    model = MarkovModel(order, 4, 2)
    model.fit(train, val)
    expected = by_definition(order, model.weights, [w.tolist() for w in train], [w.tolist() for w in test], 4, 2)
    assert model.bits_per_sample(test) == pytest.approx(expected, rel=1e-6)


def test_it_finds_what_there_is_to_find() -> None:
    cycle = torch.arange(600) % 3
    noise = torch.randint(0, 4, (4000,), generator=torch.Generator().manual_seed(0))
    for windows, order, low, high in (([cycle], 0, 1.58, 1.6), ([cycle], 1, 0.0, 0.05), ([noise], 1, 1.95, 2.05)):
        model = MarkovModel(order, 4, 2)
        model.fit(windows, windows)
        assert low <= model.bits_per_sample(windows) <= high


def test_orders_whose_tables_are_too_large_are_left_out() -> None:
    assert MarkovModel.fits(2, 256)
    assert not MarkovModel.fits(3, 256)
    assert not MarkovModel.fits(1, 32768)
