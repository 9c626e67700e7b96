"""Samplers of several processes: nothing twice, nothing left out, the batches of one process."""

from itertools import chain

import pytest
import torch
from torch.utils.data import TensorDataset

from core.errors import UserError
from core.parallel import data
from core.training import rng
from core.training.rng import ResumableLoader


def become(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Make this process one of several, as far as data is concerned."""
    for module in (data, rng):
        monkeypatch.setattr(module, "data_ranks", lambda: (rank, size))
    monkeypatch.setattr(rng, "joined", lambda: size > 1)


def batches(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int, batch: int, shuffle: bool, drop_last: bool
) -> list[list[list[int]]]:
    """The batches of each of ``size`` processes."""
    found = []
    for rank in range(size):
        become(monkeypatch, rank, size)
        torch.manual_seed(0)
        loader = ResumableLoader(TensorDataset(torch.arange(count)), batch, shuffle, drop_last=drop_last)
        found.append([b[0].tolist() for b in loader])
        assert len(loader) == len(found[-1])
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [24, 29, 31])
@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, True), (True, False), (False, False)])
def test_processes_share_the_batches_of_one(
    monkeypatch: pytest.MonkeyPatch, size: int, count: int, shuffle: bool, drop_last: bool
) -> None:
    one = batches(monkeypatch, count, 1, 4 * size, shuffle, drop_last)[0]
    several = batches(monkeypatch, count, size, 4, shuffle, drop_last)
    assert len({len(rank) for rank in several}) == 1  # a process that makes a step alone would wait for the others
    found = [list(chain.from_iterable(step)) for step in zip(*several, strict=True)]
    if len(one[-1]) < size:  # too few for a step
        last = one.pop()
        one[-1] += [] if shuffle else last  # training leaves them out
    assert found == one
    sizes = [len(rank[-1]) for rank in several]
    assert max(sizes) - min(sizes) <= 1


def test_too_few_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"got 1 samples for 2 processes.*fewer processes"):
        batches(monkeypatch, 1, 2, 4, False, False)
    with pytest.raises(UserError, match=r"got 7 samples for 2 processes, wanted at least a batch of 4 for each"):
        batches(monkeypatch, 7, 2, 4, True, True)


def test_a_position_means_samples_whatever_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    loader = ResumableLoader(TensorDataset(torch.arange(32)), 4, True)
    batches = iter(loader)
    read = list(chain.from_iterable(next(batches)[0].tolist() for _ in range(4)))
    state = loader.state_dict()
    rest = []
    for rank in range(2):
        become(monkeypatch, rank, 2)
        other = ResumableLoader(TensorDataset(torch.arange(32)), 4, True)
        other.load_state_dict(state)
        assert other.resumed == 2
        rest += chain.from_iterable(b[0].tolist() for b in other)
    assert sorted(read + rest) == list(range(32))
