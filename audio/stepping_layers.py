"""Layers of a U-Net for one sample on a CPU, compiled by numba: what ``stepping_net`` runs.

Each works on a clip's activations in place, in float32. Weights and states lie in flat arrays, and a row of the table
of blocks says where: see ``packing``.

Legend: D width, E inner width of a mixer, N state, M pairs of an S4D state, R dt rank, W convolution width.
"""

import math

import numpy as np
from numba import njit

from audio.packing import (
    DIAGONAL,
    DIM,
    INNER,
    KIND,
    MIXER,
    RANK,
    S_CONV,
    S_SSM,
    STATE,
    W_A,
    W_CONV,
    W_DT,
    W_IN,
    W_NORM,
    W_OUT,
    W_SKIP,
    W_X,
    WIDTH,
)  # fmt: skip
from kernels.selective_scan.cpu_math import MATH, exp, sigmoid, softplus

OPTIONS = {**MATH, "nogil": True, "cache": True}
EPS = np.float32(1e-5)
ZERO, ONE, HALF, ROOT_HALF = np.float32(0), np.float32(1), np.float32(0.5), np.float32(math.sqrt(0.5))


@njit(**OPTIONS)
def linear(x, rows, columns, w, at, y):
    """y (columns) = b + x (rows) W, where w holds b and then W (rows, columns) from ``at`` on."""
    for j in range(columns):
        y[j] = w[at + j]
    for i in range(rows):
        line = w[at + (i + 1) * columns : at + (i + 2) * columns]
        factor = x[i]
        for j in range(columns):
            y[j] += factor * line[j]


@njit(**OPTIONS)
def layer_norm(x, dim, w, at, y):
    mean, square = ZERO, ZERO
    for i in range(dim):
        mean += x[i]
    mean /= np.float32(dim)
    for i in range(dim):
        square += (x[i] - mean) * (x[i] - mean)
    scale = ONE / np.sqrt(square / np.float32(dim) + EPS)
    for i in range(dim):
        y[i] = (x[i] - mean) * scale * w[at + i] + w[at + dim + i]


@njit(**OPTIONS)
def _mamba(row, w, h, x, room):
    """One step of a Mamba layer on x (D), in place; h is the clip's state."""
    E, N, W, R = row[INNER], row[STATE], row[WIDTH], row[RANK]
    xz, u, low, dt, y = room[1], room[2], room[3], room[4], room[5]
    linear(x, row[DIM], 2 * E, w, row[W_IN], xz)
    conv = h[row[S_CONV] : row[S_CONV] + (W - 1) * E]
    for e in range(E):
        u[e] = w[row[W_CONV] + e]
    for k in range(W - 1):
        taps = w[row[W_CONV] + (k + 1) * E : row[W_CONV] + (k + 2) * E]
        past = conv[k * E : (k + 1) * E]
        for e in range(E):
            u[e] += taps[e] * past[e]
    taps = w[row[W_CONV] + W * E : row[W_CONV] + (W + 1) * E]
    for e in range(E):
        u[e] += taps[e] * xz[e]
        u[e] *= sigmoid(u[e])
    for i in range((W - 2) * E):
        conv[i] = conv[i + E]
    if W > 1:
        conv[(W - 2) * E :] = xz[:E]
    linear(u, E, R + 2 * N, w, row[W_X], low)
    linear(low, R, E, w, row[W_DT], dt)
    for e in range(E):
        dt[e] = softplus(dt[e])
        y[e] = w[row[W_SKIP] + e] * u[e]
    for n in range(N):
        A = w[row[W_A] + n * E : row[W_A] + (n + 1) * E]
        s = h[row[S_SSM] + n * E : row[S_SSM] + (n + 1) * E]
        B, C = low[R + n], low[R + N + n]
        for e in range(E):
            s[e] = exp(dt[e] * A[e]) * s[e] + dt[e] * B * u[e]
            y[e] += C * s[e]
    for e in range(E):
        y[e] *= xz[E + e] * sigmoid(xz[E + e])
    linear(y, E, row[DIM], w, row[W_OUT], x)


@njit(**OPTIONS)
def _s4d(row, w, h, x, room):
    """One step of an S4D layer on x (D), in place; h is the clip's state."""
    D, M = row[DIM], row[STATE]
    y, gated = room[1], room[2]
    for d in range(D):
        y[d] = w[row[W_SKIP] + d] * x[d]
    for m in range(M):
        at, plane = row[W_A] + m * D, M * D
        re = h[row[S_SSM] + m * D : row[S_SSM] + (m + 1) * D]
        im = h[row[S_SSM] + plane + m * D : row[S_SSM] + plane + (m + 1) * D]
        for d in range(D):
            ar, ai = w[at + d], w[at + plane + d]
            r = ar * re[d] - ai * im[d] + w[at + 2 * plane + d] * x[d]
            i = ar * im[d] + ai * re[d] + w[at + 3 * plane + d] * x[d]
            re[d], im[d] = r, i
            y[d] += w[at + 4 * plane + d] * r - w[at + 5 * plane + d] * i
    for d in range(D):
        y[d] *= HALF * (ONE + np.float32(math.erf(y[d] * ROOT_HALF)))
    linear(y, D, row[INNER], w, row[W_OUT], gated)
    for d in range(D):
        x[d] = gated[d]
    if row[INNER] > D:
        for d in range(D):
            x[d] *= sigmoid(gated[D + d])


@njit(**OPTIONS)
def block(row, w, h, x, room):
    """x (D) += layer(norm(x)), in place."""
    normed = room[0]
    layer_norm(x, row[DIM], w, row[W_NORM], normed)
    if row[KIND] == MIXER:
        _mamba(row, w, h, normed, room)
    elif row[KIND] == DIAGONAL:
        _s4d(row, w, h, normed, room)
    else:
        hidden = room[1]
        linear(normed, row[DIM], row[INNER], w, row[W_IN], hidden)
        for i in range(row[INNER]):
            hidden[i] *= HALF * (ONE + np.float32(math.erf(hidden[i] * ROOT_HALF)))
        linear(hidden, row[INNER], row[DIM], w, row[W_OUT], normed)
    for i in range(row[DIM]):
        x[i] += normed[i]
