"""``kernels.norm.late`` on GPUs: one pass over the rows, cut as ``kernels.norm.triton`` cuts them.

D channels, M rows.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.norm.triton_shape import processors
from kernels.plans import on_device


@triton.jit
def _load(x_ptr, squares_ptr, residual_ptr, tile, M, D, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr,
          PARTS: tl.constexpr):  # fmt: skip
    """A tile of rows (ROWS, BLOCK), their squares (ROWS, PARTS) and the stream; zeros beyond the last row."""
    m = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d, part = tl.arange(0, BLOCK)[None, :], tl.arange(0, PARTS)[None, :]
    live = (m < M) & (d < D)
    x = tl.load(x_ptr + m * D + d, mask=live, other=0.0)
    squares = tl.load(squares_ptr + m * parts + part, mask=(m < M) & (part < parts), other=0.0)
    return x, squares, tl.load(residual_ptr + m * D + d, mask=live, other=0.0)


@triton.jit(do_not_specialize=["strips", "steps"])
def _late_kernel(
    x_ptr, squares_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, M, D, parts, width, strips, steps,
    inner_eps: tl.constexpr, eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program takes every ``strips``-th tile of rows; the next one is on its way while this one is computed."""
    tile, d = tl.program_id(0), tl.arange(0, BLOCK)[None, :]
    ahead = _load(x_ptr, squares_ptr, residual_ptr, tile, M, D, parts, ROWS, BLOCK, PARTS)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(ACC)
    for _ in range(steps):
        x, squares, residual = ahead
        ahead = _load(x_ptr, squares_ptr, residual_ptr, tile + strips, M, D, parts, ROWS, BLOCK, PARTS)
        scale = 1 / tl.sqrt(tl.sum(squares.to(ACC), 1) / width + inner_eps)
        s = x.to(ACC) * scale[:, None] + residual.to(ACC)
        m = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        live = (m < M) & (d < D)
        tl.store(sum_ptr + m * D + d, s, mask=live)
        s = tl.where(live, s, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(s * s, 1) / D + eps)
        tl.store(y_ptr + m * D + d, s * rstd[:, None] * weight, mask=live)
        tile += strips


def forward(
    x: Tensor, squares: Tensor, width: int, inner_eps: float, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``kernels.norm.late.add_norm`` of contiguous tensors."""
    channels = x.shape[-1]
    y, total = torch.empty_like(x), torch.empty_like(residual)
    if x.numel():
        rows, parts, block = x.numel() // channels, squares.shape[-1], triton.next_power_of_2(channels)
        warps, each = max(1, min(16, block // 512)), max(1, min(2, 16384 // block))
        tiles = -(-rows // each)
        strips = max(1, min(tiles, processors(x.device) * 32 // warps))
        with on_device(x):
            _late_kernel[(strips,)](
                x, squares, residual, weight.contiguous(), y, total, rows, channels, parts, width, strips,
                -(-tiles // strips), inner_eps=inner_eps, eps=eps, ROWS=each, BLOCK=block,
                PARTS=triton.next_power_of_2(parts), num_warps=warps,
                ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
            )  # fmt: skip
    return y, total
