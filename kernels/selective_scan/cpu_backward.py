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

from kernels.cpu_rows import SOURCES
from kernels.selective_scan.cpu_adjoint import Tiles, back_real, make_tiles
from kernels.selective_scan.cpu_arguments import INNER, PART, Inputs, Sizes, kernel
from kernels.selective_scan.cpu_chunk import (
    Scratch,
    fill,
    flush,
    gather,
    gather_steps,
    hop,
    lanes,
    load_rates,
    load_row,
    load_state,
    load_tile,
    make_scratch,
    move_row,
    sequence,
    store_state,
)
from kernels.selective_scan.cpu_complex import back_complex
from kernels.selective_scan.cpu_math import in_base_two, sigmoid
from kernels.selective_scan.cpu_simd import WIDTH, load, replace, store
from kernels.selective_scan.cpu_simd_math import with_denormals, without_denormals
from kernels.selective_scan.problem import CHUNK


class Adjoints(NamedTuple):
    """Gradients in and out, flat; all but ``y``, ``final`` and ``saved`` are written. They start as zeros,
    but for x, dt and z where every token is written once."""

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


@njit(**INNER)
def load_saved(saved: np.ndarray, s: Sizes, slot: int, k: int, d0: int, d1: int, h: np.ndarray) -> None:
    """Slot ``slot`` of saved ``(slots, K, N, D, Q)`` to a tile, whose padding lanes become zero."""
    fill(h)
    for n in range(s.state):
        at = ((slot * s.routes + k) * s.state + n) * s.channels + d0
        if s.planes == 1:
            move_row(saved, at, WIDTH, h, n * h.shape[2], WIDTH, d1 - d0, False)
        else:
            for plane in range(2):
                for d in range(d1 - d0):
                    h[plane, n, d] = saved[(at + d) * 2 + plane]


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
    row: int,
    gap: int,
    place: np.ndarray,
    token: np.ndarray,
    steps: int,
    base: int,
    stride: int,
    width: int,
    once: int,
    target: np.ndarray,
) -> None:
    """Adds rows to ``target`` at ``base + place[i] * stride``, those of real tokens; ``once``: writes them.

    The rows start every ``row`` elements, their vectors are ``gap`` elements apart.
    """
    for i in range(steps):
        if token[i] >= 0:
            move_row(rows, i * row, gap, target, base + place[i] * stride, WIDTH, width, once == 0)


@njit(**INNER)
def add_steps(
    tile: np.ndarray,
    place: np.ndarray,
    token: np.ndarray,
    steps: int,
    base: int,
    stride: int,
    width: int,
    once: int,
    target: np.ndarray,
) -> None:
    """``add_rows`` of a tile of steps."""
    add_rows(tile, tile.shape[2], hop(tile), place, token, steps, base, stride, width, once, target)


@njit(**INNER)
def open_chunk(s: Sizes, c: Scratch, steps: int, t: Tiles) -> None:
    """dt x, and what the sums over states start from: D x for y, zero for dx and ddt. Gates dy, begins dz."""
    none, lanes = t.D.dtype.type(0), t.u.shape[2]
    for j in range(t.u.shape[0]):
        for d in range(0, lanes, WIDTH):
            D = load(t.D, j * lanes + d, 0, 1)
            for at in range(j * CHUNK * lanes + d, (j * CHUNK + steps) * lanes + d, lanes):
                x, dt = load(c.x, at, 0, 1), load(c.dt, at, 0, 1)
                store(t.u, at, 0, dt * x)
                high, low = in_base_two(dt)
                store(t.turns, at, 0, high)
                store(t.low, at, 0, low)
                store(t.y, at, 0, D * x)
                store(t.dx, at, 0, replace(x, none))
                store(t.ddt, at, 0, replace(x, none))
                if s.gated:
                    z, dy = load(c.z, at, 0, 1), load(t.dy, at, 0, 1)
                    sig = sigmoid(z)
                    store(t.dy, at, 0, dy * (z * sig))
                    store(t.dz, at, 0, dy * (z * (sig - sig * sig) + sig))


