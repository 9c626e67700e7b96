"""How activations travel between processes that share layers out.

Legend: R ranks, B batch, L length, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from core.parallel.group import in_parts


def spread(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """``t`` itself, which all ranks have; its gradient is the sum over the ranks."""
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


class TensorGroup:
    """The ranks that share layers out, and how activations travel between them.

    Args:
        mesh: The ranks, in one dimension.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f'mesh: got the dimensions {mesh.mesh_dim_names}, wanted one; pass mesh["tensor"]')
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self.by_token = False  # whether activations between layers are this rank's tokens, else all
        self._sharers: dict[int, DeviceMesh] = {self.size: mesh}

    @contextmanager
    def tokens_shared(self) -> Iterator[None]:
        """Within it, what comes between layers is this rank's tokens."""
        before, self.by_token = self.by_token, True
        try:
            yield
        finally:
            self.by_token = before

    def sharers(self, count: int) -> DeviceMesh:
        """This rank and its neighbours in aligned groups of ``count``; all ranks must ask."""
        if count not in self._sharers:
            ranks = dist.get_process_group_ranks(self.mesh.get_group())
            first = self.rank // count * count
            group: Any = dist.new_group(ranks[first : first + count], use_local_synchronization=True)
            self._sharers[count] = DeviceMesh.from_group(group, self.mesh.device_type)
        return self._sharers[count]

    def enter(self, x: Tensor) -> Tensor:
        """What a layer reads, (B, L, D): all tokens. The gradient is the sum over the ranks."""
        if in_parts():
            raise ValueError(
                "got a part of a sequence for a tensor-parallel layer, wanted whole sequences; use one of the two"
            )
        if not self.by_token:
            return spread(x, self.mesh)
        return self._all_tokens(x, Partial())

    def leave(self, y: Tensor) -> Tensor:
        """What a layer writes: the sum over the ranks of y (B, L, D)."""
        rows, place = y.flatten(0, 1), Shard(0) if self.by_token else Replicate()
        part = DTensor.from_local(rows, self.mesh, [Partial()], run_check=False)
        found = part.redistribute(placements=[place]).to_local()
        return found.view(y.shape[0], -1, y.shape[2])

    def share_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of (B, L, D) that all ranks have. A token is a row of (B L, D): its place is free."""
        rows = DTensor.from_local(x.flatten(0, 1), self.mesh, [Replicate()], run_check=False)
        return rows.redistribute(placements=[Shard(0)]).to_local().view(x.shape[0], -1, x.shape[2])

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All tokens (B, L, D) of those that ranks have, for computations that are the same on all ranks."""
        return self._all_tokens(x, Replicate())

    def _all_tokens(self, x: Tensor, grad: Any) -> Tensor:
        rows = DTensor.from_local(x.flatten(0, 1), self.mesh, [Shard(0)], run_check=False)
        found = rows.redistribute(placements=[Replicate()]).to_local(grad_placements=[grad])
        return found.view(x.shape[0], -1, x.shape[2])

    def add_up(self, total: Tensor) -> Tensor:
        """The sum over the ranks of shares of a loss; the gradient goes to this rank's."""
        part = DTensor.from_local(total, self.mesh, [Partial()], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("a tensor-parallel model cannot be copied; copy it before it is cut")
