"""The forward scan on the CPU: one numba kernel that runs a block of channels through sequences and routes.

    a_t = exp(dt_t A),  h_t = a_t h_{t-1} + dt_t x_t B_t,  y_t = <C_t, h_t> + D x_t   (y_t = 2 Re<C_t, h_t> + D x_t)

B batch, L tokens, D channels, N state, K routes, P scan positions, S sequences, Q planes, T steps of a chunk, W lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from kernels.cpu_rows import SOURCES
from kernels.selective_scan.cpu_arguments import FUSED, GROUP, INNER, PART, Inputs, Sizes, kernel
from kernels.selective_scan.cpu_chunk import (
    Scratch,
    flush,
    gather,
    hop,
    lanes,
    load_rates,
    load_row,
    load_state,
    load_tile,
    make_scratch,
    move_row,
    new_rows,
    new_steps,
    new_tile,
    sequence,
    store_state,
)
from kernels.selective_scan.cpu_complex import advance_complex
from kernels.selective_scan.cpu_math import decay, in_base_two, sigmoid
from kernels.selective_scan.cpu_plain import begin_plain, end_plain, is_plain
from kernels.selective_scan.cpu_simd import WIDTH, apart, load, pointer, replace, spread, store
from kernels.selective_scan.cpu_simd_math import add_products, with_denormals, without_denormals
from kernels.selective_scan.problem import CHUNK


@njit(**INNER)
def save(h: np.ndarray, s: Sizes, slot: int, k: int, d0: int, d1: int, saved: np.ndarray) -> None:
    """A tile to slot ``slot`` of saved ``(slots, K, N, D, Q)``."""
    for n in range(s.state):
        at = ((slot * s.routes + k) * s.state + n) * s.channels + d0
        if s.planes == 1:
            move_row(h, n * h.shape[2], WIDTH, saved, at, WIDTH, d1 - d0, False)
        else:
            for plane in range(2):
                for d in range(d1 - d0):
                    saved[(at + d) * 2 + plane] = h[plane, n, d]


@njit(**INNER)
def prepare(s: Sizes, c: Scratch, steps: int, D: np.ndarray, y: np.ndarray) -> None:
    """Starts y with D x, turns x into dt x, and for real A dt and its slope into what ``decay`` wants."""
    lanes, xs, dts, lows = y.shape[2], pointer(c.x), pointer(c.dt), pointer(c.slope)
    for j in range(y.shape[0]):
        for d in range(0, lanes, WIDTH):
            row = load(D, j * lanes + d, 0, 1)
            for at in range(j * CHUNK * lanes + d, (j * CHUNK + steps) * lanes + d, lanes):
                x, dt = load(xs, at, 0, 1), load(dts, at, 0, 1)
                store(y, at, 0, row * x)
                store(xs, at, 0, dt * x)
                if s.planes == 1:
                    high, low = in_base_two(dt)
                    store(dts, at, 0, high)
                    store(lows, at, 0, low)


@njit(**INNER)
def advance_real(
    s: Sizes, c: Scratch, steps: int, A: np.ndarray, B: np.ndarray, C: np.ndarray, h: np.ndarray, y: np.ndarray
) -> None:
    """Runs the steps of a chunk, ``GROUP`` states of 16 channels at a time: h moves on, y ``(J, T, 16)`` grows."""
    apart()
    for j in range(y.shape[0]):
        for n in range(0, s.padded, GROUP):
            walk(s, c, steps, n, j, A, pointer(B), pointer(C), h, pointer(y), y.shape[0] * WIDTH)


@njit(**FUSED)
def walk(
    s: Sizes,
    c: Scratch,
    steps: int,
    n: int,
    j: int,
    rates: np.ndarray,
    B: Any,
    C: Any,
    states: np.ndarray,
    y: Any,
    width: int,
) -> None:
    """Runs a chunk with the states from ``n`` on of vector ``j`` of the channels in registers."""
    dt, u, rows_b, rows_c, restart = pointer(c.dt), pointer(c.x), pointer(c.B), pointer(c.C), pointer(c.restart)
    low, tile, first = pointer(c.slope), n * width + j * WIDTH, j * CHUNK * WIDTH
    rate, h = load(rates, tile, width, GROUP), load(states, tile, width, GROUP)
    for i in range(steps):
        at = first + i * WIDTH
        if restart[i] != 0:
            h = replace(h, states.dtype.type(0))
        # Constant B and C are loaded at each step: they have no registers left.
        b = spread(rows_b, i * s.padded + n, h) if s.varying_b else load(B, tile, width, h)
        r = spread(rows_c, i * s.padded + n, h) if s.varying_c else load(C, tile, width, h)
        h = decay(load(dt, at, 0, 1), load(low, at, 0, 1), rate) * h + load(u, at, 0, 1) * b
        store(y, at, 0, add_products(load(y, at, 0, 1), h, r))
    store(states, tile, width, h)


@njit(**PART)
def is_shared(s: Sizes, A: np.ndarray) -> bool:
    """Whether all states of each channel decay alike, as in state space duality: one exponential does for all."""
    shared = s.state > 1
    for n in range(1, s.state):
        for d in range(A.shape[2]):
            shared = shared and A[0, n, d] == A[0, 0, d]
    return shared


@njit(**INNER)
def advance_shared(
    s: Sizes, c: Scratch, steps: int, A: np.ndarray, B: np.ndarray, C: np.ndarray, h: np.ndarray, y: np.ndarray
) -> None:
    """``advance_real`` where ``is_shared``; the decays of a chunk take the place of dt's low parts."""
    apart()
    for j in range(y.shape[0]):
        rate = load(A, j * WIDTH, 0, 1)
        for at in range(j * CHUNK * WIDTH, (j * CHUNK + steps) * WIDTH, WIDTH):
            store(c.slope, at, 0, decay(load(c.dt, at, 0, 1), load(c.slope, at, 0, 1), rate))
        for n in range(0, s.padded, GROUP):
            walk_shared(s, c, steps, n, j, pointer(B), pointer(C), h, pointer(y), y.shape[0] * WIDTH)


