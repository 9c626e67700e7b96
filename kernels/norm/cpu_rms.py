"""RMSNorm on the CPU of rows of float32 or bfloat16, with the addition before it: one pass over memory.

    s = x + residual,   y = s rstd weight + bias,   rstd = (mean(s^2) + eps)^-1/2

D channels, M rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.cpu_rows import FLOATS, SOURCES, flat, read_row
from kernels.jit import compiled
from kernels.norm.problem import Problem
from kernels.selective_scan.cpu_arguments import FUSED, MATH
from kernels.selective_scan.cpu_simd import WIDTH, lane_sum, load, pointer, replace, store
from kernels.threads import parts, run

ROWS = 32  # of a job


def takes(p: Problem) -> bool:
    """Whether the problem is one of these."""
    plain = not p.layer and p.z is None and p.groups == 1 and p.dtype == torch.float32
    return plain and all(t is None or t.dtype in FLOATS for t in (p.x, p.residual))


@njit(**FUSED)
def _square(row, other, lanes, add):
    """The sum of the squares of a row, whose lanes beyond D are zero; with ``add``, of both rows, into the first."""
    total = replace(load(row, 0, 0, 1), np.float32(0))
    for d in range(0, lanes, WIDTH):
        v = load(row, d, 0, 1)
        if add:
            v = v + load(other, d, 0, 1)
            store(row, d, 0, v)
        total = total + v * v
    return lane_sum(total)


@njit(**FUSED)
def _scale(row, weight, bias, scale, lanes):
    """The row, normalised in place."""
    for d in range(0, lanes, WIDTH):
        store(row, d, 0, load(row, d, 0, 1) * scale * load(weight, d, 0, 1) + load(bias, d, 0, 1))


def _make(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def forward(x, residual, weight, bias, channels, eps, s, y, rstd, first, last):
        """Writes s, y (M, D) and rstd (M,) of rows first * ROWS <= m < last * ROWS; residual and s may be empty."""
        _ = sources
        lanes = weight.size
        row, other = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
        one, two, weights, biases = pointer(row), pointer(other), pointer(weight), pointer(bias)
        add = residual.size > 0
        for m in range(first * ROWS, min(rstd.size, last * ROWS)):
            at = m * channels
            read_row(x, at, row, 0, channels)
            if add:
                read_row(residual, at, other, 0, channels)
            square = _square(one, two, lanes, add)
            if add:
                read_row(row, 0, s, at, channels)
            scale = np.float32(1) / np.sqrt(square / np.float32(channels) + eps)
            rstd[m] = scale
            _scale(one, weights, biases, scale, lanes)
            read_row(row, 0, y, at, channels)

    return forward


_forward = _make(SOURCES)


def _padded(t: Tensor | None, channels: int) -> np.ndarray:
    """``(D,)`` in float32, zeros for None and beyond D to whole vectors of lanes."""
    row = torch.zeros(-(-channels // WIDTH) * WIDTH)
    if t is not None:
        row[:channels] = t.detach()
    return row.numpy()


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in x's dtype, x + residual (empty without a residual), mean (zeros) and rstd ``(..., 1)``."""
    x = p.x.detach().contiguous()
    residual = None if p.residual is None else p.residual.detach().contiguous()
    dtype = p.residual_dtype if p.residual_dtype in FLOATS else torch.float32
    y = torch.empty_like(x)
    s = torch.empty(0 if residual is None else p.x.shape, dtype=dtype)
    rstd = torch.empty(p.stats_shape)
    arguments = (
        flat(x), flat(s if residual is None else residual), _padded(p.weight, p.channels), _padded(p.bias, p.channels),
        p.channels, np.float32(p.eps), flat(s), flat(y), rstd.view(-1).numpy(),
    )  # fmt: skip
    run(_forward, [(*arguments, *part) for part in parts(-(-rstd.numel() // ROWS))])
    return y, s.to(p.residual_dtype), torch.zeros_like(rstd), rstd
