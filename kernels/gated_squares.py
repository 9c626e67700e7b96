"""A gate that also sums its rows' squares, and rows over their root mean square: a gated RMSNorm in two parts.

Between the parts ranks that share a row's channels add its squares up, while the row is projected; see
``core.parallel.exchange``. Mamba-2's norm (Dao & Gu 2024, section 7.1) with norm(y * silu(z)).

T rows, E channels.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gate_kernel(y, z, out, squares, E, y_row, z_row, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """A row of y * silu(z) and the sum of its squares; widths are in units, so that neighbours are loaded at once."""
    E, y_row, z_row = E * UNIT, y_row * UNIT, z_row * UNIT
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = lane < E
    a = tl.load(y + row * y_row + lane, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(z + row * z_row + lane, mask=inside, other=0.0).to(tl.float32)
    gated = a * b * tl.sigmoid(b)
    tl.store(out + row * E + lane, gated, mask=inside)
    tl.store(squares + row, tl.sum(gated * gated, 0))


@triton.jit
def _gate_backward_kernel(dout, dsquares, y, z, dy, dz, E, y_row, z_row, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """A row of the gradients of y and z, of those of the gated row and of its sum of squares."""
    E, y_row, z_row = E * UNIT, y_row * UNIT, z_row * UNIT
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = lane < E
    a = tl.load(y + row * y_row + lane, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(z + row * z_row + lane, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(b)
    silu = b * sigmoid
    grad = tl.load(dout + row * E + lane, mask=inside, other=0.0).to(tl.float32)
    grad += 2 * tl.load(dsquares + row) * a * silu
    tl.store(dy + row * E + lane, grad * silu, mask=inside)
    tl.store(dz + row * E + lane, grad * a * (sigmoid + silu * (1 - sigmoid)), mask=inside)


@triton.jit
def _divide_kernel(x, squares, out, E, share, eps, BLOCK: tl.constexpr):
    """A row of x over the root of its mean square, squares * share."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    rstd = 1 / tl.sqrt(tl.load(squares + row) * share + eps)
    found = tl.load(x + row * E + lane, mask=lane < E, other=0.0).to(tl.float32) * rstd
    tl.store(out + row * E + lane, found, mask=lane < E)


@triton.jit
def _divide_backward_kernel(dout, x, squares, dx, dsquares, E, share, eps, BLOCK: tl.constexpr):
    """A row of the gradient of x, and that of its sum of squares."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    rstd = 1 / tl.sqrt(tl.load(squares + row) * share + eps)
    grad = tl.load(dout + row * E + lane, mask=lane < E, other=0.0).to(tl.float32)
    a = tl.load(x + row * E + lane, mask=lane < E, other=0.0).to(tl.float32)
    tl.store(dx + row * E + lane, grad * rstd, mask=lane < E)
    tl.store(dsquares + row, tl.sum(grad * a, 0) * rstd * rstd * rstd * share * -0.5)


def _launch(kernel: Any, rows: int, width: int, *arguments: Any) -> None:
    if rows:
        kernel[(rows,)](*arguments, BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8)


def _units(y: Tensor, z: Tensor) -> tuple[int, int, int, int]:
    """Columns and distances of rows, in units of so many numbers."""
    unit = math.gcd(y.shape[1], y.stride(0), z.stride(0), 16)
    return y.shape[1] // unit, y.stride(0) // unit, z.stride(0) // unit, unit


def _by_kernel(t: Tensor) -> bool:
    """Whether the kernels take rows like these; others are left to PyTorch's operators."""
    return t.is_cuda and t.dtype != torch.float64


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
        _launch(_gate_kernel, *y.shape, y, z, out, squares, *_units(y, z))
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
            _launch(_gate_backward_kernel, *y.shape, given, slope, y, z, dy, dz, *_units(y, z))
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
    _launch(_divide_kernel, *x.shape, x.contiguous(), squares.contiguous(), out, x.shape[1], 1 / count, eps)
    return out


def divide_by_root_backward(dout: Tensor, x: Tensor, squares: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of squares (T,) in ``divide_by_root``."""
    if not _by_kernel(x):
        rstd = (squares / count + eps).rsqrt()
        inner = (dout.to(rstd.dtype) * x).sum(1)
        return (dout * rstd[:, None]).to(x.dtype), inner * rstd**3 / (-2 * count)
    dx, dsquares = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(squares)
    arguments = (dout.contiguous(), x.contiguous(), squares.contiguous(), dx, dsquares)
    _launch(_divide_backward_kernel, *x.shape, *arguments, x.shape[1], 1 / count, eps)
    return dx, dsquares
