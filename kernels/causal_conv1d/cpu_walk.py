"""The convolution on the CPU over tokens in order, float32 or bfloat16: forward and backward in one pass over memory.

    s_q = bias + sum_w weight_w in_{q - W + 1 + w},   y_q = silu(s_q);   in_j: input at place j, state before place 0
    g_q = dy_q silu'(s_q),   d in_j = sum_w weight_w g_{j + W - 1 - w},   dweight_w = sum_q g_q in_{q - W + 1 + w}

Tables of places, which ``kernels.causal_conv1d.cpu`` follows, aren't needed where every row is one sequence. Places are
taken in tiles: inputs of a tile, and the W - 1 before it, go to scratch in float32, which stays in the first cache; the
backward also takes the W - 1 behind it, whose g it forms again. Kernels take addresses (0: absent) and bits that say
what lies there, so that one is compiled for all dtypes.

B batch, L tokens, D channels, W conv width.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.cpu_rows import SOURCES, fetch, floats, put
from kernels.jit import compiled
from kernels.selective_scan.cpu_arguments import FUSED, MATH
from kernels.selective_scan.cpu_math import sigmoid
from kernels.selective_scan.cpu_simd import WIDTH, load, pointer, replace, store

PLACES = 32  # of a tile: with its channels and their sums it lies in the processor's first cache
CHANNELS, CHANNELS_BACK = 256, 128  # at most, of a tile, forward and backward
RUN = 8 * PLACES  # places of a backward's job, which sums its own part of dweight and dbias
PAIR = 2 * WIDTH  # channels that are worked on at once
X, WEIGHT, BIAS, STATE = 1, 2, 4, 8  # bits of ``narrow``: which tensors are bfloat16
SILU, REVERSE = 1, 2  # bits of ``form``
ZERO, ONE = np.float32(0), np.float32(1)


@njit(**FUSED)
def _taps(weight, narrow, flat, target, width, channels, lanes):
    """The weight ``(D, W)`` in scratch as ``(blocks, W, lanes)``, which holds zeros; ``flat`` has room for it as is."""
    fetch(weight, narrow, 0, flat, 0, channels * width)
    for d in range(channels):
        at = d // lanes * width * lanes + d % lanes
        for w in range(width):
            target[at + w * lanes] = flat[d * width + w]


@njit(**FUSED)
def _clear(row, at, lanes):
    for d in range(0, lanes, PAIR):
        store(row, at + d, WIDTH, replace(load(row, at, WIDTH, 2), ZERO))


@njit(**FUSED)
def _input(x, steps, state, narrow, form, b, q, length, width, channels, d0, target, at, lanes, count):
    """The input at a place, or zeros, in scratch."""
    if q >= length or (q < 0 and state == 0):
        _clear(target, at, lanes)
    elif q >= 0:
        token = length - 1 - q if form & REVERSE else q
        fetch(x, narrow & X, b * steps[0] + token * steps[1] + d0, target, at, count)
    else:
        fetch(state, narrow & STATE, (b * (width - 1) + q + width - 1) * channels + d0, target, at, count)


@njit(**FUSED)
def _weighted(weight, bias, rows, at, d, width, lanes):
    """The sum at a place whose oldest input lies at ``at`` of the tile: two vectors of channels from ``d`` on."""
    s = load(bias, d, WIDTH, 2)
    for w in range(width):
        s = s + load(weight, w * lanes + d, WIDTH, 2) * load(rows, at + w * lanes + d, WIDTH, 2)
    return s


@njit(**FUSED)
def _outputs(weight, bias, rows, at, out, width, lanes, silu):
    for d in range(0, lanes, PAIR):
        s = _weighted(weight, bias, rows, at, d, width, lanes)
        store(out, d, WIDTH, s * sigmoid(s) if silu else s)


@njit(**FUSED)
def _slopes(weight, bias, rows, g, at, width, lanes):
    """g in place of dy."""
    for d in range(0, lanes, PAIR):
        s = _weighted(weight, bias, rows, at, d, width, lanes)
        sig = sigmoid(s)
        store(g, at + d, WIDTH, load(g, at + d, WIDTH, 2) * (sig * (s * (ONE - sig) + ONE)))


@njit(**FUSED)
def _gradient(weight, g, place, out, width, lanes):
    """The gradient of the input at a place, counted from that of the first g; there are none before that."""
    for d in range(0, lanes, PAIR):
        s = replace(load(g, d, WIDTH, 2), ZERO)
        for w in range(min(width, place + width)):
            s = s + load(weight, w * lanes + d, WIDTH, 2) * load(g, (place + width - 1 - w) * lanes + d, WIDTH, 2)
        store(out, d, WIDTH, s)


@njit(**FUSED)
def _products(g, rows, sums, places, width, lanes):
    """Adds a tile's part to the sums (W + 1, lanes) of dweight and dbias."""
    for d in range(0, lanes, PAIR):
        for w in range(width):
            s = load(sums, w * lanes + d, WIDTH, 2)
            for i in range(places):
                s = s + load(g, i * lanes + d, WIDTH, 2) * load(rows, (i + w) * lanes + d, WIDTH, 2)
            store(sums, w * lanes + d, WIDTH, s)
        s = load(sums, width * lanes + d, WIDTH, 2)
        for i in range(places):
            s = s + load(g, i * lanes + d, WIDTH, 2)
        store(sums, width * lanes + d, WIDTH, s)