@njit(**INNER)
def close_chunk(s: Sizes, c: Scratch, steps: int, t: Tiles) -> None:
    """Finishes dx, ddt and dz from <B, G>, <A a h, G> and y; adds to the sums for D and dt_bias."""
    lanes = t.u.shape[2]
    for j in range(t.u.shape[0]):
        for d in range(0, lanes, WIDTH):
            to = j * lanes + d
            D, grad_d, grad_bias = load(t.D, to, 0, 1), load(t.grad_d, to, 0, 1), load(t.grad_bias, to, 0, 1)
            for at in range(j * CHUNK * lanes + d, (j * CHUNK + steps) * lanes + d, lanes):
                x, dy, dx = load(c.x, at, 0, 1), load(t.dy, at, 0, 1), load(t.dx, at, 0, 1)
                ddt = (load(t.ddt, at, 0, 1) + x * dx) * load(c.slope, at, 0, 1)
                store(t.ddt, at, 0, ddt)
                store(t.dx, at, 0, load(c.dt, at, 0, 1) * dx + D * dy)
                grad_d = grad_d + dy * x
                grad_bias = grad_bias + ddt
                if s.gated:
                    store(t.dz, at, 0, load(t.dz, at, 0, 1) * load(t.y, at, 0, 1))
            store(t.grad_d, to, 0, grad_d)
            store(t.grad_bias, to, 0, grad_bias)


@njit(**PART)
def begin(
    s: Sizes, v: Inputs, o: Adjoints, b: int, k: int, g: int, d0: int, d1: int, first: int, steps: int, c: Scratch,
    t: Tiles,
) -> None:  # fmt: skip
    """Reads a chunk of one route and its dy."""
    routes = s.routes if s.keep else 1
    gather(s, v, b, k, g, d0, d1, first, steps, t.bias, c, True)
    stride = routes * s.channels
    at = b * s.length * stride + (k if s.keep else 0) * s.channels + d0
    gather_steps(o.y, at, stride, c.token, c.token, steps, d1 - d0, t.dy)
    open_chunk(s, c, steps, t)


@njit(**PART)
def finish(
    s: Sizes, o: Adjoints, b: int, k: int, g: int, d0: int, d1: int, steps: int, part: int, c: Scratch, t: Tiles
) -> None:
    """Writes the gradients of a chunk's tokens."""
    width, entries = d1 - d0, s.state * s.planes
    close_chunk(s, c, steps, t)
    if s.gated:
        at = b * s.length * s.channels + d0
        add_steps(t.dz, c.token, c.token, steps, at, s.channels, width, s.once, o.z)
    stride = s.x_routes * s.channels
    at = b * s.length * stride + (k if s.x_routes > 1 else 0) * s.channels + d0
    add_steps(t.dx, c.token, c.token, steps, at, stride, width, s.once, o.x)
    stride = s.routes * s.channels
    at = b * s.length * stride + k * s.channels + d0
    add_steps(t.ddt, c.place, c.token, steps, at, stride, width, s.once, o.dt)
    stride = s.routes * s.groups * entries
    at = (part * s.batch + b) * s.length * stride + (k * s.groups + g) * entries
    if s.varying_b:
        add_rows(t.step_db, t.step_db.shape[1], WIDTH, c.place, c.token, steps, at, stride, entries, 0, o.B)
    if s.varying_c:
        add_rows(t.step_dc, t.step_dc.shape[1], WIDTH, c.place, c.token, steps, at, stride, entries, 0, o.C)


def _make(sources: str, planes: int) -> Callable[..., None]:
    """The kernel for real A, one plane, or complex A, two: numba compiles only the branch for these planes."""

    @kernel
    def backward(part: int, j0: int, j1: int, run: int, q0: int, q1: int, s: Sizes, v: Inputs, o: Adjoints) -> None:
        """Blocks ``j0:j1`` (part ``part``) of sequences ``q0:q1`` (run ``run``), all routes."""
        _ = sources
        denormals = without_denormals()
        for j in range(j0, j1):
            d0, d1 = v.blocks[j, 0], v.blocks[j, 1]
            g = d0 * s.groups // s.channels
            width = lanes(d1 - d0)
            c, t = make_scratch(s, v, width), make_tiles(s, v, width)
            for k in range(s.routes):
                load_rates(s, v, k, d0, d1, t.A)
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
                        steps = min(CHUNK, stop - start - done)
                        begin(s, v, o, b, k, g, d0, d1, first, steps, c, t)
                        if planes == 1:
                            back_real(s, c, steps, t)
                        else:
                            back_complex(s, c, steps, t)
                        finish(s, o, b, k, g, d0, d1, steps, part, c, t)
                        add_tile(t.grad_a, s, run, k, d0, d1, o.A)
                        if not s.varying_b:
                            add_tile(t.grad_b, s, run, k, d0, d1, o.B)
                        if not s.varying_c:
                            add_tile(t.grad_c, s, run, k, d0, d1, o.C)
                        add_row(t.grad_d, s, run, k, d0, d1, o.D)
                        add_row(t.grad_bias, s, run, k, d0, d1, o.dt_bias)
                        flush(t.G)
                    store_state(t.G, s, q, k, d0, d1, o.initial)
        with_denormals(denormals)

    return backward


backward_real, backward_complex = _make(SOURCES, 1), _make(SOURCES, 2)
