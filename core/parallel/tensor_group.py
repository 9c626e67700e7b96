"""How activations travel between processes that share layers out.

Legend: R ranks, B batch, L length, T = B L tokens, D model width, E width of a projection.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from core.parallel.cuts import cut_of
from core.parallel.exchange import Gather, GatherProject, NormProjectScatter, ProjectScatter, Scatter, Spread, Sum, own
from core.parallel.group import in_parts
from kernels.checks import autocast_dtype


class _SumGradients(torch.autograd.Function):
    """Parameters; what several ranks hold of their gradients is added up over these ranks, in one message."""

    @staticmethod
    def forward(ctx: Any, everyone: Any, *parameters: Any) -> tuple[Tensor, ...]:
        ctx.everyone, ctx.cuts = everyone, [cut_of(p) for p in parameters]
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        messages: dict[Any, list[Tensor]] = {}
        totals = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for cut, total in zip(ctx.cuts, totals, strict=True):
            rows = [total] if cut is None else cut.shared_rows(total)
            messages.setdefault(ctx.everyone if cut is None else cut.sharers, []).extend(rows)
        for group, rows in messages.items():
            message = torch.cat([t.flatten() for t in rows])
            dist.all_reduce(message, group=group)
            for t, found in zip(rows, message.split([t.numel() for t in rows]), strict=True):
                t.copy_(found.view(t.shape))
        return None, *totals


def spread(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """``t`` itself, which all ranks have; its gradient is the sum over the ranks."""
    return Spread.apply(t, mesh.get_group())  # type: ignore[return-value]


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
        self._summed: dict[int, Tensor] = {}

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

    def sum_together(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of parameters up in one message, from now until this is called again; see ``summed``."""
        self._summed = {}
        found = [p for p in parameters if self._is_summed(p)]
        if found:
            self._summed = {id(p): t for p, t in zip(found, self._sum_gradients(found), strict=True)}

    def summed(self, parameter: Tensor) -> Tensor:
        """A parameter of which ranks have the same, all of it or some rows. Its gradient is the sum over the ranks."""
        if not self._is_summed(parameter):
            return parameter
        found = self._summed.get(id(parameter))
        return self._sum_gradients([parameter])[0] if found is None else found

    def _is_summed(self, parameter: Tensor) -> bool:
        cut = cut_of(parameter)
        shared = cut is None or any(part.shared > 1 for part in cut.parts)
        return shared and parameter.requires_grad and torch.is_grad_enabled()

    def _sum_gradients(self, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        return _SumGradients.apply(self.mesh.get_group(), *parameters)  # type: ignore[return-value]

    def enter(self, x: Tensor) -> Tensor:
        """What a layer reads, (B, L, D): all tokens. The gradient is the sum over the ranks."""
        _refuse_parts()
        return self._by_rows(Gather, x, True) if self.by_token else spread(x, self.mesh)

    def enter_through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a layer reads, (B, L, D), through its linear projection (E, D): (B, L, E)."""
        _refuse_parts()
        if not self.by_token:
            return F.linear(spread(x, self.mesh), weight, bias)
        return self._through(GatherProject, x, weight, bias)

    def leave_through(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a layer writes: the sum over the ranks of y (B, L, E) through its projection (D, E), and a bias."""
        if self.by_token:
            return self._through(ProjectScatter, y, weight, bias)
        total = self.add_up(F.linear(y, weight))
        return total if bias is None else total + bias.to(total.dtype)

    def leave_normed(self, y: Tensor, squares: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """As ``leave_through``, of y over the root of its mean square over all ranks; of this rank's tokens.

        Args:
            y: (B, L, E), this rank's channels.
            squares: (B L,), the sums of their squares.
            weight: (D, E).
            bias: (D,) or None.
            eps: Added to the mean square.
        """
        return self._through(NormProjectScatter, y, weight, bias, squares, eps)

    def _through(self, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
        dtype = autocast_dtype(x.device)
        if dtype is not None:
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))  # type: ignore[assignment]
        rows = function.apply(x.flatten(0, 1), weight, bias, *more, self.mesh.get_group())
        return rows.view(x.shape[0], -1, rows.shape[1])

    def leave(self, y: Tensor) -> Tensor:
        """What a layer writes: the sum over the ranks of y (B, L, D)."""
        return self._by_rows(Scatter, y, True) if self.by_token else self.add_up(y)

    def share_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of (B, L, D) that all ranks have. A token is a row of (B L, D): its place is free."""
        return self._by_rows(Scatter, x, False)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All tokens (B, L, D) of those that ranks have, for computations that are the same on all ranks."""
        return self._by_rows(Gather, x, False)

    def own_rows(self, rows: Tensor) -> Tensor:
        """This rank's of the rows (B L, ...) that all ranks have, those of its tokens."""
        return own(rows, self.mesh.get_group())

    def _by_rows(self, function: Any, x: Tensor, adds: bool) -> Tensor:
        rows = function.apply(x.flatten(0, 1), self.mesh.get_group(), adds)
        return rows.view(x.shape[0], -1, x.shape[2])

    def add_up(self, total: Tensor) -> Tensor:
        """The sum over the ranks of shares of a loss or an output; the gradient goes to this rank's."""
        return Sum.apply(total, self.mesh.get_group())  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("a tensor-parallel model cannot be copied; copy it before it is cut")


def _refuse_parts() -> None:
    if in_parts():
        raise ValueError(
            "got a part of a sequence for a tensor-parallel layer, wanted whole sequences; use one of the two"
        )
