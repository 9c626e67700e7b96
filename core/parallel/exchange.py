"""Collectives with gradients for rows that ranks share out, and linear layers next to them.

While gradients leave a linear layer, or a norm's squares are added up, the layer goes on with another product.

Legend: R ranks, T rows of all ranks, D width, E width of a projection.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gated_squares import divide_by_root, divide_by_root_backward


def own(rows: Tensor, group: Any) -> Tensor:
    """This rank's rows of those of all ranks."""
    return rows.unflatten(0, (dist.get_world_size(group), -1))[dist.get_rank(group)]


def gathered(rows: Tensor, group: Any, wait: bool = True) -> tuple[Tensor, Any]:
    """(T / R, ...) -> (T, ...), the rows of all ranks; with what to wait for before they are read, unless ``wait``."""
    found = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    return found, dist.all_gather_into_tensor(found, rows.contiguous(), group=group, async_op=not wait)


def scattered(rows: Tensor, group: Any, wait: bool = True) -> tuple[Tensor, Any]:
    """(T, D) -> (T / R, D), this rank's rows of the sum over the ranks; see ``gathered``."""
    found = rows.new_empty(rows.shape[0] // dist.get_world_size(group), rows.shape[1])
    return found, dist.reduce_scatter_tensor(found, rows.contiguous(), group=group, async_op=not wait)


def summed(t: Tensor, group: Any, wait: bool = True) -> tuple[Tensor, Any]:
    """The sum over the ranks; see ``gathered``."""
    total = t.clone(memory_format=torch.contiguous_format)
    return total, dist.all_reduce(total, group=group, async_op=not wait)


class Spread(torch.autograd.Function):
    """What all ranks have; the gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group)[0], None


class Sum(torch.autograd.Function):
    """The sum over the ranks, which all of them use in the same way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        return summed(t, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """All rows; the gradient of this rank's is that of all ranks' uses if ``adds``, else of one's: they do the same."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, adds: bool) -> Tensor:
        ctx.group, ctx.adds = group, adds
        return gathered(rows, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scattered(grad, ctx.group)[0] if ctx.adds else own(grad, ctx.group), None, None


class Scatter(torch.autograd.Function):
    """This rank's rows, of the sum over the ranks if ``adds``, else of what all ranks have."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, adds: bool) -> Tensor:
        ctx.group = group
        return scattered(rows, group)[0] if adds else own(rows, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.group)[0], None, None


class GatherProject(torch.autograd.Function):
    """All ranks' rows through a linear layer, (T / R, D) -> (T, E).

    The rows' gradients leave while the weight's is computed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        every, _ = gathered(rows, group)
        ctx.save_for_backward(every, weight)
        y = every @ weight.mT
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        every, weight = ctx.saved_tensors
        drows, work = scattered(grad @ weight, ctx.group, wait=False)
        dweight, dbias = grad.mT @ every, grad.sum(0) if ctx.has_bias else None
        work.wait()
        return drows, dweight, dbias, None


class ProjectScatter(torch.autograd.Function):
    """Rows through a linear layer whose inputs ranks share, (T, E) -> (T / R, D). The bias is added once."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.save_for_backward(y, weight)
        out, _ = scattered(y @ weight.mT, group)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        y, weight = ctx.saved_tensors
        every, _ = gathered(grad, ctx.group)
        return every @ weight, every.mT @ y, every.sum(0) if ctx.has_bias else None, None


class NormProjectScatter(torch.autograd.Function):
    """Rows over their root mean square through a linear layer, (T, E) -> (T / R, D); ranks share the rows' channels.

    A row's mean square is one number, which the linear layer lets through: rows are projected as they are, and their
    sums divided. So ranks need not wait for each other's squares before they project.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor, eps: float, group: Any
    ) -> Tensor:
        squares, work = summed(squares, group, wait=False)
        total, _ = scattered(y @ weight.mT, group)
        work.wait()
        squares = own(squares, group)
        ctx.save_for_backward(y, weight, total, squares)
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.mean = (y.shape[1] * dist.get_world_size(group), eps)
        out = divide_by_root(total, squares, *ctx.mean)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None, None]:
        y, weight, total, squares = ctx.saved_tensors
        scaled, slope = divide_by_root_backward(grad, total, squares, *ctx.mean)
        every, _ = gathered(scaled, ctx.group)
        dsquares, work = gathered(slope, ctx.group, wait=False)
        dy, dweight = every @ weight, every.mT @ y
        dbias = summed(grad.sum(0), ctx.group)[0] if ctx.has_bias else None
        work.wait()
        return dy, dweight, dbias, dsquares, None, None
