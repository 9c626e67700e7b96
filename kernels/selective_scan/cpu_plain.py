"""The two ends of a chunk of the forward on the CPU where real tokens follow each other, in whole vectors of channels.

Each number is read from memory and written once, with what is elementwise done on the way. Other chunks (routes,
padding tokens, complex A, other widths) go through ``cpu_chunk.gather`` and ``cpu_forward.put``.

B batch, L tokens, D channels, K routes, T steps of a chunk, J vectors of 16 channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kernels.cpu_rows import read, write
from kernels.selective_scan.cpu_arguments import INNER, PART, Inputs, Sizes
from kernels.selective_scan.cpu_chunk import AHEAD, Scratch, gather_states, gather_tokens
from kernels.selective_scan.cpu_math import in_base_two, sigmoid, softplus
from kernels.selective_scan.cpu_simd import WIDTH, apart, load, pointer, prefetch, store
from kernels.selective_scan.problem import CHUNK


@njit(**PART)
def is_plain(s: Sizes, width: int) -> bool:
    """Whether chunks of blocks of ``width`` channels may go this way."""
    return s.planes == 1 and s.once != 0 and width % WIDTH == 0


@njit(**INNER)
def read_steps(
    on: int,
    steps: int,
    x: Any,
    x_at: int,
    x_stride: int,
    dt: Any,
    dt_at: int,
    dt_stride: int,
    bias: np.ndarray,
    D: np.ndarray,
    turns: Any,
    low: Any,
    u: Any,
    y: Any,
) -> None:
    """From rows of x and dt: what ``decay`` wants, dt x, and D x as the start of y, each ``(J, T, 16)``."""
    apart()
    for i in range(steps):
        for j in range(bias.size // WIDTH):
            d = j * WIDTH
            prefetch(x, x_at + AHEAD * x_stride + d)
            prefetch(dt, dt_at + AHEAD * dt_stride + d)
            at, new, raw = (j * CHUNK + i) * WIDTH, read(x, x_at + d), read(dt, dt_at + d) + load(bias, d, 0, 1)
            step = softplus(raw) if on else raw
            high, rest = in_base_two(step)
            store(turns, at, 0, high)
            store(low, at, 0, rest)
            store(u, at, 0, step * new)
            store(y, at, 0, load(D, d, 0, 1) * new)
        x_at, dt_at = x_at + x_stride, dt_at + dt_stride


@njit(**INNER)
def write_steps(
    gated: int, steps: int, rows: Any, count: int, z: Any, z_at: int, z_stride: int, y: Any, y_at: int, y_stride: int
) -> None:
    """Rows of y ``(J, T, 16)`` with J = ``count`` to memory, gated on the way."""
    apart()
    for i in range(steps):
        for j in range(count):
            row = load(rows, (j * CHUNK + i) * WIDTH, 0, 1)
            if gated:
                prefetch(z, z_at + AHEAD * z_stride + j * WIDTH)
                gate = read(z, z_at + j * WIDTH)
                row = row * (gate * sigmoid(gate))
            write(y, y_at + j * WIDTH, row)
        z_at, y_at = z_at + z_stride, y_at + y_stride


@njit(**PART)
def begin_plain(
    s: Sizes, v: Inputs, b: int, g: int, d0: int, first: int, steps: int, bias: np.ndarray, D: np.ndarray, c: Scratch,
    y: np.ndarray,
) -> None:  # fmt: skip
    """``gather`` and ``prepare`` of steps whose first one is token ``first``."""
    gather_tokens(s, v, b, 0, first, steps, c)
    sign = -1 if s.reverse else 1
    read_steps(
        s.softplus, steps, pointer(v.x), b * v.x_strides[0] + first * v.x_strides[1] + d0, sign * v.x_strides[1],
        pointer(v.dt), b * v.dt_strides[0] + first * v.dt_strides[1] + d0, sign * v.dt_strides[1],
        bias, D, pointer(c.dt), pointer(c.slope), pointer(c.x), pointer(y),
    )  # fmt: skip
    gather_states(s, v, b, 0, g, steps, c)


@njit(**PART)
def end_plain(s: Sizes, v: Inputs, b: int, d0: int, first: int, steps: int, rows: np.ndarray, y: np.ndarray) -> None:
    """``put`` of the same steps."""
    sign, start = -1 if s.reverse else 1, (b * s.length + first) * s.channels + d0
    write_steps(
        s.gated, steps, pointer(rows), rows.shape[0], pointer(v.z),
        b * v.z_strides[0] + first * v.z_strides[1] + d0, sign * v.z_strides[1], pointer(y), start, sign * s.channels,
    )  # fmt: skip
