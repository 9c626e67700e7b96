"""The steps of a chunk where A is complex: tiles of two planes, real and imaginary, one step after the other.

    y = 2 Re<C, h> + D x;  G_t, the gradient of h_t in PyTorch's convention, is 2 dy_t conj(C_t) + conj(a_{t+1}) G_{t+1}

B batch, L tokens, D channels, N state, T steps of a chunk, W lanes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.selective_scan.cpu_adjoint import Tiles
from kernels.selective_scan.cpu_arguments import INNER, Sizes
from kernels.selective_scan.cpu_chunk import Scratch, fill
from kernels.selective_scan.cpu_math import exp, rotation

# Sums over lanes may be reassociated: in one compiled kernel their order is still always the same.
SUM = INNER | {"fastmath": {"contract", "reassoc", "nsz"}}


@njit(**SUM)
def dot(u: np.ndarray, v: np.ndarray) -> float:
    """The sum over the lanes of ``u v``."""
    total = u.dtype.type(0)
    for d in range(u.size):
        total += u[d] * v[d]
    return total


@njit(**INNER)
def decay(dt: np.ndarray, i: int, A: np.ndarray, a: np.ndarray) -> None:
    """``a = exp(dt_i A)`` for all N states of step ``i``: tiles ``(2, N, W)``, dt ``(T, W)``."""
    for n in range(A.shape[1]):
        for d in range(A.shape[2]):
            a[0, n, d] = exp(dt[i, d] * A[0, n, d])
        for d in range(A.shape[2]):
            c, s = rotation(dt[i, d], A[1, n, d])
            a[1, n, d] = a[0, n, d] * s
            a[0, n, d] *= c


@njit(**INNER)
def advance_complex(
    s: Sizes,
    c: Scratch,
    steps: int,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    h: np.ndarray,
    a: np.ndarray,
    y: np.ndarray,
) -> None:
    """Runs the steps: h ``(2, N, W)`` moves on, y ``(1, T, W)`` grows. B and C are overwritten where they vary."""
    dt, x, rows, width = c.dt[0], c.x[0], y[0], y.shape[2]
    for i in range(steps):
        if c.restart[i]:
            fill(h)
        decay(dt, i, A, a)
        for n in range(s.state):
            for plane in range(2):
                if s.varying_b:
                    for d in range(width):
                        B[plane, n, d] = c.B[i, 2 * n + plane]
                if s.varying_c:
                    for d in range(width):
                        C[plane, n, d] = c.C[i, 2 * n + plane]
            for d in range(width):
                real = a[0, n, d] * h[0, n, d] - a[1, n, d] * h[1, n, d] + x[i, d] * B[0, n, d]
                imag = a[0, n, d] * h[1, n, d] + a[1, n, d] * h[0, n, d] + x[i, d] * B[1, n, d]
                half = C[0, n, d] * real - C[1, n, d] * imag
                h[0, n, d] = real
                h[1, n, d] = imag
                rows[i, d] += half + half


@njit(**INNER)
def replay_complex(s: Sizes, c: Scratch, steps: int, t: Tiles, a: np.ndarray, ah: np.ndarray) -> None:
    """Runs the steps again from t.h and keeps ``a_t`` and ``a_t h_{t-1}``, both ``(T, 2, N, W)``."""
    h, u, dt, B = t.h, t.u[0], c.dt[0], t.B
    varying_b, width = s.varying_b != 0, u.shape[1]
    for i in range(steps):
        if c.restart[i]:
            fill(h)
        decay(dt, i, t.A, a[i])
        for n in range(s.state):
            for d in range(width):
                ah[i, 0, n, d] = a[i, 0, n, d] * h[0, n, d] - a[i, 1, n, d] * h[1, n, d]
                ah[i, 1, n, d] = a[i, 0, n, d] * h[1, n, d] + a[i, 1, n, d] * h[0, n, d]
            for q in range(2):
                b = c.B[i, n * 2 + q]
                for d in range(width):
                    h[q, n, d] = ah[i, q, n, d] + u[i, d] * (b if varying_b else B[q, n, d])


@njit(**INNER)
def retreat_complex(s: Sizes, c: Scratch, i: int, t: Tiles, a: np.ndarray, ah: np.ndarray) -> None:
    """Step ``i`` back: adds Re<B, G> to dx and Re<A a h, G> to ddt, leaves ``conj(a) G`` in t.G."""
    A, B, C, G, dA, dB, dC = t.A, t.B, t.C, t.G, t.grad_a, t.grad_b, t.grad_c
    u, dy, y, dx, ddt, row, dt = t.u[0], t.dy[0], t.y[0], t.dx[0], t.ddt[0], t.row, c.dt[0]
    varying_b, varying_c, width = s.varying_b != 0, s.varying_c != 0, u.shape[1]
    for n in range(s.state):
        for q in range(2):
            at = n * 2 + q
            b, r, scale = c.B[i, at], c.C[i, at], u.dtype.type(2 - 4 * q)  # y = sum over planes of +-2 C h
            for d in range(width):
                row[q, d] = ah[i, q, n, d] + u[i, d] * (b if varying_b else B[q, n, d])
            for d in range(width):
                y[i, d] += scale * (r if varying_c else C[q, n, d]) * row[q, d]
            for d in range(width):
                G[q, n, d] += scale * (r if varying_c else C[q, n, d]) * dy[i, d]
            if varying_c:
                t.step_dc[i, at] = scale * dot(dy[i], row[q])
            else:
                for d in range(width):
                    dC[q, n, d] += scale * dy[i, d] * row[q, d]
            if varying_b:
                t.step_db[i, at] = dot(u[i], G[q, n])
            else:
                for d in range(width):
                    dB[q, n, d] += u[i, d] * G[q, n, d]
            for d in range(width):
                dx[i, d] += (b if varying_b else B[q, n, d]) * G[q, n, d]
        for d in range(width):
            real, imag = G[0, n, d], G[1, n, d]
            row[0, d] = ah[i, 0, n, d] * real + ah[i, 1, n, d] * imag
            row[1, d] = ah[i, 0, n, d] * imag - ah[i, 1, n, d] * real
            G[0, n, d] = a[i, 0, n, d] * real + a[i, 1, n, d] * imag
            G[1, n, d] = a[i, 0, n, d] * imag - a[i, 1, n, d] * real
        for q in range(2):
            for d in range(width):
                ddt[i, d] += A[q, n, d] * row[q, d]
            for d in range(width):
                dA[q, n, d] += dt[i, d] * row[q, d]


@njit(**INNER)
def back_complex(s: Sizes, c: Scratch, steps: int, t: Tiles) -> None:
    """The whole chunk: t.G, t.dx, t.ddt, t.y and the sums for A, B and C."""
    shape = (t.a.shape[0], 2, s.state, t.u.shape[2])
    a, ah = t.a.reshape(shape), t.ah.reshape(shape)
    replay_complex(s, c, steps, t, a, ah)
    for i in range(steps - 1, -1, -1):
        retreat_complex(s, c, i, t, a, ah)
        if c.restart[i]:
            fill(t.G)