def _make_forward(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def forward(x, steps, weight, bias, state, y, sizes, narrow, form, first, last):
        """Writes y (B, L, D), of x's dtype, of the tiles first <= j < last; state (B, W - 1, D) has the oldest first.

        sizes are L, D, W, and the lanes of a block of channels and how many blocks there are.
        """
        _ = sources
        length, channels, width, lanes, blocks = sizes
        tiles = (length + PLACES - 1) // PLACES
        taps = np.zeros(blocks * width * lanes, np.float32)
        biases, out = np.zeros(blocks * lanes, np.float32), np.empty(lanes, np.float32)
        tile = np.zeros(max((PLACES + width - 1) * lanes, channels * width + WIDTH), np.float32)
        rows, result = pointer(tile), pointer(out)
        _taps(weight, narrow & WEIGHT, rows, pointer(taps), width, channels, lanes)
        if bias != 0:
            fetch(bias, narrow & BIAS, 0, pointer(biases), 0, channels)
        for job in range(first, last):
            block, t, b = job % blocks, job // blocks % tiles, job // (blocks * tiles)
            d0, q0 = block * lanes, t * PLACES
            count, places = min(lanes, channels - d0), min(PLACES, length - q0)
            w, c = pointer(taps[block * width * lanes :]), pointer(biases[d0:])
            for i in range(places + width - 1):
                q = q0 + i - (width - 1)
                _input(x, steps, state, narrow, form, b, q, length, width, channels, d0, rows, i * lanes, lanes, count)
            for i in range(places):
                _outputs(w, c, rows, i * lanes, result, width, lanes, form & SILU)
                token = length - 1 - q0 - i if form & REVERSE else q0 + i
                put(result, 0, y, narrow & X, (b * length + token) * channels + d0, count)
        tile[0] = taps[0] + biases[0] + out[0]  # all live until here

    return forward


forward = _make_forward(SOURCES)


def _make_backward(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def backward(dy, x, steps, weight, bias, state, dx, dstate, part, sizes, narrow, form, first, last):
        """Writes dx, dstate and each job's part (W + 1, D) of dweight and dbias; a job is RUN places of a block.

        As ``forward``; dy and dx (B, L, D) are dense and of x's dtype, dstate of the state's.
        """
        _ = sources
        length, channels, width, lanes, blocks = sizes
        past = width - 1
        runs = (length + RUN - 1) // RUN
        taps = np.zeros(blocks * width * lanes, np.float32)
        biases, out = np.zeros(blocks * lanes, np.float32), np.empty(lanes, np.float32)
        tile = np.zeros(max((PLACES + 2 * past) * lanes, channels * width + WIDTH), np.float32)
        slopes, totals = np.zeros((PLACES + past) * lanes, np.float32), np.zeros((width + 1) * lanes, np.float32)
        rows, g, sums, result = pointer(tile), pointer(slopes), pointer(totals), pointer(out)
        _taps(weight, narrow & WEIGHT, rows, pointer(taps), width, channels, lanes)
        if bias != 0:
            fetch(bias, narrow & BIAS, 0, pointer(biases), 0, channels)
        for job in range(first, last):
            block, run, b = job % blocks, job // blocks % runs, job // (blocks * runs)
            d0 = block * lanes
            count = min(lanes, channels - d0)
            w, c = pointer(taps[block * width * lanes :]), pointer(biases[d0:])
            totals[:] = 0
            for q0 in range(run * RUN, min(length, (run + 1) * RUN), PLACES):
                places = min(PLACES, length - q0)
                for i in range(places + 2 * past):
                    q, at = q0 + i - past, i * lanes
                    _input(x, steps, state, narrow, form, b, q, length, width, channels, d0, rows, at, lanes, count)
                for i in range(places + past):
                    q = q0 + i
                    if q < length:
                        token = length - 1 - q if form & REVERSE else q
                        fetch(dy, narrow & X, (b * length + token) * channels + d0, g, i * lanes, count)
                        if form & SILU:
                            _slopes(w, c, rows, g, i * lanes, width, lanes)
                    else:
                        _clear(g, i * lanes, lanes)
                for i in range(places):
                    _gradient(w, g, i, result, width, lanes)
                    token = length - 1 - q0 - i if form & REVERSE else q0 + i
                    put(result, 0, dx, narrow & X, (b * length + token) * channels + d0, count)
                if q0 == 0 and dstate != 0:
                    for i in range(past):
                        _gradient(w, g, i - past, result, width, lanes)
                        put(result, 0, dstate, narrow & STATE, (b * past + i) * channels + d0, count)
                _products(g, rows, sums, places, width, lanes)
            for i in range(width + 1):
                at = (job // blocks * (width + 1) + i) * channels + d0
                put(sums, i * lanes, part, 0, at, count)
        tile[0] = taps[0] + biases[0] + out[0] + slopes[0] + totals[0]  # all live until here

    return backward


backward = _make_backward(SOURCES)


def _make_finish(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def finish(part, jobs, channels, width, dweight, weight_narrow, dbias, bias_narrow):
        """dweight (D, W) and dbias (D,), which may be absent, from their parts (jobs, W + 1, D), in a fixed order."""
        _ = sources
        parts, size = floats(part), (width + 1) * channels
        sums, rounded = np.zeros(size), np.empty(size, np.float32)
        for job in range(jobs):
            for d in range(size):
                sums[d] += parts[job * size + d]
        for d in range(channels):
            for w in range(width):
                rounded[d * width + w] = sums[w * channels + d]
        for d in range(width * channels, size):
            rounded[d] = sums[d]
        row = pointer(rounded)
        put(row, 0, dweight, weight_narrow, 0, channels * width)
        if dbias != 0:
            put(row, channels * width, dbias, bias_narrow, 0, channels)
        rounded[0] = 0  # alive until here

    return finish


finish = _make_finish(SOURCES)


def _make_last(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def last_rows(x, steps, state, out, batch, sizes, narrow, form):
        """The last W - 1 inputs (B, W - 1, D) in x's dtype, oldest first; sizes are those of ``forward``."""
        _ = sources
        length, channels, width, _, _ = sizes
        row = np.zeros((channels + PAIR - 1) // PAIR * PAIR, np.float32)
        one = pointer(row)
        for b in range(batch):
            for i in range(width - 1):
                q = length - (width - 1) + i
                _input(x, steps, state, narrow, form, b, q, length, width, channels, 0, one, 0, row.size, channels)
                put(one, 0, out, narrow & X, (b * (width - 1) + i) * channels, channels)
        row[0] = 0  # alive until here

    return last_rows


last_rows = _make_last(SOURCES)
