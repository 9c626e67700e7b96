"""The processes that share a sequence, and what they tell each other.

Legend: R ranks of the group, B batch, L tokens of this rank's part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._jit_internal import is_scripting
from torch.distributed.device_mesh import DeviceMesh

WINDOW = 4096  # tokens at a part's edge that are looked at first; see ``core.parallel.sequence``


class SequenceGroup:
    """Ranks that hold consecutive parts of the same sequences: rank 0 the first part, and so on.

    Args:
        group: A process group, or a one-dimensional device mesh such as ``mesh["sequence"]``.
        window: Tokens at a part's edge that are looked at first for what crosses it.

    Raises:
        ValueError: For a mesh of several dimensions.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh, window: int = WINDOW) -> None:
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f'group: got a mesh with the dimensions {group.mesh_dim_names}, wanted one; pass mesh["sequence"]'
                )
            group = group.get_group()
        self.group, self.window = group, window
        self.sizes: dict[Any, int] = {}  # tokens that states remembered, by scan
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._turned: SequenceGroup | None = None

    def turned(self) -> "SequenceGroup":
        """The same ranks holding the parts of the sequences' reverses: the last rank the first part, and so on."""
        if self._turned is None:
            self._turned = _Turned(self)
        return self._turned

    def gather(self, t: Tensor) -> Tensor:
        """(...) of the same shape on every rank -> (R, ...); no gradients."""
        found = t.new_empty((self.size, *t.shape))
        dist.all_gather_into_tensor(found.flatten(), t.detach().contiguous().flatten(), group=self.group)
        return found

    def sum(self, t: Tensor) -> Tensor:
        """The sum over the group; no gradients."""
        total = t.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def neighbour(self, edge: Tensor, following: bool) -> Tensor:
        """The ``edge`` of the rank before this one, or of the ``following`` one; zeros where there is none.

        Args:
            edge: Of the same shape on every rank.
            following: Which neighbour.
        """
        return _Neighbour.apply(edge, self, following)  # type: ignore[return-value]

    def bounds(self, length: int, multiple: int = 1) -> tuple[int, int]:
        """First token and end of this rank's part of ``length`` tokens; parts are near equal.

        Args:
            length: Tokens of the whole sequence.
            multiple: Parts begin at multiples of it; what is left over goes to the last one.

        Raises:
            ValueError: If there are fewer than ``multiple`` tokens for each rank.
        """
        units = length // multiple
        if units < self.size:
            raise ValueError(
                f"got sequences of {length} tokens for {self.size} processes, wanted at least {multiple} tokens for "
                "each; take longer sequences or fewer processes"
            )
        begin, end = (units * rank // self.size * multiple for rank in (self.rank, self.rank + 1))
        return begin, length if self.rank == self.size - 1 else end

    def shard(self, t: Tensor, multiple: int = 1) -> Tensor:
        """This rank's part of sequences that every rank holds; rank 0's are taken, in case that they differ.

        Args:
            t: (B, length, ...), without gradients.
            multiple: See ``bounds``.

        Returns:
            (B, L, ...).
        """
        whole = t.detach().contiguous().clone()
        dist.broadcast(whole, group_src=0, group=self.group)
        begin, end = self.bounds(t.shape[1], multiple)
        return whole[:, begin:end]


class _Turned(SequenceGroup):
    """A group whose ranks count from the other end."""

    def __init__(self, group: SequenceGroup) -> None:
        super().__init__(group.group, group.window)
        self.rank, self._turned = self.size - 1 - self.rank, group

    def gather(self, t: Tensor) -> Tensor:
        """(...) of the same shape on every rank -> (R, ...), in the order of the ranks here; no gradients."""
        return super().gather(t).flip(0)

    def shard(self, t: Tensor, multiple: int = 1) -> Tensor:
        """Not of a turned group, whose parts are those of the group, turned."""
        raise ValueError("shard: got a turned group, wanted the group itself; turn the parts it gives")


class _Neighbour(torch.autograd.Function):
    """A shift along the ranks; its adjoint is the shift back."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, group: SequenceGroup, following: bool) -> Tensor:
        ctx.group, ctx.following = group, following
        return _shift(edge, group, following)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _shift(grad, ctx.group, not ctx.following), None, None


def _shift(t: Tensor, group: SequenceGroup, following: bool) -> Tensor:
    source = group.rank + (1 if following else -1)
    found = group.gather(t)
    return found[source].clone() if 0 <= source < group.size else torch.zeros_like(t)


_active: list[SequenceGroup] = []  # not thread-local: the backward pass runs in threads of its own


def active() -> SequenceGroup | None:
    """The group that the layers' inputs are parts for, or None: they are whole sequences."""
    return _active[-1] if _active else None


def in_parts() -> bool:
    """Whether the layers' inputs are parts of sequences. Scripted code takes whole ones."""
    if is_scripting():
        return False
    return _any_active()


@torch.jit.unused
def _any_active() -> bool:
    return len(_active) > 0


@contextmanager
def sequence_parallel(group: dist.ProcessGroup | DeviceMesh | SequenceGroup | None) -> Iterator[SequenceGroup | None]:
    """Within it, the inputs of every layer are this rank's part of sequences that go on along ``group``.

    Layers give the numbers that they give one process with the whole sequences, and their gradients, to float32's
    rounding: ``Mamba``, ``Mamba2`` and ``BiMamba``, and models of them. Layers that cannot refuse. Each parameter's
    gradient is that of this rank's part; the whole one is the sum over the group. All ranks must take part in every
    call, in the same order, forward and backward; keep the backward pass within it where blocks are recomputed.

    Args:
        group: A process group, a one-dimensional mesh or a group made of one; None changes nothing.
    """
    if group is None:
        yield None
        return
    shared = group if isinstance(group, SequenceGroup) else SequenceGroup(group)
    _active.append(shared)
    try:
        yield shared
    finally:
        _active.pop()


def refuse(layer: str) -> None:
    """Raises where a layer that needs whole sequences is given a part.

    Raises:
        ValueError: Within ``sequence_parallel``.
    """
    if _active:
        raise ValueError(
            f"{layer}: got a part of a sequence, wanted the whole one; sequence-parallel models are made of Mamba, "
            "Mamba2 and BiMamba"
        )


_data_ranks: list[tuple[int, int]] = []  # set where the processes are not all readers of data of their own


def set_data_ranks(rank: int, size: int) -> None:
    """Say which share of the data this process reads: that of ``rank`` among ``size``."""
    _data_ranks[:] = [(rank, size)]


def joined() -> bool:
    """Whether this process runs together with others, perhaps none."""
    return dist.is_available() and dist.is_initialized()


def data_ranks() -> tuple[int, int]:
    """This process's rank and the number of processes that read data: all of them, unless it was said otherwise."""
    if not joined():
        return 0, 1
    return _data_ranks[0] if _data_ranks else (dist.get_rank(), dist.get_world_size())


def mean_share(total: Tensor, count: Tensor, everywhere: bool) -> Tensor:
    """This process's share of a mean of terms that processes have different numbers of.

    The mean of the shares over the processes is the mean of all terms, so that data parallelism, which takes the mean
    of gradients over all processes, minimises what a single process with all the data would.

    Args:
        total: Sum of this process's terms, a scalar with a gradient.
        count: Their number, which may be 0.
        everywhere: The terms are those of all processes, which all must ask; otherwise of those that share a sequence.
    """
    group = active()
    if everywhere and joined() and dist.get_world_size() > 1:
        size, every = dist.get_world_size(), count.detach().clone()
        dist.all_reduce(every)
    elif group is not None:
        size, every = group.size, group.sum(count)
    else:
        size, every = 1, count
    return total * size / every.clamp(min=1)