@njit(**FUSED)
def walk_shared(
    s: Sizes, c: Scratch, steps: int, n: int, j: int, B: Any, C: Any, states: np.ndarray, y: Any, width: int
) -> None:
    """``walk`` with the decays of ``advance_shared``."""
    decays, u, rows_b, rows_c, restart = (
        pointer(c.slope), pointer(c.x), pointer(c.B), pointer(c.C), pointer(c.restart),
    )  # fmt: skip
    tile, first = n * width + j * WIDTH, j * CHUNK * WIDTH
    h = load(states, tile, width, GROUP)
    for i in range(steps):
        at = first + i * WIDTH
        if restart[i] != 0:
            h = replace(h, states.dtype.type(0))
        b = spread(rows_b, i * s.padded + n, h) if s.varying_b else load(B, tile, width, h)
        r = spread(rows_c, i * s.padded + n, h) if s.varying_c else load(C, tile, width, h)
        h = load(decays, at, 0, 1) * h + load(u, at, 0, 1) * b
        store(y, at, 0, add_products(load(y, at, 0, 1), h, r))
    store(states, tile, width, h)


@njit(**PART)
def put(s: Sizes, b: int, k: int, d0: int, width: int, steps: int, c: Scratch, rows: Any, y: Any) -> None:
    """Adds rows, gated, to their tokens of y ``(B, L, K or 1, D)``: gating each route is gating their sum."""
    routes, lanes = s.routes if s.keep else 1, rows.shape[2]
    for i in range(steps):
        token = c.token[i]
        if token < 0:
            continue
        if s.gated:
            for j in range(rows.shape[0]):
                start = (j * CHUNK + i) * lanes
                for at in range(start, start + lanes, WIDTH):
                    z = load(c.z, at, 0, 1)
                    store(rows, at, 0, load(rows, at, 0, 1) * (z * sigmoid(z)))
        at = ((b * s.length + token) * routes + (k if s.keep else 0)) * s.channels + d0
        move_row(rows, i * lanes, hop(rows), y, at, WIDTH, width, s.once == 0)


def _make(sources: str, planes: int) -> Callable[..., None]:
    """The kernel for real A, one plane, or complex A, two: numba compiles only the branch for these planes."""

    @kernel
    def forward(
        j0: int, j1: int, q0: int, q1: int, s: Sizes, v: Inputs, y: np.ndarray, final: np.ndarray, saved: np.ndarray
    ) -> None:
        """Blocks ``j0:j1`` of sequences ``q0:q1``, all routes.

        Writes y ``(B, L, K or 1, D)`` (zeros at first), final ``(S, K, D, N, Q)`` and saved
        ``(slots, K, N, D, Q)``, all flat.
        """
        _ = sources
        denormals = without_denormals()
        for j in range(j0, j1):
            d0, d1 = v.blocks[j, 0], v.blocks[j, 1]
            g = d0 * s.groups // s.channels
            width = lanes(d1 - d0)
            A, B = new_tile(s.planes, s.padded, width, v.D), new_tile(s.planes, s.padded, width, v.D)
            C, h = new_tile(s.planes, s.padded, width, v.D), new_tile(s.planes, s.padded, width, v.D)
            bias, D, y_rows = new_rows(1, width, v.D)[0], new_rows(1, width, v.D)[0], new_steps(s, width, v.D)
            c, a = make_scratch(s, v, width), new_tile(s.planes, s.padded, width, v.D)
            for k in range(s.routes):
                load_rates(s, v, k, d0, d1, A)
                shared = is_shared(s, A)
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
                        plain = is_plain(s, d1 - d0)
                        if plain:
                            begin_plain(s, v, b, g, d0, first, steps, bias, D, c, y_rows)
                        else:
                            gather(s, v, b, k, g, d0, d1, first, steps, bias, c, False)
                            prepare(s, c, steps, D, y_rows)
                        if planes == 1 and shared:
                            advance_shared(s, c, steps, A, B, C, h, y_rows)
                        elif planes == 1:
                            advance_real(s, c, steps, A, B, C, h, y_rows)
                        else:
                            advance_complex(s, c, steps, A, B, C, h, a, y_rows)
                        if plain:
                            end_plain(s, v, b, d0, first, steps, y_rows, y)
                        else:
                            put(s, b, k, d0, d1 - d0, steps, c, y_rows, y)
                    store_state(h, s, q, k, d0, d1, final)
        with_denormals(denormals)

    return forward


forward_real, forward_complex = _make(SOURCES, 1), _make(SOURCES, 2)
