"""Samplers of several processes: nothing twice, nothing left out, the batches of one process."""

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.data import Dataset, TensorDataset

from core.errors import UserError
from core.parallel import data
from core.training import rng
from core.training.rng import ResumableLoader
from vision.files import RepeatedAugmentation

COUNTS = (24, 29, 31)
ORDERS = ((True, True), (True, False), (False, False))  # shuffled, and without the last batch


def batches(rank: int, size: int, batch: int) -> dict[tuple[int, bool, bool], list[list[int]]]:
    """The batches that a process reads."""
    found = {}
    for count in COUNTS:
        for shuffle, drop_last in ORDERS:
            torch.manual_seed(0)
            loader = ResumableLoader(TensorDataset(torch.arange(count)), batch, shuffle, drop_last=drop_last)
            read = found[count, shuffle, drop_last] = [b[0].tolist() for b in loader]
            assert len(loader) == len(read)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_batches_of_one(size: int) -> None:
    several = run_ranks(size, batches, 4)
    for case, one in batches(0, 1, 4 * size).items():
        parts = [rank[case] for rank in several]
        assert len({len(rank) for rank in parts}) == 1  # a process that makes a step alone would wait for the others
        found = [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]
        if len(one[-1]) < size:  # too few for a step
            last = one.pop()
            one[-1] += [] if case[1] else last  # training leaves them out
        assert found == one, case
        sizes = [len(rank[-1]) for rank in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("count", "drop_last", "message"), [
    (1, False, r"got 1 samples for 2 processes.*fewer processes"),
    (7, True, r"got 7 samples for 2 processes, wanted at least a batch of 4 for each"),
])  # fmt: skip
def test_too_few_samples_are_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, drop_last: bool, message: str
) -> None:
    for module in (data, rng):
        monkeypatch.setattr(module, "data_ranks", lambda: (0, 2))
    monkeypatch.setattr(rng, "joined", lambda: True)
    with pytest.raises(UserError, match=message):
        ResumableLoader(TensorDataset(torch.arange(count)), 4, drop_last, drop_last=drop_last)


def go_on(rank: int, size: int, state: dict[str, Any]) -> list[int]:
    """What a process reads from a position on."""
    loader = ResumableLoader(TensorDataset(torch.arange(32)), 4, True)
    loader.load_state_dict(state)
    assert loader.resumed == 2
    return list(chain.from_iterable(b[0].tolist() for b in loader))


def test_a_position_means_samples_whatever_the_number_of_processes() -> None:
    torch.manual_seed(0)
    loader = ResumableLoader(TensorDataset(torch.arange(32)), 4, True)
    batches = iter(loader)
    read = list(chain.from_iterable(next(batches)[0].tolist() for _ in range(4)))
    rest = chain.from_iterable(run_ranks(2, go_on, loader.state_dict()))
    assert sorted([*read, *rest]) == list(range(32))


class Noise(Dataset):
    """Samples with the random numbers that were drawn for them."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002  as libraries do
        return torch.tensor([index, *drawn], dtype=torch.float64)


def noise(rank: int, size: int, workers: int) -> list[torch.Tensor]:
    """The batches of two epochs, then those of the second from its second one on, each with what its step draws."""

    def read(loader: ResumableLoader, states: list[Any]) -> torch.Tensor:
        found = []
        for batch in loader:
            found.append(torch.cat([batch.flatten(), torch.rand(2, dtype=torch.float64)]))
            states.append(loader.state_dict())
        return torch.stack(found)

    torch.manual_seed(0)
    loader, states = ResumableLoader(Noise(), 3, True, num_workers=workers), []
    first, second = read(loader, []), read(loader, states)
    again = ResumableLoader(Noise(), 3, True, num_workers=workers)
    # A checkpoint holds what rank 0 has.
    shared = [states[0] if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(shared)
    again.load_state_dict(shared[0])  # type: ignore[arg-type]
    return [first, second, read(again, [])]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_draw_other_numbers_and_go_on_with_them(workers: int) -> None:
    ranks = run_ranks(2, noise, workers)
    for first, second, rest in ranks:
        assert not torch.equal(first, second)
        assert torch.equal(second[1:], rest)
    for epoch in range(2):
        samples = torch.cat([rank[epoch][:, :-2].reshape(-1, 4) for rank in ranks])
        assert sorted(samples[:, 0].int().tolist()) == list(range(24))
        for drawn in samples[:, 1:].T:
            assert len(drawn.unique()) == 24
        assert len(torch.cat([rank[epoch][:, -2:] for rank in ranks]).unique()) == 16


def repeated(rank: int, size: int) -> list[int]:
    """The order that a process takes, whatever it has drawn before."""
    torch.manual_seed(rank)
    return list(RepeatedAugmentation(10, 3))


def test_processes_take_copies_of_images_in_one_order() -> None:
    first, second = run_ranks(2, repeated)
    assert first == second
