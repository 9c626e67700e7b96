"""What the CPU kernels of both directions share: their arguments, and one chunk of a route gathered into scratch.

A kernel works on a block of W channels (padded to a multiple of 16 lanes) of one sequence and one route. Channels are
the contiguous axis of every tile, so that the inner loops are SIMD; states are tiles ``(Q, N, W)`` with Q = 2 planes
(real, imaginary) where A is complex and Q = 1 where it is real.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, S sequences, Q planes, T steps of a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kernels.selective_scan.cpu_math import MATH, exp, rotation, sigmoid, softplus
from kernels.selective_scan.problem import CHUNK

# Functions that only kernels call: without the wrappers for Python, which take longer to compile than they do.
INNER: Any = {**MATH, "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Parts of one kernel: compiled with it, not once alone and once more inside it.
PART: Any = {**MATH, "inline": "always"}
SLOT, SKIP = -1, -2  # in place of a token: padding of a route; padding of a sequence
# What the kernels are made of. Numba keys its disk cache by the file of the kernel itself and by the values that the
# kernel closes over, so each kernel closes over this: an edit of any of these files compiles it again.
SOURCES = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("cpu_*.py")))).hexdigest()


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compiles a kernel on its first call, and keeps it on disk where a folder can be written."""
    options = {**MATH, "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return njit(**options)(function)


class Sizes(NamedTuple):
    """Numbers and switches (0 or 1) of one call."""

    batch: int
    length: int
    positions: int
    routes: int
    x_routes: int  # K, or 1 where all routes read the same x
    channels: int
    state: int
    groups: int
    planes: int
    routed: int
    token_params: int
    coded: int
    packed: int
    softplus: int
    reverse: int
    gated: int
    keep: int
    varying_b: int  # B varies over time, else (K, Q, N, D)
    varying_c: int


class Inputs(NamedTuple):
    """Inputs as flat arrays with the strides of all axes but the last one, which is contiguous.

    x (B, L, K), dt (B, L, K), z (B, L), B and C (B, L, K, G); A, constant B and constant C lie as ``(K, Q, N, D)``,
    the initial state as ``(S, K, D, N, Q)``, D and dt_bias as ``(K, D)``. Absent ones are zeros.
    """

    x: np.ndarray
    x_strides: tuple[int, int, int]
    dt: np.ndarray
    dt_strides: tuple[int, int, int]
    z: np.ndarray
    z_strides: tuple[int, int]
    A: np.ndarray
    B: np.ndarray
    B_strides: tuple[int, int, int, int]
    C: np.ndarray
    C_strides: tuple[int, int, int, int]
    D: np.ndarray
    dt_bias: np.ndarray
    initial: np.ndarray
    route: np.ndarray  # (K, P)
    code: np.ndarray  # (B, K, P)
    bounds: np.ndarray  # (S + 1,) int64
    blocks: np.ndarray  # (blocks, 2) first and last + 1 channel; none crosses a group


class Scratch(NamedTuple):
    """One chunk of one route: what each step reads, W lanes wide."""

    token: np.ndarray  # (T,) token, SLOT or SKIP
    place: np.ndarray  # (T,) where dt, B and C were read, or SLOT
    restart: np.ndarray  # (T,) whether the state is zeroed first
    x: np.ndarray  # (T, W)
    dt: np.ndarray  # (T, W) after bias and softplus
    slope: np.ndarray  # (T, W) derivative of that, ones without softplus
    B: np.ndarray  # (T, N Q), where B varies over time
    C: np.ndarray


@njit(**PART)
def lanes(width: int) -> int:
    """The width of a block, padded to whole SIMD registers."""
    return (width + 15) // 16 * 16


@njit(**PART)
def make_scratch(s: Sizes, v: Inputs, width: int) -> Scratch:
    """Scratch for a chunk; the padding lanes of x are zero and stay so."""
    kind = v.x.dtype
    entries = s.planes * s.state
    return Scratch(
        np.empty(CHUNK, np.int64),
        np.empty(CHUNK, np.int64),
        np.empty(CHUNK, np.bool_),
        np.zeros((CHUNK, width), kind),
        np.zeros((CHUNK, width), kind),
        np.ones((CHUNK, width), kind),
        np.empty((CHUNK, entries), kind),
        np.empty((CHUNK, entries), kind),
    )


@njit(**PART)
def sequence(s: Sizes, v: Inputs, q: int) -> tuple[int, int, int, int]:
    """Row, first position, end position and first saved slot of sequence ``q``."""
    if s.packed:
        start = v.bounds[q]
        return 0, start, v.bounds[q + 1], start // CHUNK + q
    return q, 0, s.positions, q * ((s.positions + CHUNK - 1) // CHUNK)


@njit(**INNER)
def load_tile(source: np.ndarray, s: Sizes, k: int, d0: int, d1: int, tile: np.ndarray) -> None:
    """Channels ``d0:d1`` of a flat ``(K, Q, N, D)`` to a tile, whose padding lanes are zero."""
    for q in range(s.planes):
        for n in range(s.state):
            at = ((k * s.planes + q) * s.state + n) * s.channels + d0
            for d in range(d1 - d0):
                tile[q, n, d] = source[at + d]


@njit(**INNER)
def load_row(source: np.ndarray, s: Sizes, k: int, d0: int, d1: int, row: np.ndarray) -> None:
    """Channels ``d0:d1`` of a flat ``(K, D)`` to a row, whose padding lanes are zero."""
    for d in range(d1 - d0):
        row[d] = source[k * s.channels + d0 + d]


@njit(**INNER)
def fill(tile: np.ndarray) -> None:
    """Sets a tile to zero."""
    for q in range(tile.shape[0]):
        for n in range(tile.shape[1]):
            for d in range(tile.shape[2]):
                tile[q, n, d] = 0


@njit(**INNER)
def flush(tile: np.ndarray) -> None:
    """Sets denormals to zero. A state that only decays would stay one, and each step would be 20 times as slow."""
    tiny = np.finfo(tile.dtype).tiny
    for q in range(tile.shape[0]):
        for n in range(tile.shape[1]):
            for d in range(tile.shape[2]):
                if abs(tile[q, n, d]) < tiny:
                    tile[q, n, d] = 0


@njit(**INNER)
def load_state(source: np.ndarray, s: Sizes, q: int, k: int, d0: int, d1: int, h: np.ndarray) -> None:
    """Sequence ``q`` of states ``(S, K, D, N, Q)`` to a tile; zeros in the padding lanes."""
    fill(h)
    if source.size == 0:
        return
    for d in range(d0, d1):
        at = ((q * s.routes + k) * s.channels + d) * s.state * s.planes
        for n in range(s.state):
            for plane in range(s.planes):
                h[plane, n, d - d0] = source[at + n * s.planes + plane]


@njit(**INNER)
def store_state(h: np.ndarray, s: Sizes, q: int, k: int, d0: int, d1: int, target: np.ndarray) -> None:
    """A tile to sequence ``q`` of states ``(S, K, D, N, Q)``."""
    for d in range(d0, d1):
        at = ((q * s.routes + k) * s.channels + d) * s.state * s.planes
        for n in range(s.state):
            for plane in range(s.planes):
                target[at + n * s.planes + plane] = h[plane, n, d - d0]


@njit(**PART)
def gather_tokens(s: Sizes, v: Inputs, b: int, k: int, first: int, steps: int, c: Scratch) -> None:
    """Which token each of ``steps`` positions is, the first position being ``first``, in scan order."""
    for i in range(steps):
        p = first - i if s.reverse else first + i
        token = np.int64(v.route[k, p]) if s.routed else p
        code = v.code[b, k, p] if s.coded else 0
        c.restart[i] = code == 1
        c.token[i] = SKIP if code == 2 else token
        c.place[i] = SLOT if token < 0 else token if s.token_params else p


@njit(**INNER)
def gather_rows(
    source: np.ndarray,
    base: int,
    stride: int,
    place: np.ndarray,
    token: np.ndarray,
    steps: int,
    width: int,
    rows: np.ndarray,
) -> None:
    """Rows of ``source`` at ``base + place[i] * stride``, zeros where there is no token."""
    for i in range(steps):
        if token[i] < 0:
            for d in range(width):
                rows[i, d] = 0
        else:
            row = source[base + place[i] * stride :]
            for d in range(width):
                rows[i, d] = row[d]


@njit(**INNER)
def activate(on: int, steps: int, bias: np.ndarray, dt: np.ndarray, slope: np.ndarray, slopes: bool) -> None:
    """dt from raw dt in place, and where ``slopes`` its derivative."""
    for i in range(steps):
        for d in range(bias.size):
            dt[i, d] += bias[d]
        if on and slopes:
            for d in range(bias.size):
                slope[i, d] = sigmoid(dt[i, d])
        if on:
            for d in range(bias.size):
                dt[i, d] = softplus(dt[i, d])


@njit(**PART)
def gather(
    s: Sizes,
    v: Inputs,
    b: int,
    k: int,
    g: int,
    d0: int,
    d1: int,
    first: int,
    steps: int,
    bias: np.ndarray,
    c: Scratch,
    slopes: bool,
) -> None:
    """Reads ``steps`` positions, the first at ``first``, in scan order; ``slopes`` wants the derivative of dt too."""
    gather_tokens(s, v, b, k, first, steps, c)
    at = b * v.x_strides[0] + k * v.x_strides[2] + d0
    gather_rows(v.x, at, v.x_strides[1], c.token, c.token, steps, d1 - d0, c.x)
    at = b * v.dt_strides[0] + k * v.dt_strides[2] + d0
    gather_rows(v.dt, at, v.dt_strides[1], c.place, c.token, steps, d1 - d0, c.dt)
    activate(s.softplus, steps, bias, c.dt, c.slope, slopes)
    if s.varying_b:
        at = b * v.B_strides[0] + k * v.B_strides[2] + g * v.B_strides[3]
        gather_rows(v.B, at, v.B_strides[1], c.place, c.token, steps, s.state * s.planes, c.B)
    if s.varying_c:
        at = b * v.C_strides[0] + k * v.C_strides[2] + g * v.C_strides[3]
        gather_rows(v.C, at, v.C_strides[1], c.place, c.token, steps, s.state * s.planes, c.C)


@njit(**INNER)
def decay(planes: int, dt: np.ndarray, i: int, A: np.ndarray, a: np.ndarray) -> None:
    """``a = exp(dt_i A)`` for all N states of step ``i``: tiles ``(Q, N, W)``, dt ``(T, W)``."""
    for n in range(A.shape[1]):
        for d in range(A.shape[2]):
            a[0, n, d] = exp(dt[i, d] * A[0, n, d])
        if planes == 2:
            for d in range(A.shape[2]):
                c, s = rotation(dt[i, d], A[1, n, d])
                a[1, n, d] = a[0, n, d] * s
                a[0, n, d] *= c
