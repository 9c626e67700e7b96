"""The forward scan on the CPU: one numba kernel that runs a block of channels through sequences and routes.

    a_t = exp(dt_t A),  h_t = a_t h_{t-1} + dt_t x_t B_t,  y_t = <C_t, h_t> + D x_t   (y_t = 2 Re<C_t, h_t> + D x_t)

B batch, L tokens, D channels, N state, K routes, P scan positions, S sequences, Q planes, T steps of a chunk, W lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from kernels.selective_scan.cpu_chunk import (
    INNER,
    PART,
    SKIP,
    SOURCES,
    Inputs,
    Scratch,
    Sizes,
    decay,
    fill,
    flush,
    gather,
    kernel,
    lanes,
    load_row,
    load_state,
    load_tile,
    make_scratch,
    sequence,
    store_state,
)
from kernels.selective_scan.cpu_math import exp, sigmoid
from kernels.selective_scan.problem import CHUNK


@njit(**INNER)
def save(h: np.ndarray, s: Sizes, slot: int, k: int, d0: int, d1: int, saved: np.ndarray) -> None:
    """A tile to slot ``slot`` of saved ``(slots, K, N, D, Q)``."""
    for n in range(s.state):
        at = ((slot * s.routes + k) * s.state + n) * s.channels + d0
        for plane in range(s.planes):
            for d in range(d1 - d0):
                saved[(at + d) * s.planes + plane] = h[plane, n, d]


@njit(**INNER)
def advance_real(
    s: Sizes,
    c: Scratch,
    steps: int,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    h: np.ndarray,
    y: np.ndarray,
) -> None:
    """Runs the steps of a chunk: h moves on, y ``(T, W)`` is read."""
    width = D.size
    varying_b, varying_c = s.varying_b != 0, s.varying_c != 0
    Bt, Ct = c.B, c.C
    x, dt = c.x, c.dt
    for i in range(steps):
        if c.token[i] == SKIP:
            continue
        if c.restart[i]:
            fill(h)
        for d in range(width):
            y[i, d] = D[d] * x[i, d]
            x[i, d] *= dt[i, d]
        for n in range(A.shape[1]):
            b = Bt[i, n]
            r = Ct[i, n]
            for d in range(width):
                value = exp(dt[i, d] * A[0, n, d]) * h[0, n, d] + x[i, d] * (b if varying_b else B[0, n, d])
                h[0, n, d] = value
                y[i, d] += value * (r if varying_c else C[0, n, d])


@njit(**INNER)
def advance_complex(
    s: Sizes,
    c: Scratch,
    steps: int,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    h: np.ndarray,
    a: np.ndarray,
    y: np.ndarray,
) -> None:
    """``advance_real`` on two planes; y takes twice the real part."""
    width = D.size
    for i in range(steps):
        if c.token[i] == SKIP:
            continue
        if c.restart[i]:
            fill(h)
        decay(2, c.dt, i, A, a)
        for d in range(width):
            y[i, d] = D[d] * c.x[i, d]
            c.x[i, d] *= c.dt[i, d]
        for n in range(s.state):
            for plane in range(2):
                if s.varying_b:
                    for d in range(width):
                        B[plane, n, d] = c.B[i, 2 * n + plane]
                if s.varying_c:
                    for d in range(width):
                        C[plane, n, d] = c.C[i, 2 * n + plane]
            for d in range(width):
                real = a[0, n, d] * h[0, n, d] - a[1, n, d] * h[1, n, d] + c.x[i, d] * B[0, n, d]
                imag = a[0, n, d] * h[1, n, d] + a[1, n, d] * h[0, n, d] + c.x[i, d] * B[1, n, d]
                half = C[0, n, d] * real - C[1, n, d] * imag
                h[0, n, d] = real
                h[1, n, d] = imag
                y[i, d] += half + half


@njit(**PART)
def put(
    s: Sizes,
    v: Inputs,
    b: int,
    k: int,
    d0: int,
    width: int,
    steps: int,
    token: np.ndarray,
    rows: np.ndarray,
    y: np.ndarray,
) -> None:
    """Adds rows, gated, to their tokens of y ``(B, L, K or 1, D)``: gating each route is gating their sum."""
    routes = s.routes if s.keep else 1
    for i in range(steps):
        if token[i] < 0:
            continue
        if s.gated:
            z = v.z[b * v.z_strides[0] + token[i] * v.z_strides[1] + d0 :]
            for d in range(width):
                rows[i, d] *= z[d] * sigmoid(z[d])
        out = y[((b * s.length + token[i]) * routes + (k if s.keep else 0)) * s.channels + d0 :]
        for d in range(width):
            out[d] += rows[i, d]


def _make(sources: str) -> Callable[..., None]:

    @kernel
    def forward(
        j0: int, j1: int, q0: int, q1: int, s: Sizes, v: Inputs, y: np.ndarray, final: np.ndarray, saved: np.ndarray
    ) -> None:
        """Blocks ``j0:j1`` of sequences ``q0:q1``, all routes.

        Writes y ``(B, L, K or 1, D)`` (zeros at first), final ``(S, K, D, N, Q)`` and saved
        ``(slots, K, N, D, Q)``, all flat.
        """
        _ = sources
        for j in range(j0, j1):
            d0, d1 = v.blocks[j, 0], v.blocks[j, 1]
            g = d0 * s.groups // s.channels
            width = lanes(d1 - d0)
            tile, kind = (s.planes, s.state, width), v.x.dtype
            A, B, C = np.zeros(tile, kind), np.zeros(tile, kind), np.zeros(tile, kind)
            a, h = np.zeros(tile, kind), np.zeros(tile, kind)
            bias, D, rows = np.zeros(width, kind), np.zeros(width, kind), np.zeros((CHUNK, width), kind)
            c = make_scratch(s, v, width)
            for k in range(s.routes):
                load_tile(v.A, s, k, d0, d1, A)
                if not s.varying_b:
                    load_tile(v.B, s, k, d0, d1, B)
                if not s.varying_c:
                    load_tile(v.C, s, k, d0, d1, C)
                load_row(v.D, s, k, d0, d1, D)
                load_row(v.dt_bias, s, k, d0, d1, bias)
                for q in range(q0, q1):
                    b, start, stop, slot = sequence(s, v, q)
                    load_state(v.initial, s, q, k, d0, d1, h)
                    for done in range(0, stop - start, CHUNK):
                        steps = min(CHUNK, stop - start - done)
                        flush(h)
                        save(h, s, slot, k, d0, d1, saved)
                        slot += 1
                        first = stop - 1 - done if s.reverse else start + done
                        gather(s, v, b, k, g, d0, d1, first, steps, bias, c, False)
                        if s.planes == 1:
                            advance_real(s, c, steps, A, B, C, D, h, rows)
                        else:
                            advance_complex(s, c, steps, A, B, C, D, h, a, rows)
                        put(s, v, b, k, d0, d1 - d0, steps, c.token, rows, y)
                    store_state(h, s, q, k, d0, d1, final)

    return forward


forward = _make(SOURCES)
