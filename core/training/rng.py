"""Random number generators as plain data, and a data loader that can be resumed in the middle of an epoch."""

import itertools
import random
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.parallel.data import ShardedBatches, ShardedSampler, shared_seed
from core.parallel.group import data_ranks, joined


def rng_state() -> dict[str, Any]:
    """Return the states of all global generators (python, numpy, torch, CUDA) as data that weights_only can load."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  libraries draw from it
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all global generators to a state that ``rng_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


def seed_all(*key: int) -> None:
    """Set all global generators to a state that follows from some numbers."""
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(third)


class ResumableLoader(DataLoader):
    """A DataLoader that continues a broken-off epoch with the batch that would have come next.

    It takes the arguments of ``torch.utils.data.DataLoader``. The order of an epoch and the seeds of its workers follow
    from the generators' state at its start, so that state and the number of batches handed out are all there is to
    keep. On resume the batches already seen are read again and dropped. With several processes each reads its share of
    every batch (``core.parallel.data``), unless a sampler is given, and where the order is random, each draws other
    random numbers: the first those of a single process, the others some that follow from its own at the epoch's start
    and from the batch, so that they go on from a checkpoint as well. Workers that outlive an epoch
    (``persistent_workers``) carry random state over that is out of reach: with them only epoch boundaries are exact.
    """

    _batches = 0
    _start: dict[str, Any] | None = None
    _resume: dict[str, Any] | None = None
    _recounted: int | None = None

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        self._varies = bool(shuffle) or sampler is not None
        cut = sampler is None and options.get("batch_sampler") is None and joined()
        if cut and batch_size is not None and isinstance(dataset, Sized):
            try:
                sampler = ShardedSampler(dataset, batch_size, bool(shuffle), drop_last, even=bool(shuffle) or drop_last)
            except ValueError as error:
                raise UserError(str(error)) from error
            shuffle = None
        super().__init__(dataset, batch_size, shuffle, sampler, drop_last=drop_last, **options)
        if cut and isinstance(sampler, ShardedSampler):  # Lightning must see the sampler, which it would replace
            self.__dict__["batch_sampler"] = ShardedBatches(sampler)

    @property
    def step(self) -> int:
        """Samples of a step of all processes together."""
        return (self.batch_size or 1) * data_ranks()[1]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of one epoch."""
        resume, self._resume = self._resume, None
        if resume is not None:
            set_rng_state(resume["start"])
        self._start, self._batches = rng_state(), 0
        part_from_others = self._own_numbers()
        part_from_others(0)  # workers begin with numbers that are drawn here
        batches = super().__iter__()
        if resume is not None:
            for number in range(resume["batches"]):
                part_from_others(number)
                next(batches)
            self._batches = resume["batches"]
            set_rng_state(resume["now"])
        for number in itertools.count(self._batches):
            part_from_others(number)
            batch = next(batches, batches)
            if batch is batches:  # the end
                return
            self._batches += 1
            yield batch

    def _own_numbers(self) -> Callable[[int], None]:
        """What makes this process draw other numbers than the others do, in a batch and the step that follows."""
        rank, size = data_ranks()
        if not self._varies or size == 1:
            return lambda number: None
        state = torch.get_rng_state()
        seed = shared_seed()
        torch.set_rng_state(state)  # the order is drawn as in a single process
        return (lambda number: seed_all(seed, rank, number)) if rank else lambda number: None

    def state_dict(self) -> dict[str, Any]:
        """Return the position within the epoch."""
        return {"batches": self._batches, "step": self.step, "start": self._start, "now": rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position at the next ``iter``; the end of an epoch is the start of the next.

        Where another number of processes, or batches of another size, reached the position, it is the last batch that
        begins no later.
        """
        batches = state["batches"] * state.get("step", self.step) // self.step
        unfinished = state["start"] is not None and 0 < batches < len(self)
        self._resume = {**state, "batches": batches} if unfinished else None
        self._recounted = batches if unfinished and batches != state["batches"] else None

    @property
    def resumed(self) -> int | None:
        """Batches that the next ``iter`` leaves out, where they are not those that the position was counted in."""
        return self._recounted
