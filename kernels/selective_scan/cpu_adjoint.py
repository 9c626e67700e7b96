"""One chunk backwards where A is real: a few states of 16 channels at a time, which stay in registers over the steps.

Going forward again, ``a_t`` and ``a_t h_{t-1}`` are kept for the way back (in the cache: a group of states of 16
channels has its own turn), so there is one exponential a state and step. Sums over channels for dB and dC stay lanes
until all channels of the block are done.

B batch, L tokens, D channels, N state, T steps of a chunk, W lanes, S states of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from kernels.selective_scan.cpu_arguments import GROUP, INNER, PART, Inputs, Sizes
from kernels.selective_scan.cpu_chunk import Scratch, new_rows, new_steps, new_tile
from kernels.selective_scan.cpu_math import decay
from kernels.selective_scan.cpu_simd import WIDTH, apart, lane_sum, load, pointer, replace, spread, store
from kernels.selective_scan.cpu_simd_math import add_products
from kernels.selective_scan.problem import CHUNK


class Tiles(NamedTuple):
    """Scratch of one block of channels."""

    A: np.ndarray  # (Q, N, W), as all down to h
    B: np.ndarray
    C: np.ndarray
    grad_a: np.ndarray
    grad_b: np.ndarray
    grad_c: np.ndarray
    G: np.ndarray  # conj(a_{t+1}) G_{t+1}
    h: np.ndarray
    a: np.ndarray  # (T, S, 16) for real A, (T, Q N, W) for complex A
    ah: np.ndarray  # the same: a_t h_{t-1}
    sum_db: np.ndarray  # (T, S, 16) for real A: sums over channels, still in lanes
    sum_dc: np.ndarray
    turns: np.ndarray  # (J, T, V): dt as `decay` wants it; as all down to ddt
    low: np.ndarray
    u: np.ndarray  # dt x
    dy: np.ndarray  # gated
    y: np.ndarray  # before the gate
    dz: np.ndarray
    dx: np.ndarray
    ddt: np.ndarray
    row: np.ndarray  # (Q, W)
    step_db: np.ndarray  # (T, N Q)
    step_dc: np.ndarray
    D: np.ndarray  # (W,)
    bias: np.ndarray
    grad_d: np.ndarray
    grad_bias: np.ndarray


@njit(**PART)
def make_tiles(s: Sizes, v: Inputs, width: int) -> Tiles:
    """Zeros; the padding lanes of parameters and incoming gradients stay so."""
    q, n, w = s.planes, s.padded, width
    kept, lanes = (q * n, width) if q == 2 else (GROUP, WIDTH)
    return Tiles(
        new_tile(q, n, w, v.x), new_tile(q, n, w, v.x), new_tile(q, n, w, v.x), new_tile(q, n, w, v.x),
        new_tile(q, n, w, v.x), new_tile(q, n, w, v.x), new_tile(q, n, w, v.x), new_tile(q, n, w, v.x),
        new_tile(CHUNK, kept, lanes, v.x), new_tile(CHUNK, kept, lanes, v.x),
        new_tile(CHUNK, GROUP, WIDTH, v.x), new_tile(CHUNK, GROUP, WIDTH, v.x),
        new_steps(s, w, v.x), new_steps(s, w, v.x), new_steps(s, w, v.x), new_steps(s, w, v.x),
        new_steps(s, w, v.x), new_steps(s, w, v.x), new_steps(s, w, v.x), new_steps(s, w, v.x), new_rows(q, w, v.x),
        new_rows(CHUNK, n * q, v.x), new_rows(CHUNK, n * q, v.x),
        new_rows(1, w, v.x)[0], new_rows(1, w, v.x)[0], new_rows(1, w, v.x)[0], new_rows(1, w, v.x)[0],
    )  # fmt: skip


@njit(**INNER)
def replay(s: Sizes, c: Scratch, steps: int, n: int, j: int, t: Tiles) -> None:
    """Runs the states from ``n`` on of vector ``j`` again from t.h, and keeps a and a h of each step."""
    apart()
    width, first = t.u.shape[0] * WIDTH, j * CHUNK * WIDTH
    tile = n * width + j * WIDTH
    dt, u, rows_b, restart, B = pointer(t.turns), pointer(t.u), pointer(c.B), pointer(c.restart), pointer(t.B)
    kept_a, kept_ah = pointer(t.a), pointer(t.ah)
    low, h, rate = pointer(t.low), load(t.h, tile, width, GROUP), load(t.A, tile, width, GROUP)
    for i in range(steps):
        at, to = first + i * WIDTH, i * GROUP * WIDTH
        if restart[i] != 0:
            h = replace(h, t.h.dtype.type(0))
        # Constant B is loaded at each step: it has no registers left.
        b = spread(rows_b, i * s.padded + n, h) if s.varying_b else load(B, tile, width, h)
        a = decay(load(dt, at, 0, 1), load(low, at, 0, 1), rate)
        ah = a * h
        store(kept_a, to, WIDTH, a)
        store(kept_ah, to, WIDTH, ah)
        h = ah + load(u, at, 0, 1) * b


@njit(**INNER)
def retreat(s: Sizes, c: Scratch, steps: int, n: int, j: int, t: Tiles) -> None:
    """Goes back: adds <B, G> to dx, <A a h, G> to ddt and <C, h> to y; t.G becomes ``a G`` before the chunk."""
    apart()
    width, first = t.u.shape[0] * WIDTH, j * CHUNK * WIDTH
    tile = n * width + j * WIDTH
    dt, u, rows_b, rows_c, restart = pointer(c.dt), pointer(t.u), pointer(c.B), pointer(c.C), pointer(c.restart)
    dy, y, dx, ddt, B, C = pointer(t.dy), pointer(t.y), pointer(t.dx), pointer(t.ddt), pointer(t.B), pointer(t.C)
    kept_a, kept_ah, sum_db, sum_dc = pointer(t.a), pointer(t.ah), pointer(t.sum_db), pointer(t.sum_dc)
    dB, dC = pointer(t.grad_b), pointer(t.grad_c)
    A, G, dA = load(t.A, tile, width, GROUP), load(t.G, tile, width, GROUP), load(t.grad_a, tile, width, GROUP)
    for i in range(steps - 1, -1, -1):
        at, to = first + i * WIDTH, i * GROUP * WIDTH
        b = spread(rows_b, i * s.padded + n, A) if s.varying_b else load(B, tile, width, A)
        r = spread(rows_c, i * s.padded + n, A) if s.varying_c else load(C, tile, width, A)
        ah, ut, dyt = load(kept_ah, to, WIDTH, A), load(u, at, 0, 1), load(dy, at, 0, 1)
        h = ah + ut * b
        if s.gated:
            store(y, at, 0, add_products(load(y, at, 0, 1), h, r))
        G = G + dyt * r
        step_dc, step_db, ahG = h * dyt, G * ut, ah * G
        if s.varying_c:
            store(sum_dc, to, WIDTH, load(sum_dc, to, WIDTH, A) + step_dc if j > 0 else step_dc)
        else:
            store(dC, tile, width, load(dC, tile, width, A) + step_dc)
        if s.varying_b:
            store(sum_db, to, WIDTH, load(sum_db, to, WIDTH, A) + step_db if j > 0 else step_db)
        else:
            store(dB, tile, width, load(dB, tile, width, A) + step_db)
        store(dx, at, 0, add_products(load(dx, at, 0, 1), b, G))
        store(ddt, at, 0, add_products(load(ddt, at, 0, 1), A, ahG))
        dA = dA + load(dt, at, 0, 1) * ahG
        G = load(kept_a, to, WIDTH, A) * G
        if restart[i] != 0:
            G = replace(G, t.G.dtype.type(0))
    store(t.G, tile, width, G)
    store(t.grad_a, tile, width, dA)


@njit(**INNER)
def reduce(sums: np.ndarray, steps: int, n: int, rows: np.ndarray) -> None:
    """Sums of a group of states over the channels, in lanes, to columns ``n`` and on of rows ``(T, N)``."""
    for i in range(steps):
        for j in range(GROUP):
            rows[i, n + j] = lane_sum(load(sums, (i * GROUP + j) * WIDTH, 0, 1))


@njit(**INNER)
def back_real(s: Sizes, c: Scratch, steps: int, t: Tiles) -> None:
    """The whole chunk: t.G, t.dx, t.ddt, t.y and the sums for A, B and C."""
    for n in range(0, s.padded, GROUP):
        for j in range(t.u.shape[0]):
            replay(s, c, steps, n, j, t)
            retreat(s, c, steps, n, j, t)
        if s.varying_b:
            reduce(t.sum_db, steps, n, t.step_db)
        if s.varying_c:
            reduce(t.sum_dc, steps, n, t.step_dc)
