"""Collectives with gradients for rows that ranks share out, and linear layers beside which rows travel.

Rows travel in ``PIECES``: while one is on its way, the layer works on another. A rank's rows are one block of each
piece, so that every piece of all rows is in one place.

Legend: R ranks, T rows of all ranks, D width, E width of a projection.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gated_squares import divide_by_root, divide_by_root_backward

PIECES = 2


def _pieces(total: int, group: Any) -> int:
    """In how many pieces T rows travel."""
    return PIECES if total % (PIECES * dist.get_world_size(group)) == 0 else 1


def gathered(rows: Tensor, group: Any, then: Callable[[int, int, Tensor], None] | None = None) -> Tensor:
    """(T / R, D) -> (T, D), the rows of all ranks.

    Args:
        rows: This rank's.
        group: The ranks.
        then: Called with the bounds of each piece and its rows, once they are there.
    """
    total = dist.get_world_size(group) * rows.shape[0]
    found, count = rows.new_empty(total, *rows.shape[1:]), _pieces(total, group)
    blocks = found.chunk(count)
    works = [
        dist.all_gather_into_tensor(block, own, group=group, async_op=True)
        for block, own in zip(blocks, rows.contiguous().chunk(count), strict=True)
    ]
    for i, (block, work) in enumerate(zip(blocks, works, strict=True)):
        work.wait()  # type: ignore[union-attr]
        if then is not None:
            then(i * total // count, (i + 1) * total // count, block)
    return found


class Scattering:
    """(T, D) -> (T / R, D): this rank's rows of the sum over the ranks, piece by piece.

    Args:
        like: A tensor of T rows.
        width: D.
        group: The ranks.
    """

    def __init__(self, like: Tensor, width: int, group: Any) -> None:
        self._group, self._works, total = group, [], like.shape[0]
        count = _pieces(total, group)
        self._found = like.new_empty(total // dist.get_world_size(group), width)
        self._blocks, step = list(self._found.chunk(count)), total // count
        self.bounds = [(i * step, (i + 1) * step) for i in range(count)]

    def send(self, piece: Tensor) -> None:
        """Send the next piece of T rows off."""
        block = self._blocks[len(self._works)]
        self._works.append(dist.reduce_scatter_tensor(block, piece.contiguous(), group=self._group, async_op=True))

    def result(self) -> Tensor:
        """This rank's rows, once all pieces are there."""
        for work in self._works:
            work.wait()
        return self._found


def _scattered(rows: Tensor, group: Any) -> Tensor:
    """(T, D) -> (T / R, D), this rank's rows of the sum over the ranks."""
    scattering = Scattering(rows, rows.shape[1], group)
    for begin, end in scattering.bounds:
        scattering.send(rows[begin:end])
    return scattering.result()


def own(rows: Tensor, group: Any) -> Tensor:
    """This rank's rows of those of all ranks."""
    ranks = dist.get_world_size(group)
    blocks = rows.unflatten(0, (_pieces(rows.shape[0], group), ranks, -1))
    return blocks[:, dist.get_rank(group)].flatten(0, 1)


class Spread(torch.autograd.Function):
    """What all ranks have; the gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Sum(torch.autograd.Function):
    """The sum over the ranks, which all of them use in the same way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """All rows; the gradient of this rank's is that of all ranks' uses if ``adds``, else of one's: they do the same."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, adds: bool) -> Tensor:
        ctx.group, ctx.adds = group, adds
        return gathered(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grad, ctx.group) if ctx.adds else own(grad, ctx.group), None, None


class Scatter(torch.autograd.Function):
    """This rank's rows, of the sum over the ranks if ``adds``, else of what all ranks have."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, adds: bool) -> Tensor:
        ctx.group = group
        return _scattered(rows, group) if adds else own(rows, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.group), None, None


def _gathered_column(own_column: Tensor, group: Any) -> Tensor:
    """(T / R,) -> (T,): one number of each row, in one message, in the order of ``gathered``."""
    found = own_column.new_empty(dist.get_world_size(group), own_column.shape[0])
    dist.all_gather_into_tensor(found.flatten(), own_column.contiguous(), group=group)
    return found.unflatten(1, (_pieces(found.numel(), group), -1)).transpose(0, 1).flatten()


def _gathered_sum(rows: Tensor, group: Any) -> Tensor:
    """The sum of all ranks' rows."""
    total = rows.sum(0)
    dist.all_reduce(total, group=group)
    return total


def _project(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes rows (T, D) through a weight (D, E) into ``out`` (T, E)."""
    torch.mm(rows, weight, out=out)


class GatherProject(torch.autograd.Function):
    """All ranks' rows through a linear layer, (T / R, D) -> (T, E), as they arrive.

    The gradients leave while those of other rows, then of the weight are computed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        y = rows.new_empty(rows.shape[0] * dist.get_world_size(group), weight.shape[0])
        every = gathered(rows, group, lambda begin, end, piece: _project(piece, weight.mT, y[begin:end]))
        ctx.save_for_backward(every, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        every, weight = ctx.saved_tensors
        grad, scattering = grad.contiguous(), Scattering(grad, weight.shape[1], ctx.group)
        for begin, end in scattering.bounds:
            scattering.send(grad[begin:end] @ weight)
        dweight, dbias = grad.mT @ every, grad.sum(0) if ctx.has_bias else None
        return scattering.result(), dweight, dbias, None


class ProjectScatter(torch.autograd.Function):
    """Rows through a linear layer whose inputs ranks share, (T, E) -> (T / R, D); sums leave as they are computed.

    The bias is added once.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.save_for_backward(y, weight)
        scattering = Scattering(y, weight.shape[0], group)
        for begin, end in scattering.bounds:
            piece = y[begin:end] @ weight.mT
            scattering.send(piece if bias is None or dist.get_rank(group) > 0 else piece.add_(bias))
        return scattering.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        y, weight = ctx.saved_tensors
        dy = torch.empty_like(y)
        every = gathered(grad, ctx.group, lambda begin, end, piece: _project(piece, weight, dy[begin:end]))
        return dy, every.mT @ y, every.sum(0) if ctx.has_bias else None, None


class NormProjectScatter(torch.autograd.Function):
    """Rows over their root mean square through a linear layer, (T, E) -> (T / R, D); ranks share the rows' channels.

    A row's mean square is one number, which the linear layer lets through: rows are projected as they are, and their
    sums divided. So ranks need not wait for each other's squares before they project.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor, eps: float, group: Any
    ) -> Tensor:
        every = squares.clone()
        work = dist.all_reduce(every, group=group, async_op=True)
        scattering = Scattering(y, weight.shape[0], group)
        for begin, end in scattering.bounds:
            scattering.send(y[begin:end] @ weight.mT)
        work.wait()  # type: ignore[union-attr]
        total, every = scattering.result(), own(every[:, None], group).flatten()
        ctx.save_for_backward(y, weight, total, every)
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.mean = (y.shape[1] * dist.get_world_size(group), eps)
        out = divide_by_root(total, every, *ctx.mean)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None, None]:
        y, weight, total, squares = ctx.saved_tensors
        scaled, slope = divide_by_root_backward(grad, total, squares, *ctx.mean)
        dsquares, dy = _gathered_column(slope, ctx.group), torch.empty_like(y)
        every = gathered(scaled, ctx.group, lambda begin, end, piece: _project(piece, weight, dy[begin:end]))
        dbias = _gathered_sum(grad, ctx.group) if ctx.has_bias else None
        return dy, every.mT @ y, dbias, dsquares, None, None
