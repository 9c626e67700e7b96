"""Which samples a process reads, such that all processes together read each once."""

import itertools
from collections.abc import Iterator, Sized

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler, Sampler

from core.parallel.group import data_ranks, joined


def shared_seed() -> int:
    """A number that rank 0 draws from torch's generator, as torch's own random sampler does; every process must ask."""
    seed = torch.empty((), dtype=torch.int64).random_()
    if joined() and dist.get_world_size() > 1:
        shared = seed.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(shared, 0)
        seed = shared
    return int(seed)


class ShardedSampler(DistributedSampler):
    """The samples of one process: each batch of all processes together is cut into theirs.

    The order is the one that a single process would take from the same generators, so that N processes with batches of
    b make the steps that one makes with batches of N b. Nothing is read twice, and all make the same number of steps.
    The last batch is cut evenly, and some processes may have a sample less than others.

    Args:
        data: The samples.
        batch_size: Samples a step and process.
        shuffle: A new order each epoch, drawn by rank 0 from torch's generator.
        drop_last: Leave out the samples that do not fill a batch of all processes.
        even: Leave out last samples that are too few for a step of all processes; otherwise they go with the step
            before.

    Raises:
        ValueError: If there is not a sample for each process.
    """

    def __init__(self, data: Sized, batch_size: int, shuffle: bool, drop_last: bool, even: bool = True) -> None:
        self.rank, self.num_replicas = data_ranks()
        self.data, self.batch_size, self.shuffle, self.drop_last, self.even = data, batch_size, shuffle, drop_last, even
        if len(data) < self.num_replicas or (drop_last and len(data) < self.num_replicas * batch_size):
            each = f"a batch of {batch_size}" if drop_last else "one"
            raise ValueError(
                f"got {len(data)} samples for {self.num_replicas} processes, wanted at least {each} for each; use "
                "fewer processes or smaller batches"
            )

    def __len__(self) -> int:
        return sum(end - begin for begin, end in self.pieces())

    def __iter__(self) -> Iterator[int]:
        """Yield this process's samples of one epoch."""
        order = self.order()
        for begin, end in self.pieces():
            yield from order[begin:end].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order follows from the generators."""

    def order(self) -> torch.Tensor:
        """All samples in the order of an epoch."""
        if not self.shuffle:
            return torch.arange(len(self.data))
        return torch.randperm(len(self.data), generator=torch.Generator().manual_seed(shared_seed()))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the places of this process's samples in the order, a first and an end a step."""
        count, whole = len(self.data), self.num_replicas * self.batch_size
        bounds = [*range(0, count, whole), count]
        left = bounds[-1] - bounds[-2]
        if left < (whole if self.drop_last else self.num_replicas):
            bounds.pop(-1 if self.drop_last or self.even else -2)
        for first, last in itertools.pairwise(bounds):
            begin, end = ((last - first) * rank // self.num_replicas for rank in (self.rank, self.rank + 1))
            yield first + begin, first + end


class ShardedBatches(Sampler[list[int]]):
    """The batches of one process, one a step.

    Args:
        samples: Its samples.
    """

    def __init__(self, samples: ShardedSampler) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return sum(1 for _ in self.samples.pieces())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's batches of one epoch."""
        order = self.samples.order()
        for begin, end in self.samples.pieces():
            yield order[begin:end].tolist()
