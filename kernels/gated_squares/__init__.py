"""A gate that also sums its rows' squares, and rows over their root mean square: a gated RMSNorm in two parts.

Between the parts ranks that share a row's channels add its squares up, while the row is projected; see
``core.parallel.exchange``. Mamba-2's norm (Dao & Gu 2024, section 7.1) with norm(y * silu(z)).

T rows, E channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import choose


def _launch(name: str, rows: int, width: int, *arguments: Any) -> None:
    from kernels.gated_squares.triton import launch

    launch(name, rows, width, *arguments)


def _units(y: Tensor, z: Tensor) -> tuple[int, int, int, int]:
    """Columns and distances of rows, in units of so many numbers."""
    unit = math.gcd(y.shape[1], y.stride(0), z.stride(0), 16)
    return y.shape[1] // unit, y.stride(0) // unit, z.stride(0) // unit, unit


def _by_kernel(t: Tensor) -> bool:
    """Whether the kernels take rows like these; others are left to PyTorch's operators."""
    return choose("auto", t.device)[0] == "triton" and t.dtype != torch.float64


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, z)
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(torch.float32, y.dtype)
        if not _by_kernel(y):
            gated = y.to(wide) * F.silu(z.to(wide))
            return gated.to(y.dtype), gated.square().sum(1)
        out, squares = torch.empty(y.shape, dtype=y.dtype, device=y.device), y.new_empty(len(y), dtype=wide)
        _launch("gate", *y.shape, y, z, out, squares, *_units(y, z))
        return out, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dsquares: Tensor | None) -> tuple[Tensor, Tensor]:
        y, z = ctx.saved_tensors
        wide = torch.promote_types(torch.float32, y.dtype)
        given = torch.zeros(y.shape, dtype=y.dtype, device=y.device) if dout is None else dout.contiguous()
        slope = y.new_zeros(len(y), dtype=wide) if dsquares is None else dsquares.contiguous()
        dy, dz = (torch.empty(y.shape, dtype=t.dtype, device=y.device) for t in (y, z))
        if _by_kernel(y):
            _launch("gate_backward", *y.shape, given, slope, y, z, dy, dz, *_units(y, z))
            return dy, dz
        a, b = y.to(wide), z.to(wide)
        sigmoid, silu = b.sigmoid(), F.silu(b)
        grad = given.to(wide) + 2 * slope[:, None] * a * silu
        return dy.copy_(grad * silu), dz.copy_(grad * a * (sigmoid + silu * (1 - sigmoid)))


def gate_with_squares(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """y * silu(z), and the sum of its squares; gradients of both are taken.

    Args:
        y: (T, E) floats, neighbours in a row next to each other.
        z: (T, E), likewise.

    Returns:
        (T, E) in y's dtype, and (T,) in float32 (float64 for float64).

    Raises:
        ValueError: For other shapes.
    """
    if y.ndim != 2 or y.shape != z.shape:
        raise ValueError(f"y, z: got shapes {tuple(y.shape)}, {tuple(z.shape)}, wanted (T, E) of both; flatten them")
    y, z = (t if t.stride(1) == 1 else t.contiguous() for t in (y, z))
    return _Gate.apply(y, z)  # type: ignore[return-value]


def divide_by_root(x: Tensor, squares: Tensor, count: int, eps: float) -> Tensor:
    """x (T, E) over the root of squares (T,) / count + eps, in x's dtype; see ``divide_by_root_backward``."""
    if not _by_kernel(x):
        return (x * (squares / count + eps).rsqrt()[:, None]).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("divide", *x.shape, x.contiguous(), squares.contiguous(), out, x.shape[1], 1 / count, eps)
    return out


def divide_by_root_backward(dout: Tensor, x: Tensor, squares: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of squares (T,) in ``divide_by_root``."""
    if not _by_kernel(x):
        rstd = (squares / count + eps).rsqrt()
        inner = (dout.to(rstd.dtype) * x).sum(1)
        return (dout * rstd[:, None]).to(x.dtype), inner * rstd**3 / (-2 * count)
    dx, dsquares = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(squares)
    arguments = (dout.contiguous(), x.contiguous(), squares.contiguous(), dx, dsquares)
    _launch("divide_backward", *x.shape, *arguments, x.shape[1], 1 / count, eps)
    return dx, dsquares
