"""The backward scan on the CPU: states are computed again from those saved at chunk borders, then adjoints run back.

With G_t the gradient of h_t, from its own output and from the next state (PyTorch's convention for complex tensors):

    G_t = 2 dy_t conj(C_t) + conj(a_{t+1}) G_{t+1}        (dy_t C_t + a_{t+1} G_{t+1} where A is real)
    dC_t = 2 dy_t conj(h_t)         dB_t = dt_t x_t G_t        dx_t = dt_t Re<B_t, G_t> + D dy_t
    dA = sum_t dt_t conj(a_t h_{t-1}) G_t                  ddt_t = Re<A a_t h_{t-1} + x_t B_t, G_t>

a_t h_{t-1} is kept as it is: h_t - dt_t x_t B_t would cancel.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, S sequences, Q planes, T steps of a chunk,
W lanes, R runs of sequences, J runs of blocks (parts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
    gather_rows,
    kernel,
    lanes,
    load_row,
    load_state,
    load_tile,
    make_scratch,
    sequence,
    store_state,
)
from kernels.selective_scan.cpu_math import sigmoid
from kernels.selective_scan.problem import CHUNK

# Sums over lanes may be reassociated: in one compiled kernel their order is still always the same.
SUM = INNER | {"fastmath": {"contract", "reassoc", "nsz"}}


class Adjoints(NamedTuple):
    """Gradients in and out, flat; all but ``y``, ``final`` and ``saved`` are written and start as zeros."""

    y: np.ndarray  # (B, L, K or 1, D)
    final: np.ndarray  # (S, K, D, N, Q) or empty
    saved: np.ndarray  # (slots, K, N, D, Q)
    x: np.ndarray  # (B, L, K or 1, D)
    dt: np.ndarray  # (B, L, K, D)
    z: np.ndarray  # (B, L, D) or empty
    B: np.ndarray  # (J, B, L, K, G, N, Q) where B varies over time, else (R, K, Q, N, D)
    C: np.ndarray
    A: np.ndarray  # (R, K, Q, N, D)
    D: np.ndarray  # (R, K, D)
    dt_bias: np.ndarray  # (R, K, D)
    initial: np.ndarray  # (S, K, D, N, Q)


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
    a: np.ndarray  # (T, Q, N, W)
    ah: np.ndarray  # (T, Q, N, W): a_t h_{t-1}
    u: np.ndarray  # (T, W): dt x; as all down to ddt
    dy: np.ndarray  # gated
    y: np.ndarray  # before the gate
    dx: np.ndarray
    ddt: np.ndarray
    row: np.ndarray  # (Q, W)
    step_db: np.ndarray  # (T, N Q)
    step_dc: np.ndarray
    D: np.ndarray  # (W,)
    bias: np.ndarray
    grad_d: np.ndarray
    grad_bias: np.ndarray
    sign: np.ndarray  # (Q,): y = sum over planes of sign C h


@njit(**PART)
def make_tiles(s: Sizes, v: Inputs, width: int) -> Tiles:
    """Zeros; the padding lanes of parameters and incoming gradients stay so."""
    kind, tile, rows = v.x.dtype, (s.planes, s.state, width), (CHUNK, width)
    long, entries = (CHUNK, s.planes, s.state, width), (CHUNK, s.planes * s.state)
    sign = np.ones(s.planes, kind)
    if s.planes == 2:
        sign[0], sign[1] = 2, -2
    return Tiles(
        np.zeros(tile, kind), np.zeros(tile, kind), np.zeros(tile, kind), np.zeros(tile, kind), np.zeros(tile, kind),
        np.zeros(tile, kind), np.zeros(tile, kind), np.zeros(tile, kind), np.empty(long, kind), np.empty(long, kind),
        np.zeros(rows, kind), np.zeros(rows, kind), np.zeros(rows, kind), np.zeros(rows, kind), np.zeros(rows, kind),
        np.zeros((s.planes, width), kind), np.zeros(entries, kind), np.zeros(entries, kind),
        np.zeros(width, kind), np.zeros(width, kind), np.zeros(width, kind), np.zeros(width, kind), sign,
    )  # fmt: skip


@njit(**SUM)
def dot(u: np.ndarray, v: np.ndarray) -> float:
    """The sum over the lanes of ``u v``."""
    total = u.dtype.type(0)
    for d in range(u.size):
        total += u[d] * v[d]
    return total


@njit(**INNER)
def load_saved(saved: np.ndarray, s: Sizes, slot: int, k: int, d0: int, d1: int, h: np.ndarray) -> None:
    """Slot ``slot`` of saved ``(slots, K, N, D, Q)`` to a tile, whose padding lanes become zero."""
    fill(h)
    for n in range(s.state):
        at = ((slot * s.routes + k) * s.state + n) * s.channels + d0
        for plane in range(s.planes):
            for d in range(d1 - d0):
                h[plane, n, d] = saved[(at + d) * s.planes + plane]


@njit(**INNER)
def add_tile(tile: np.ndarray, s: Sizes, r: int, k: int, d0: int, d1: int, target: np.ndarray) -> None:
    """Moves a tile into run ``r`` of ``(R, K, Q, N, D)``: short sums first, for accuracy."""
    for q in range(s.planes):
        for n in range(s.state):
            at = (((r * s.routes + k) * s.planes + q) * s.state + n) * s.channels + d0
            for d in range(d1 - d0):
                target[at + d] += tile[q, n, d]
    fill(tile)


@njit(**INNER)
def add_row(row: np.ndarray, s: Sizes, r: int, k: int, d0: int, d1: int, target: np.ndarray) -> None:
    """Moves a row into run ``r`` of ``(R, K, D)``."""
    at = (r * s.routes + k) * s.channels + d0
    for d in range(d1 - d0):
        target[at + d] += row[d]
    for d in range(row.size):
        row[d] = 0


@njit(**INNER)
def add_rows(
    rows: np.ndarray,
    place: np.ndarray,
    token: np.ndarray,
    steps: int,
    base: int,
    stride: int,
    width: int,
    target: np.ndarray,
) -> None:
    """Adds rows to ``target`` at ``base + place[i] * stride``, those of real tokens."""
    for i in range(steps):
        if token[i] >= 0:
            out = target[base + place[i] * stride :]
            for d in range(width):
                out[d] += rows[i, d]


@njit(**INNER)
def replay(s: Sizes, c: Scratch, steps: int, t: Tiles) -> None:
    """Runs the steps of a chunk again and keeps ``a_t`` and ``a_t h_{t-1}``."""
    a, ah, h, u, B = t.a, t.ah, t.h, t.u, t.B
    varying_b, planes, width = s.varying_b != 0, s.planes, u.shape[1]
    for i in range(steps):
        if c.token[i] == SKIP:
            continue
        if c.restart[i]:
            fill(h)
        decay(planes, c.dt, i, t.A, a[i])
        for d in range(width):
            u[i, d] = c.dt[i, d] * c.x[i, d]
        for n in range(s.state):
            if planes == 1:
                for d in range(width):
                    ah[i, 0, n, d] = a[i, 0, n, d] * h[0, n, d]
            else:
                for d in range(width):
                    ah[i, 0, n, d] = a[i, 0, n, d] * h[0, n, d] - a[i, 1, n, d] * h[1, n, d]
                    ah[i, 1, n, d] = a[i, 0, n, d] * h[1, n, d] + a[i, 1, n, d] * h[0, n, d]
            for q in range(planes):
                b = c.B[i, n * planes + q]
                for d in range(width):
                    h[q, n, d] = ah[i, q, n, d] + u[i, d] * (b if varying_b else B[q, n, d])


@njit(**INNER)
def retreat(s: Sizes, c: Scratch, i: int, t: Tiles) -> None:
    """One step back through all states. Leaves Re<B, G> in dx and Re<A a h, G> in ddt, ``conj(a) G`` in G."""
    A, B, C, G, dA, dB, dC = t.A, t.B, t.C, t.G, t.grad_a, t.grad_b, t.grad_c
    ah, a, u, dy, y, dx, ddt, row, dt = t.ah, t.a, t.u, t.dy, t.y, t.dx, t.ddt, t.row, c.dt
    varying_b, varying_c, planes, width = s.varying_b != 0, s.varying_c != 0, s.planes, u.shape[1]
    for n in range(s.state):
        for q in range(planes):
            at = n * planes + q
            b, r, scale = c.B[i, at], c.C[i, at], t.sign[q]
            for d in range(width):
                row[q, d] = ah[i, q, n, d] + u[i, d] * (b if varying_b else B[q, n, d])
            if s.gated:
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
        if planes == 1:
            for d in range(width):
                row[0, d] = ah[i, 0, n, d] * G[0, n, d]
                G[0, n, d] *= a[i, 0, n, d]
        else:
            for d in range(width):
                real, imag = G[0, n, d], G[1, n, d]
                row[0, d] = ah[i, 0, n, d] * real + ah[i, 1, n, d] * imag
                row[1, d] = ah[i, 0, n, d] * imag - ah[i, 1, n, d] * real
                G[0, n, d] = a[i, 0, n, d] * real + a[i, 1, n, d] * imag
                G[1, n, d] = a[i, 0, n, d] * imag - a[i, 1, n, d] * real
        for q in range(planes):
            for d in range(width):
                ddt[i, d] += A[q, n, d] * row[q, d]
            for d in range(width):
                dA[q, n, d] += dt[i, d] * row[q, d]


@njit(**PART)
def retreat_chunk(s: Sizes, c: Scratch, steps: int, t: Tiles) -> None:
    """The steps of a chunk, last one first; finishes dx and ddt."""
    x, dt, dy, y, dx, ddt, D, width = c.x, c.dt, t.dy, t.y, t.dx, t.ddt, t.D, t.u.shape[1]
    for i in range(steps - 1, -1, -1):
        if c.token[i] == SKIP:
            continue
        for d in range(width):
            y[i, d] = D[d] * x[i, d]
            dx[i, d] = 0
            ddt[i, d] = 0
        retreat(s, c, i, t)
        for d in range(width):
            ddt[i, d] = (ddt[i, d] + x[i, d] * dx[i, d]) * c.slope[i, d]
            t.grad_bias[d] += ddt[i, d]
        for d in range(width):
            dx[i, d] = dt[i, d] * dx[i, d] + D[d] * dy[i, d]
            t.grad_d[d] += dy[i, d] * x[i, d]
        if c.restart[i]:
            fill(t.G)


@njit(**PART)
def gate(s: Sizes, v: Inputs, b: int, d0: int, width: int, steps: int, token: np.ndarray, dy: np.ndarray) -> None:
    """Multiplies the rows of dy by silu(z)."""
    for i in range(steps):
        if token[i] >= 0:
            z = v.z[b * v.z_strides[0] + token[i] * v.z_strides[1] + d0 :]
            for d in range(width):
                dy[i, d] *= z[d] * sigmoid(z[d])


@njit(**PART)
def gate_gradient(
    s: Sizes, v: Inputs, b: int, k: int, d0: int, width: int, steps: int, c: Scratch, y: np.ndarray, o: Adjoints
) -> None:
    """Adds ``dy y silu'(z)`` to dz, with y before the gate."""
    routes = s.routes if s.keep else 1
    for i in range(steps):
        token = c.token[i]
        if token >= 0:
            z = v.z[b * v.z_strides[0] + token * v.z_strides[1] + d0 :]
            dy = o.y[((b * s.length + token) * routes + (k if s.keep else 0)) * s.channels + d0 :]
            out = o.z[(b * s.length + token) * s.channels + d0 :]
            for d in range(width):
                sig = sigmoid(z[d])
                out[d] += dy[d] * y[i, d] * (sig + z[d] * (sig - sig * sig))


