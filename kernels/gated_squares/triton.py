"""The Triton kernels of ``gated_squares``: a program a row.

T rows, E channels.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def gate_kernel(y, z, out, squares, E, y_row, z_row, UNIT: tl.constexpr, BLOCK: tl.constexpr):
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
def gate_backward_kernel(dout, dsquares, y, z, dy, dz, E, y_row, z_row, UNIT: tl.constexpr, BLOCK: tl.constexpr):
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
def divide_kernel(x, squares, out, E, share, eps, BLOCK: tl.constexpr):
    """A row of x over the root of its mean square, squares * share."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    rstd = 1 / tl.sqrt(tl.load(squares + row) * share + eps)
    found = tl.load(x + row * E + lane, mask=lane < E, other=0.0).to(tl.float32) * rstd
    tl.store(out + row * E + lane, found, mask=lane < E)


@triton.jit
def divide_backward_kernel(dout, x, squares, dx, dsquares, E, share, eps, BLOCK: tl.constexpr):
    """A row of the gradient of x, and that of its sum of squares."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    rstd = 1 / tl.sqrt(tl.load(squares + row) * share + eps)
    grad = tl.load(dout + row * E + lane, mask=lane < E, other=0.0).to(tl.float32)
    a = tl.load(x + row * E + lane, mask=lane < E, other=0.0).to(tl.float32)
    tl.store(dx + row * E + lane, grad * rstd, mask=lane < E)
    tl.store(dsquares + row, tl.sum(grad * a, 0) * rstd * rstd * rstd * share * -0.5)


KERNELS = {
    "gate": gate_kernel, "gate_backward": gate_backward_kernel,
    "divide": divide_kernel, "divide_backward": divide_backward_kernel,
}  # fmt: skip


def launch(name: str, rows: int, width: int, *arguments: Any) -> None:
    """Runs a kernel over rows of so many channels."""
    if rows:
        BLOCK = triton.next_power_of_2(width)
        KERNELS[name][(rows,)](*arguments, BLOCK=BLOCK, num_warps=4 if width <= 2048 else 8)
