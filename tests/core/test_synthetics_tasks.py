"""The synthetic tasks: each batch is what the definition says, and an oracle that reads the tokens answers it."""

from __future__ import annotations

import pytest
import torch

from core.synthetics import AssociativeRecall, Copying, InductionHeads, SelectiveCopying, Task, counter

STEP = torch.tensor(7)
TASKS = [
    pytest.param(Copying(20, 6, 5), id="copying"),
    pytest.param(SelectiveCopying(20, 6, 5), id="selective_copying"),
    pytest.param(SelectiveCopying(5, 3, 5), id="selective_copying_full"),
    pytest.param(InductionHeads(12, 4), id="induction_heads"),
    pytest.param(InductionHeads(3, 3), id="induction_heads_smallest"),
    pytest.param(AssociativeRecall(40, 32), id="mqar"),
    pytest.param(AssociativeRecall(41, 32, pairs=3, noise=False), id="mqar_silent"),
    pytest.param(AssociativeRecall(64, 64, pairs=16, power=1.0), id="mqar_full"),
]


def oracle(task: Task, tokens: list[int]) -> list[int]:
    """The answers of one sequence, from the definition alone."""
    if isinstance(task, Copying):
        return [token for token in tokens if 0 < token < task.vocab_size - 1]
    if isinstance(task, InductionHeads):
        return [tokens[tokens.index(task.vocab_size - 1) + 1]]
    assert isinstance(task, AssociativeRecall)
    pairs = task.count(len(tokens))
    memory = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
    assert len(memory) == pairs
    return [memory[token] for token in tokens[2 * pairs :: 2] if token in memory]


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_answers(task: Task) -> None:
    batch = task.batch(0, 0, STEP, 50)
    assert batch.tokens.shape[0] == 50
    assert ((batch.tokens >= 0) & (batch.tokens < task.vocab_size)).all()
    assert (batch.where.diff(dim=1) > 0).all()
    for tokens, where, answers in zip(*(t.tolist() for t in batch), strict=True):
        if not isinstance(task, AssociativeRecall) or not task.noise:  # noise may repeat a key where nothing is asked
            assert oracle(task, tokens) == answers
        else:
            pairs = task.count(len(tokens))
            memory = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
            assert sorted(tokens[place] for place in where) == sorted(memory)
            assert [memory[tokens[place]] for place in where] == answers
            assert all(place >= 2 * pairs and place % 2 == 0 for place in where)


def test_copying_layout() -> None:
    tokens = Copying(9, 6, 3).batch(0, 0, STEP, 4).tokens
    assert tokens.shape == (4, 12)
    assert (tokens[:, 3:9] == 0).all()
    assert (tokens[:, 9:] == 5).all()
    assert tokens[:, :3].min() >= 1
    assert tokens[:, :3].max() <= 4


def test_induction_heads_has_two_triggers() -> None:
    tokens = InductionHeads(33, 5).batch(0, 0, STEP, 200).tokens
    triggers = tokens == 4
    assert (triggers.sum(dim=1) == 2).all()
    assert triggers[:, -1].all()
    assert not triggers[:, -2].any()
    first = triggers.int().argmax(dim=1)
    assert first.min() == 0
    assert first.max() == 30


def test_places_and_data_are_uniform() -> None:
    """Within five standard deviations of a fair draw."""
    task, count = SelectiveCopying(10, 6, 3), 20_000
    tokens = task.batch(3, 0, STEP, count).tokens[:, :10]
    seen = (tokens > 0).double().mean(dim=0)
    assert (seen - 0.3).abs().max() < 5 * (0.3 * 0.7 / count) ** 0.5
    values = torch.bincount(tokens[tokens > 0], minlength=6)[1:5] / (3 * count)
    assert (values - 0.25).abs().max() < 5 * (0.25 * 0.75 / (3 * count)) ** 0.5


def test_recall_asks_soon() -> None:
    """The first place after the pairs is asked at by the power law, p(1) = 1 / sum of 1/i for exponent 0."""
    task = AssociativeRecall(4 + 2 * 20, 64, pairs=1, power=1e-9)
    where = task.batch(0, 0, STEP, 20_000).where[:, 0]
    expected = 1 / sum(1 / i for i in range(1, 22))
    assert abs((where == 2).double().mean().item() - expected) < 5 * (expected / 20_000) ** 0.5


def test_batches_are_a_function_of_seed_split_and_step() -> None:
    task = InductionHeads(32, 16)
    first = task.batch(0, 0, STEP, 8).tokens
    assert torch.equal(task.batch(0, 0, torch.tensor(7), 8).tokens, first)
    for other in (task.batch(1, 0, STEP, 8), task.batch(0, 1, STEP, 8), task.batch(0, 0, STEP + 1, 8)):
        assert (other.tokens == first).double().mean() < 0.3


@pytest.mark.gpu
def test_devices_draw_the_same() -> None:
    for task in (SelectiveCopying(200), InductionHeads(300), AssociativeRecall(64)):
        here, there = (task.batch(5, 1, STEP.to(device), 16) for device in ("cpu", "cuda"))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_counter_is_splitmix64() -> None:
    """The first outputs of the published generator from state 0 (its place i is the state after i + 1 steps)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    mixed = [int(counter._mix(torch.tensor(counter._signed(i * counter.GOLDEN & counter.MASK)))) for i in (1, 2, 3)]
    assert [value & counter.MASK for value in mixed] == published
    u = counter.uniforms(counter.key(0), STEP, 10_000)
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / (12 * 10_000) ** 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveCopying(4, 16, 5), "length: got 4, wanted at least 5"),
        (lambda: Copying(8, 2, 1), "vocab_size: got 2, wanted at least 3"),
        (lambda: Copying(8, 4, 0), "data: got 0"),
        (lambda: InductionHeads(2), "length: got 2, wanted at least 3"),
        (lambda: InductionHeads(8).batch(0, 0, STEP, 2, length=1), "length: got 1"),
        (lambda: AssociativeRecall(64, 64, pairs=17), "length: got 64, wanted at least 68"),
        (lambda: AssociativeRecall(64, 32), "vocab_size: got 32, wanted an even number above 32"),
        (lambda: AssociativeRecall(64, power=0), "power: got 0"),
    ],
)
def test_bad_sizes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
