"""Generation steps of a Mamba U-Net as one compiled function: what a CPU needs to come near real time.

A step of ``SoundNet.forward_state`` is some hundred small operations, each of which costs more to call than to compute.
Here the weights lie in one array, a table says where, and a loop without calls runs the whole net for one sample. The
numbers are the same up to rounding.

Legend: B clips, D width, E inner width of a mixer, N state, R dt rank, W convolution width, S samples pooled, Q levels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

from audio.net import SoundNet
from audio.packing import (
    BLOCKS,
    DIAGONAL,
    DIM,
    FIRST_DOWN,
    FIRST_UP,
    INNER,
    KIND,
    MIXER,
    POOL,
    RANK,
    S_CONV,
    S_CURRENT,
    S_SSM,
    S_WAITING,
    STATE,
    UP_BLOCKS,
    W_A,
    W_CONV,
    W_DOWN,
    W_DT,
    W_IN,
    W_NORM,
    W_OUT,
    W_SKIP,
    W_UP,
    W_X,
    WIDE,
    WIDTH,
    Packed,
    can_pack,
)  # fmt: skip
from audio.sashimi import StageState
from core.generate import Sampling
from kernels import threads
from kernels.selective_scan.cpu_math import MATH, exp, sigmoid, softplus

OPTIONS = {**MATH, "nogil": True, "cache": True}
EPS = np.float32(1e-5)
ZERO, ONE, HALF, ROOT_HALF = np.float32(0), np.float32(1), np.float32(0.5), np.float32(math.sqrt(0.5))


def has_compiled_step(net: SoundNet) -> bool:
    """Tells whether there is a compiled step: for float32 nets of known layers on the CPU."""
    weight = net.embedding.weight
    return can_pack(net) and weight.dtype == torch.float32 and weight.device.type == "cpu"


class CompiledStepper:
    """A net and the state of B clips that it advances.

    Args:
        net: The net, in evaluation mode; see ``has_compiled_step``.
        state: State of the clips, copied.
        logits: (B, Q) what the net said last; needed to ``draw``.
        classes: (B,) int64 classes of the clips; 0 by default.
    """

    def __init__(
        self, net: SoundNet, state: StageState, logits: Tensor | None = None, classes: Tensor | None = None
    ) -> None:
        self._packed, self._unet = Packed(net, state), net.config.unet
        count = len(self._packed.state)
        self._offset = np.zeros(count, np.int64)
        if classes is not None:
            self._offset[:] = classes.numpy() * net.levels
        self._logits = np.zeros((count, net.levels), np.float32)
        self._likelihood = np.zeros(count)
        if logits is not None:
            self._logits[:] = logits.numpy()

    @property
    def log_likelihood(self) -> Tensor:
        """(B,) float64: of the levels drawn so far, under the net itself whatever the sampling, in nats."""
        return torch.from_numpy(self._likelihood.copy())

    def step(self, levels: Tensor) -> Tensor:
        """Advances every clip by one level (B,) int64; returns logits (B, Q) float32."""
        self._run(levels[:, None].numpy().copy(), np.zeros((len(levels), 0)), Sampling(), False)
        return torch.from_numpy(self._logits.copy())

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Draws the next T levels of every clip.

        Args:
            uniform: (B, T) float64 random numbers in [0, 1).
            sampling: How; without a repetition penalty.

        Returns:
            (B, T) int64.
        """
        levels = np.empty(uniform.shape, np.int64)
        self._run(levels, np.ascontiguousarray(uniform.numpy()), sampling, True)
        return torch.from_numpy(levels)

    def _run(self, levels: np.ndarray, uniform: np.ndarray, sampling: Sampling, draw: bool) -> None:
        p, count = self._packed, len(levels)
        how = float(sampling.temperature), int(sampling.top_k), float(sampling.top_p), float(sampling.min_p)
        parts = min(count, torch.get_num_threads())
        edges = [count * i // parts for i in range(parts + 1)]
        arrays = (p.blocks, p.stages, p.weights, p.state, p.phase, p.ends, self._logits, self._offset)
        given = levels, uniform, how, draw, self._unet, self._likelihood
        threads.run(_advance, [(a, b, *given, *arrays) for a, b in pairwise(edges)])


@njit(**OPTIONS)
def _linear(x, rows, columns, w, at, y):
    """y (columns) = b + x (rows) W, where w holds b and then W (rows, columns) from ``at`` on."""
    for j in range(columns):
        y[j] = w[at + j]
    for i in range(rows):
        line = w[at + (i + 1) * columns : at + (i + 2) * columns]
        factor = x[i]
        for j in range(columns):
            y[j] += factor * line[j]


@njit(**OPTIONS)
def _layer_norm(x, dim, w, at, y):
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
    _linear(x, row[DIM], 2 * E, w, row[W_IN], xz)
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
    _linear(u, E, R + 2 * N, w, row[W_X], low)
    _linear(low, R, E, w, row[W_DT], dt)
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
    _linear(y, E, row[DIM], w, row[W_OUT], x)


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
    _linear(y, D, row[INNER], w, row[W_OUT], gated)
    for d in range(D):
        x[d] = gated[d]
    if row[INNER] > D:
        for d in range(D):
            x[d] *= sigmoid(gated[D + d])


@njit(**OPTIONS)
def _block(row, w, h, x, room):
    """x (D) += layer(norm(x)), in place."""
    normed = room[0]
    _layer_norm(x, row[DIM], w, row[W_NORM], normed)
    if row[KIND] == MIXER:
        _mamba(row, w, h, normed, room)
    elif row[KIND] == DIAGONAL:
        _s4d(row, w, h, normed, room)
    else:
        hidden = room[1]
        _linear(normed, row[DIM], row[INNER], w, row[W_IN], hidden)
        for i in range(row[INNER]):
            hidden[i] *= HALF * (ONE + np.float32(math.erf(hidden[i] * ROOT_HALF)))
        _linear(hidden, row[INNER], row[DIM], w, row[W_OUT], normed)
    for i in range(row[DIM]):
        x[i] += normed[i]


@njit(**OPTIONS)
def _pack_frame(frame, pool, dim, out):
    """(S, D) to (D, S), the order of the poolings' weights."""
    for s in range(pool):
        for d in range(dim):
            out[d * pool + s] = frame[s * dim + d]


@njit(**OPTIONS)
def _net(level, unet, blocks, stages, w, h, phase, ends, room, skips, logits):
    """One step of one clip; its state h and the phases of its frames advance."""
    last = len(stages) - 1
    dim, x, spare = stages[0, WIDE], room[6], room[7]
    x[:dim] = w[ends[0] + level * dim : ends[0] + (level + 1) * dim]
    depth, kept = 0, 0
    while True:
        stage = stages[depth]
        dim, pool = stage[WIDE], stage[POOL]
        if depth == last:
            skips[kept, :dim] = x[:dim]
        for i in range(stage[BLOCKS]):
            if depth < last and unet:
                skips[kept, :dim] = x[:dim]
                kept += 1
            _block(blocks[stage[FIRST_DOWN] + i], w, h, x, room)
        if depth == last:
            x[:dim] += skips[kept, :dim]
            break
        skips[kept, :dim] = x[:dim]
        kept += 1
        waiting = h[stage[S_WAITING] : stage[S_WAITING] + pool * dim]
        waiting[phase[depth] * dim : (phase[depth] + 1) * dim] = x[:dim]
        phase[depth] += 1
        if phase[depth] < pool:
            break
        _pack_frame(waiting, pool, dim, spare)
        depth += 1
        _linear(spare, pool * dim, stages[depth, WIDE], w, stage[W_DOWN], x)
    for d in range(min(depth, last - 1), -1, -1):
        stage = stages[d]
        dim, pool = stage[WIDE], stage[POOL]
        full = phase[d] == pool
        if full:  # x is what the inner stages say about this frame, for the next one
            _linear(x, stages[d + 1, WIDE], pool * dim, w, stage[W_UP], spare)
        current = h[stage[S_CURRENT] : stage[S_CURRENT] + pool * dim]
        kept -= 1
        x[:dim] = current[(phase[d] - 1) * dim : phase[d] * dim] + skips[kept, :dim]
        if full:
            phase[d] = 0
            for s in range(pool):
                for i in range(dim):
                    current[s * dim + i] = spare[i * pool + s]
        if not unet:  # without a skip for each layer, the sum is added again after them
            skips[kept, :dim] = x[:dim]
        for i in range(stage[UP_BLOCKS]):
            _block(blocks[stage[FIRST_UP] + i], w, h, x, room)
            if unet:
                kept -= 1
                x[:dim] += skips[kept, :dim]
        if not unet:
            x[:dim] += skips[kept, :dim]
    _layer_norm(x, stages[0, WIDE], w, ends[1], spare)
    _linear(spare, stages[0, WIDE], len(logits), w, ends[2], logits)


@njit(**OPTIONS)
def _choose(logits, uniform, temperature, top_k, top_p, min_p):
    """The level at which the distribution function passes ``uniform``, filtered as ``core.generate.filter_logits``."""
    best = 0
    for q in range(len(logits)):
        if logits[q] > logits[best]:
            best = q
    if temperature == 0:
        return best
    weights = np.empty(len(logits))  # relative to the most likely level
    for q in range(len(logits)):
        weights[q] = math.exp((np.float64(logits[q]) - logits[best]) / temperature)
    if top_k > 0 or top_p < 1:
        order = np.argsort(-logits, kind="mergesort")  # stable: equal levels by number
        kept = min(top_k, len(logits)) if top_k > 0 else len(logits)
        total, before = weights[order[:kept]].sum(), 0.0
        for i in range(len(logits)):
            weight = weights[order[i]]
            if i > 0 and (i >= kept or (before >= (top_p - 1e-7) * total and top_p < 1)):
                weights[order[i]] = 0.0
            before += weight
    for q in range(len(logits)):
        if weights[q] < min_p:
            weights[q] = 0.0
    total, reached = weights.sum(), 0.0
    for q in range(len(logits)):
        reached += weights[q]
        if reached > uniform * total:
            return q
    return best  # rounding left the sum short of the total


@njit(**OPTIONS)
def _log_probability(logits, level):
    """The log of a level's probability under the net, in nats."""
    best = logits.max()
    total = 0.0
    for q in range(len(logits)):
        total += math.exp(np.float64(logits[q] - best))
    return np.float64(logits[level] - best) - math.log(total)


@njit(**OPTIONS)
def _advance(
    first,
    stop,
    levels,
    uniform,
    how,
    draw,
    unet,
    likelihood,
    blocks,
    stages,
    w,
    state,
    phase,
    ends,
    logits,
    offset,
):
    """Takes the clips ``first:stop`` through levels (B, T), or draws these first."""
    widest = max(2 * blocks[:, INNER].max(), (stages[:, POOL] * stages[:, WIDE]).max(), stages[:, WIDE].max())
    widest = max(widest, (blocks[:, RANK] + 2 * blocks[:, STATE]).max())
    room = np.empty((8, widest), np.float32)
    skips = np.empty(((stages[:, BLOCKS] + 1).sum(), stages[:, WIDE].max()), np.float32)
    for b in range(first, stop):
        for t in range(levels.shape[1]):
            if draw:
                levels[b, t] = _choose(logits[b], uniform[b, t], *how)
                likelihood[b] += _log_probability(logits[b], levels[b, t])
            level = offset[b] + levels[b, t]
            _net(level, unet, blocks, stages, w, state[b], phase[b], ends, room, skips, logits[b])
