"""The tensors that GPU kernels write maps to, one row a token and route, and how gradients come into shape.

B batch, L tokens, D channels, K routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import owned
from kernels.selective_scan.problem import Problem


def fresh(p: Problem, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for rows of tokens; zeros where the kernel may leave out some: along routes, or where some are skipped."""
    new = torch.empty if p.route is None and p.code is None else torch.zeros
    return new(tuple(size), dtype=dtype, device=p.x.device)


def new_map(p: Problem, dtype: torch.dtype) -> Tensor:
    """A ``fresh`` ``(B, L, K, D)``."""
    return fresh(p, (p.batch, p.length, p.routes, p.channels), dtype)


def new_y(p: Problem) -> Tensor:
    """y ``(B, L, K, D)`` before the routes are merged: in x's dtype, or that of the scan where they are summed."""
    return new_map(p, p.dtype if p.merge and p.routes > 1 else p.x.dtype)


def finished_y(p: Problem, y: Tensor) -> Tensor:
    """``(B, L, D)``, or ``(B, L, K, D)`` where the routes are kept, in x's dtype."""
    if p.merge and p.routes > 1:
        return y.sum(2).to(p.x.dtype)
    return owned(y, (p.batch, p.length, p.channels)) if p.route is None or p.merge else y


@dataclass(frozen=True)
class MapGradients:
    """Gradients of x, dt and z as kernels write them, ``(B, L, K, D)``; in the scan's dtype where routes are summed."""

    p: Problem
    x: Tensor
    dt: Tensor
    z: Tensor | None

    @staticmethod
    def new(p: Problem, dtype: torch.dtype | None = None) -> MapGradients:
        """Memory for them; all in ``dtype`` if one is given."""
        x = new_map(p, dtype or (p.x.dtype if p.x.shape[2] == p.routes else p.dtype))
        z = None if p.z is None else new_map(p, dtype or (p.z.dtype if p.routes == 1 else p.dtype))
        return MapGradients(p, x, new_map(p, dtype or p.dt.dtype), z)

    def plus(self, other: MapGradients) -> MapGradients:
        """The sum of both, in the memory of this one."""
        for name in ("x", "dt", "z"):
            if (mine := getattr(self, name)) is not None:
                mine += getattr(other, name)
        return self

    @property
    def merged_x(self) -> Tensor:
        """In the shape of ``Problem.x``."""
        return self.x if self.p.x.shape[2] == self.p.routes else self.x.sum(2, keepdim=True)

    @property
    def merged_z(self) -> Tensor | None:
        """``(B, L, D)``."""
        if self.z is None:
            return None
        return self.z.sum(2) if self.p.routes > 1 else self.z.squeeze(2)


def unprojected(ddt: Tensor, dt: Tensor, weight: Tensor | None, routed: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of a low-rank dt and its weight from that of the projected one, ``(B, L, K, D)`` or without K."""
    if weight is None:
        return ddt, None
    if not routed:
        rows, low = ddt.reshape(-1, ddt.shape[-1]), dt.flatten(0, 1).to(ddt.dtype)
        return rows @ weight.to(ddt.dtype), rows.T @ low
    low = torch.einsum("blkd,kdr->blkr", ddt, weight.to(ddt.dtype))
    return low, torch.einsum("blkd,blkr->kdr", ddt, dt.to(ddt.dtype))


def like(grad: Tensor | None, tensor: Tensor | None, x: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its input; an empty tensor where there is no input."""
    if tensor is None or grad is None:
        return x.new_empty(0)
    if grad.dtype != tensor.dtype:
        grad = grad.to(tensor.dtype)
    if grad.shape != tensor.shape:
        grad = grad.reshape(tensor.shape)
    return grad.contiguous()
