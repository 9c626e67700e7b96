"""What the CPU kernels of both directions share: tiles of parameters and states, one chunk of a route in scratch.

A kernel works on a block of W channels (padded to a multiple of 16 lanes) of one sequence and one route. Channels are
the contiguous axis of every tile, so that vectors of lanes are loaded and stored whole; states are tiles ``(Q, N, W)``
with Q = 2 planes (real, imaginary) where A is complex and Q = 1 where it is real. Tiles of steps are ``(J, T, V)``,
J V = W: where A is real V is one vector of 16 lanes, so that the steps of a vector lie side by side and don't push each
other out of the cache, else J is 1.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, S sequences, Q planes, T steps of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from kernels.cpu_rows import read, read_one, write, write_one
from kernels.selective_scan.cpu_arguments import FUSED, INNER, PART, Inputs, Sizes
from kernels.selective_scan.cpu_math import LIMIT, sigmoid, softplus
from kernels.selective_scan.cpu_simd import WIDTH, load, pointer, prefetch, replace, store
from kernels.selective_scan.problem import CHUNK

AHEAD = 4  # rows that are on their way from memory while one is copied
LINE = 64  # bytes of a cache line
SLOT, SKIP = -1, -2  # in place of a token: padding of a route; padding of a sequence


class Scratch(NamedTuple):
    """One chunk of one route: what each step reads, W lanes wide."""

    token: np.ndarray  # (T,) token, SLOT or SKIP
    place: np.ndarray  # (T,) where dt, B and C were read, or SLOT
    restart: np.ndarray  # (T,) 1 where the state is zeroed first
    x: np.ndarray  # (J, T, V)
    dt: np.ndarray  # (J, T, V) after bias and softplus
    slope: np.ndarray  # (J, T, V) derivative of that, ones without softplus
    z: np.ndarray  # (J, T, V)
    B: np.ndarray  # (T, N Q), where B varies over time
    C: np.ndarray


@njit(**PART)
def lanes(width: int) -> int:
    """The width of a block, padded to whole SIMD registers."""
    return (width + WIDTH - 1) // WIDTH * WIDTH


@njit(**INNER)
def new_tile(count: int, size: int, width: int, like: np.ndarray) -> np.ndarray:
    """Zeros ``(count, size, width)`` that start at a cache line: lanes that cross a line cost two accesses."""
    memory = np.zeros(count * size * width + LINE // like.itemsize, like.dtype)
    start = -memory.ctypes.data % LINE // like.itemsize
    return memory[start : start + count * size * width].reshape((count, size, width))


@njit(**INNER)
def new_rows(size: int, width: int, like: np.ndarray) -> np.ndarray:
    """Zeros ``(size, width)`` that start at a cache line."""
    return new_tile(1, size, width, like)[0]


@njit(**INNER)
def new_steps(s: Sizes, width: int, like: np.ndarray) -> np.ndarray:
    """Zeros ``(J, T, V)``."""
    lanes = WIDTH if s.planes == 1 else width
    return new_tile(width // lanes, CHUNK, lanes, like)


@njit(**PART)
def hop(tile: np.ndarray) -> int:
    """How far apart the vectors of one step are in a tile ``(J, T, V)``."""
    return CHUNK * WIDTH if tile.shape[2] == WIDTH else WIDTH


@njit(**PART)
def make_scratch(s: Sizes, v: Inputs, width: int) -> Scratch:
    """Scratch for a chunk; the padding lanes of x are zero and stay so."""
    entries = s.planes * s.padded
    return Scratch(
        np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64),
        new_steps(s, width, v.D), new_steps(s, width, v.D), new_steps(s, width, v.D), new_steps(s, width, v.D),
        new_rows(CHUNK, entries, v.D), new_rows(CHUNK, entries, v.D),
    )  # fmt: skip


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


@njit(**PART)
def load_rates(s: Sizes, v: Inputs, k: int, d0: int, d1: int, tile: np.ndarray) -> None:
    """A to a tile as ``decay`` wants it."""
    load_tile(v.A, s, k, d0, d1, tile)
    if s.planes == 1 and tile.itemsize == 4:
        for n in range(tile.shape[1]):
            for d in range(tile.shape[2]):
                rate = tile[0, n, d]
                tile[0, n, d] = LIMIT if rate > LIMIT else -LIMIT if rate < -LIMIT else rate


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
        c.restart[i] = 1 if code == 1 else 0
        c.token[i] = SKIP if code == 2 else token
        c.place[i] = SLOT if token < 0 else token if s.token_params else p


@njit(**FUSED)
def move_row(
    source: np.ndarray, start: int, gap: int, target: np.ndarray, to: int, new_gap: int, width: int, add: bool
) -> None:
    """Copies or adds ``width`` elements from ``start`` of one array, taken flat, to those from ``to`` of another.

    Vectors of 16 elements are ``gap`` elements apart in the one, ``new_gap`` in the other. Either array may be
    bfloat16, as uint16.
    """
    old, new = pointer(target), pointer(source)
    for _ in range(width // WIDTH):
        row = read(new, start)
        write(old, to, read(old, to) + row if add else row)
        start, to = start + gap, to + new_gap
    for d in range(width % WIDTH):
        one = read_one(new, start + d)
        write_one(old, to + d, read_one(old, to + d) + one if add else one)


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
    row: int,
    gap: int,
) -> None:
    """Rows of ``source`` at ``base + place[i] * stride``, zeros where there is no token.

    In ``rows`` they start every ``row`` elements; their vectors are ``gap`` elements apart.
    """
    memory, zero = pointer(source), rows.dtype.type(0)
    for i in range(steps):
        if i + AHEAD < steps:
            at = base + place[i + AHEAD] * stride
            for d in range(0, width, WIDTH):
                prefetch(memory, at + d)
        if token[i] < 0:
            for d in range(width):
                write_one(pointer(rows), i * row + d // WIDTH * gap + d % WIDTH, zero)
        else:
            move_row(source, base + place[i] * stride, WIDTH, rows, i * row, gap, width, False)


@njit(**INNER)
def gather_steps(
    source: np.ndarray,
    base: int,
    stride: int,
    place: np.ndarray,
    token: np.ndarray,
    steps: int,
    width: int,
    tile: np.ndarray,
) -> None:
    """``gather_rows`` to a tile of steps."""
    gather_rows(source, base, stride, place, token, steps, width, tile, tile.shape[2], hop(tile))


@njit(**INNER)
def activate(
    on: int, steps: int, token: np.ndarray, bias: np.ndarray, dt: np.ndarray, slope: np.ndarray, slopes: bool
) -> None:
    """dt from raw dt in place, and where ``slopes`` its derivative; both are zero at a token to skip.

    A step of dt = 0 changes no state: exp(0) = 1 and dt B x = 0.
    """
    lanes = dt.shape[2]
    for j in range(dt.shape[0]):
        for i in range(steps):
            for d in range(0, lanes, WIDTH):
                at = (j * CHUNK + i) * lanes + d
                raw = load(dt, at, 0, 1) + load(bias, j * lanes + d, 0, 1)
                if token[i] == SKIP:
                    store(dt, at, 0, replace(raw, dt.dtype.type(0)))
                    store(slope, at, 0, replace(raw, dt.dtype.type(0)))
                    continue
                store(dt, at, 0, softplus(raw) if on else raw)
                if slopes:
                    store(slope, at, 0, sigmoid(raw) if on else replace(raw, dt.dtype.type(1)))


@njit(**PART)
def gather_states(s: Sizes, v: Inputs, b: int, k: int, g: int, steps: int, c: Scratch) -> None:
    """Reads B and C of the steps of ``gather_tokens``, where they vary."""
    if s.varying_b:
        at = b * v.B_strides[0] + k * v.B_strides[2] + g * v.B_strides[3]
        gather_rows(v.B, at, v.B_strides[1], c.place, c.token, steps, s.state * s.planes, c.B, c.B.shape[1], WIDTH)
    if s.varying_c:
        at = b * v.C_strides[0] + k * v.C_strides[2] + g * v.C_strides[3]
        gather_rows(v.C, at, v.C_strides[1], c.place, c.token, steps, s.state * s.planes, c.C, c.C.shape[1], WIDTH)


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
    gather_steps(v.x, at, v.x_strides[1], c.token, c.token, steps, d1 - d0, c.x)
    at = b * v.dt_strides[0] + k * v.dt_strides[2] + d0
    gather_steps(v.dt, at, v.dt_strides[1], c.place, c.token, steps, d1 - d0, c.dt)
    activate(s.softplus, steps, c.token, bias, c.dt, c.slope, slopes)
    if s.gated:
        at = b * v.z_strides[0] + d0
        gather_steps(v.z, at, v.z_strides[1], c.token, c.token, steps, d1 - d0, c.z)
    gather_states(s, v, b, k, g, steps, c)