@njit(**PART)
def backward_chunk(
    s: Sizes,
    v: Inputs,
    o: Adjoints,
    b: int,
    k: int,
    g: int,
    d0: int,
    d1: int,
    first: int,
    steps: int,
    part: int,
    c: Scratch,
    t: Tiles,
) -> None:
    """One chunk of one route: t.h holds the state before it, t.G the adjoint after it, and before it on return."""
    width, entries = d1 - d0, s.state * s.planes
    routes = s.routes if s.keep else 1
    gather(s, v, b, k, g, d0, d1, first, steps, t.bias, c, True)
    stride = routes * s.channels
    gather_rows(
        o.y,
        b * s.length * stride + (k if s.keep else 0) * s.channels + d0,
        stride,
        c.token,
        c.token,
        steps,
        width,
        t.dy,
    )
    if s.gated:
        gate(s, v, b, d0, width, steps, c.token, t.dy)
    replay(s, c, steps, t)
    retreat_chunk(s, c, steps, t)
    if s.gated:
        gate_gradient(s, v, b, k, d0, width, steps, c, t.y, o)
    stride = s.x_routes * s.channels
    at = b * s.length * stride + (k if s.x_routes > 1 else 0) * s.channels + d0
    add_rows(t.dx, c.token, c.token, steps, at, stride, width, o.x)
    stride = s.routes * s.channels
    add_rows(t.ddt, c.place, c.token, steps, b * s.length * stride + k * s.channels + d0, stride, width, o.dt)
    stride = s.routes * s.groups * entries
    at = (part * s.batch + b) * s.length * stride + (k * s.groups + g) * entries
    if s.varying_b:
        add_rows(t.step_db, c.place, c.token, steps, at, stride, entries, o.B)
    if s.varying_c:
        add_rows(t.step_dc, c.place, c.token, steps, at, stride, entries, o.C)


