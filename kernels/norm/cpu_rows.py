"""The norms on the CPU of rows of float32 or bfloat16: forward and backward in one pass over memory each.

    s = x + residual,   u = s, or s gate with the gate first,   n = (u - mean) rstd,   o = n weight + bias
    y = o, or o gate;   gate = silu(z);   RMSNorm's mean is 0
    do = dy, or dy gate;   dn = do weight;   du = rstd (dn - mean(dn) - n mean(dn n)), without mean(dn) for RMSNorm
    dweight = sum do n,   dbias = sum do,   ds = du, or du gate,   dz = silu'(z) times dy o, or du s

A row is a group of channels: its numbers go to scratch in float32, padded with zeros to whole vectors of lanes, and
stay in the first cache. Kernels take addresses (0: absent) and bits that say what lies there, so that one is compiled
for all dtypes and options.

D channels of a group, G groups, M rows with statistics of their own.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.cpu_rows import SOURCES, fetch, floats, put
from kernels.jit import compiled
from kernels.selective_scan.cpu_arguments import FUSED, MATH
from kernels.selective_scan.cpu_math import sigmoid
from kernels.selective_scan.cpu_simd import WIDTH, lane_sum, load, pointer, replace, store, total

ROWS = 128  # of a job; a job sums its own part of dweight and dbias
PAIR = 2 * WIDTH  # lanes that are worked on at once: two chains of sums
# bits of ``narrow``: which tensors are bfloat16
X, RESIDUAL, Z, WEIGHT, BIAS, SUM, ADD = 1, 2, 4, 8, 16, 32, 64
# bits of ``form``
LAYER, GATE_FIRST, GATE_LAST = 1, 2, 4
ZERO, ONE = np.float32(0), np.float32(1)


@njit(**FUSED)
def _begin(address, narrow, at, row, size, lanes):
    """A row of memory in scratch, with zeros behind it whatever the row before has left there, NaN for one."""
    if size < lanes:
        store(row, lanes - PAIR, WIDTH, replace(load(row, 0, WIDTH, 2), ZERO))
    fetch(address, narrow, at, row, 0, size)


@njit(**FUSED)
def _add(a, b, lanes):
    """Adds row b of scratch to row a."""
    for d in range(0, lanes, PAIR):
        store(a, d, WIDTH, load(a, d, WIDTH, 2) + load(b, d, WIDTH, 2))


@njit(**FUSED)
def _sum(a, lanes):
    s = replace(load(a, 0, WIDTH, 2), ZERO)
    for d in range(0, lanes, PAIR):
        s = s + load(a, d, WIDTH, 2)
    return lane_sum(total(s))


@njit(**FUSED)
def _center(a, mean, live, lanes):
    """Takes the mean from a row; ``live`` is 1 in lanes of the row and 0 beyond."""
    for d in range(0, lanes, PAIR):
        store(a, d, WIDTH, (load(a, d, WIDTH, 2) - mean) * load(live, d, WIDTH, 2))


@njit(**FUSED)
def _square(a, lanes):
    s = replace(load(a, 0, WIDTH, 2), ZERO)
    for d in range(0, lanes, PAIR):
        v = load(a, d, WIDTH, 2)
        s = s + v * v
    return lane_sum(total(s))


@njit(**FUSED)
def _gate(a, z, lanes):
    """Multiplies row a by silu(z)."""
    for d in range(0, lanes, PAIR):
        v = load(z, d, WIDTH, 2)
        store(a, d, WIDTH, load(a, d, WIDTH, 2) * (v * sigmoid(v)))


@njit(**FUSED)
def _scale(a, scale, weight, bias, at, lanes):
    for d in range(0, lanes, PAIR):
        v = load(a, d, WIDTH, 2) * scale * load(weight, at + d, WIDTH, 2) + load(bias, at + d, WIDTH, 2)
        store(a, d, WIDTH, v)


@njit(**FUSED)
def _take(address, narrow, target, size, groups, lanes):
    """The weight or bias in scratch, ``(G, lanes)``."""
    for g in range(groups):
        fetch(address, narrow, g * size, target, g * lanes, size)


def _make_forward(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def forward(x, residual, z, weight, bias, s, y, mean, rstd, sizes, narrow, form, eps, first, last):
        """Writes s, y, mean and rstd of rows first * ROWS <= m < last * ROWS; s, mean and rstd may be absent.

        sizes are M, D and G; y is of x's dtype, mean and rstd (M,) float32.
        """
        _ = sources
        rows, size, groups = sizes
        lanes = (size + PAIR - 1) // PAIR * PAIR
        scratch, parameters = np.zeros(3 * lanes, np.float32), np.zeros(2 * groups * lanes, np.float32)
        scratch[2 * lanes : 2 * lanes + size] = 1
        u, other, live = pointer(scratch), pointer(scratch[lanes:]), pointer(scratch[2 * lanes :])
        w, b = pointer(parameters), pointer(parameters[groups * lanes :])
        _take(weight, narrow & WEIGHT, w, size, groups, lanes)
        if bias != 0:
            _take(bias, narrow & BIAS, b, size, groups, lanes)
        for m in range(first * ROWS, min(rows, last * ROWS)):
            at = m * size
            _begin(x, narrow & X, at, u, size, lanes)
            if residual != 0:
                fetch(residual, narrow & RESIDUAL, at, other, 0, size)
                _add(u, other, lanes)
                if s != 0:
                    put(u, 0, s, narrow & SUM, at, size)
            if z != 0:
                fetch(z, narrow & Z, at, other, 0, size)
                if form & GATE_FIRST:
                    _gate(u, other, lanes)
            center = ZERO
            if form & LAYER:
                center = _sum(u, lanes) / np.float32(size)
                _center(u, center, live, lanes)
            scale = ONE / np.sqrt(_square(u, lanes) / np.float32(size) + eps)
            if rstd != 0:
                floats(rstd)[m] = scale
            if mean != 0:
                floats(mean)[m] = center
            _scale(u, scale, w, b, m % groups * lanes, lanes)
            if form & GATE_LAST:
                _gate(u, other, lanes)
            put(u, 0, y, narrow & X, at, size)
        scratch[0] = parameters[0]  # both live until here

    return forward


forward = _make_forward(SOURCES)


@njit(**FUSED)
def _behind_gate(z, do, n, dz, weight, bias, at, lanes):
    """With the gate last: dz, and do = dy gate in place of dy."""
    for d in range(0, lanes, PAIR):
        v, dy = load(z, d, WIDTH, 2), load(do, d, WIDTH, 2)
        sig = sigmoid(v)
        o = load(n, d, WIDTH, 2) * load(weight, at + d, WIDTH, 2) + load(bias, at + d, WIDTH, 2)
        store(dz, d, WIDTH, dy * o * (sig * (v * (ONE - sig) + ONE)))
        store(do, d, WIDTH, dy * (v * sig))


@njit(**FUSED)
def _before_gate(z, du, s, dz, lanes):
    """With the gate first: dz, and ds = du gate in place of du."""
    for d in range(0, lanes, PAIR):
        v, g = load(z, d, WIDTH, 2), load(du, d, WIDTH, 2)
        sig = sigmoid(v)
        store(dz, d, WIDTH, g * load(s, d, WIDTH, 2) * (sig * (v * (ONE - sig) + ONE)))
        store(du, d, WIDTH, g * (v * sig))


@njit(**FUSED)
def _normalise(u, mean, scale, lanes):
    for d in range(0, lanes, PAIR):
        store(u, d, WIDTH, (load(u, d, WIDTH, 2) - mean) * scale)


@njit(**FUSED)
def _sums(do, n, weight, dweight, dbias, at, lanes):
    """The sums of dn n and dn of a row, whose do becomes dn; adds to dweight and dbias."""
    along = replace(load(n, 0, WIDTH, 2), ZERO)
    straight = replace(load(n, 0, WIDTH, 2), ZERO)
    for d in range(0, lanes, PAIR):
        g, v = load(do, d, WIDTH, 2), load(n, d, WIDTH, 2)
        store(dweight, at + d, WIDTH, load(dweight, at + d, WIDTH, 2) + g * v)
        store(dbias, at + d, WIDTH, load(dbias, at + d, WIDTH, 2) + g)
        dn = g * load(weight, at + d, WIDTH, 2)
        store(do, d, WIDTH, dn)
        along = along + dn * v
        straight = straight + dn
    return lane_sum(total(along)), lane_sum(total(straight))


@njit(**FUSED)
def _slope(dn, n, scale, straight, along, lanes):
    """du in place of dn, which was rounded when it was stored: in a row of one channel it is its mean, exactly."""
    for d in range(0, lanes, PAIR):
        v = (load(dn, d, WIDTH, 2) - straight) - load(n, d, WIDTH, 2) * along
        store(dn, d, WIDTH, v * scale)


def _make_backward(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def backward(
        x, residual, z, weight, bias, dy, ds, mean, rstd, dx, dresidual, dz, part, sizes, narrow, form, first, last
    ):
        """Writes dx (and the same as dresidual), dz, and each job's part (2, G, D) of dweight and dbias.

        As ``forward``; dy and dx are of x's dtype, ds (what arrives at s from elsewhere) is ADD's, dresidual
        RESIDUAL's; without a residual x may be the sum: its gradients' dtypes are then those of bits X and RESIDUAL
        of ``narrow >> 8``.
        """
        _ = sources
        rows, size, groups = sizes
        outputs = narrow >> 8
        lanes = (size + PAIR - 1) // PAIR * PAIR
        block = groups * lanes
        scratch, parameters = np.zeros(5 * lanes, np.float32), np.zeros(2 * block, np.float32)
        sums = np.empty(2 * block, np.float32)
        u, other, g, dgate = (
            pointer(scratch),
            pointer(scratch[lanes:]),
            pointer(scratch[2 * lanes :]),
            pointer(scratch[3 * lanes :]),
        )
        kept = pointer(scratch[4 * lanes :])
        w, b, dweight, dbias = pointer(parameters), pointer(parameters[block:]), pointer(sums), pointer(sums[block:])
        _take(weight, narrow & WEIGHT, w, size, groups, lanes)
        if bias != 0:
            _take(bias, narrow & BIAS, b, size, groups, lanes)
        for job in range(first, last):
            sums[:] = 0
            for m in range(job * ROWS, min(rows, (job + 1) * ROWS)):
                at, here = m * size, m % groups * lanes
                _begin(x, narrow & X, at, u, size, lanes)
                if residual != 0:
                    fetch(residual, narrow & RESIDUAL, at, other, 0, size)
                    _add(u, other, lanes)
                _begin(dy, outputs & X, at, g, size, lanes)
                if z != 0:
                    fetch(z, narrow & Z, at, other, 0, size)
                    if form & GATE_FIRST:
                        for d in range(0, lanes, PAIR):
                            store(kept, d, WIDTH, load(u, d, WIDTH, 2))
                        _gate(u, other, lanes)
                center = ZERO
                if form & LAYER:
                    center = floats(mean)[m]
                scale = floats(rstd)[m]
                _normalise(u, center, scale, lanes)
                if form & GATE_LAST:
                    _behind_gate(other, g, u, dgate, w, b, here, lanes)
                    put(dgate, 0, dz, narrow & Z, at, size)
                along, straight = _sums(g, u, w, dweight, dbias, here, lanes)
                straight = straight / np.float32(size) if form & LAYER else ZERO
                _slope(g, u, scale, straight, along / np.float32(size), lanes)
                if form & GATE_FIRST:
                    _before_gate(other, g, kept, dgate, lanes)
                    put(dgate, 0, dz, narrow & Z, at, size)
                if ds != 0:
                    fetch(ds, narrow & ADD, at, other, 0, size)
                    _add(g, other, lanes)
                put(g, 0, dx, outputs & X, at, size)
                if dresidual != 0:
                    put(g, 0, dresidual, outputs & RESIDUAL, at, size)
            for i in range(2 * groups):
                put(dweight, i * lanes, part, False, (job * 2 * groups + i) * size, size)
        scratch[0] = parameters[0] + sums[0]  # all live until here

    return backward


backward = _make_backward(SOURCES)


def _make_finish(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def finish(part, jobs, columns, dweight, weight_narrow, dbias, bias_narrow):
        """dweight (D,) and dbias (D,), which may be absent, from their parts (jobs, 2, D), in a fixed order."""
        _ = sources
        parts = floats(part)
        sums, rounded = np.zeros(2 * columns), np.empty(2 * columns, np.float32)
        for job in range(jobs):
            for d in range(2 * columns):
                sums[d] += parts[job * 2 * columns + d]
        rounded[:] = sums
        row = pointer(rounded)
        put(row, 0, dweight, weight_narrow, 0, columns)
        if dbias != 0:
            put(row, columns, dbias, bias_narrow, 0, columns)
        rounded[0] = 0  # alive until here

    return finish


finish = _make_finish(SOURCES)