def _make(sources: str) -> Callable[..., None]:

    @kernel
    def backward(part: int, j0: int, j1: int, run: int, q0: int, q1: int, s: Sizes, v: Inputs, o: Adjoints) -> None:
        """Blocks ``j0:j1`` (part ``part``) of sequences ``q0:q1`` (run ``run``), all routes."""
        _ = sources
        for j in range(j0, j1):
            d0, d1 = v.blocks[j, 0], v.blocks[j, 1]
            g = d0 * s.groups // s.channels
            width = lanes(d1 - d0)
            c, t = make_scratch(s, v, width), make_tiles(s, v, width)
            for k in range(s.routes):
                load_tile(v.A, s, k, d0, d1, t.A)
                if not s.varying_b:
                    load_tile(v.B, s, k, d0, d1, t.B)
                if not s.varying_c:
                    load_tile(v.C, s, k, d0, d1, t.C)
                load_row(v.D, s, k, d0, d1, t.D)
                load_row(v.dt_bias, s, k, d0, d1, t.bias)
                for q in range(q0, q1):
                    b, start, stop, slot = sequence(s, v, q)
                    load_state(o.final, s, q, k, d0, d1, t.G)
                    for chunk in range((stop - start + CHUNK - 1) // CHUNK - 1, -1, -1):
                        done = chunk * CHUNK
                        first = stop - 1 - done if s.reverse else start + done
                        load_saved(o.saved, s, slot + chunk, k, d0, d1, t.h)
                        backward_chunk(s, v, o, b, k, g, d0, d1, first, min(CHUNK, stop - start - done), part, c, t)
                        add_tile(t.grad_a, s, run, k, d0, d1, o.A)
                        if not s.varying_b:
                            add_tile(t.grad_b, s, run, k, d0, d1, o.B)
                        if not s.varying_c:
                            add_tile(t.grad_c, s, run, k, d0, d1, o.C)
                        add_row(t.grad_d, s, run, k, d0, d1, o.D)
                        add_row(t.grad_bias, s, run, k, d0, d1, o.dt_bias)
                        flush(t.G)
                    store_state(t.G, s, q, k, d0, d1, o.initial)

    return backward


backward = _make(SOURCES)
