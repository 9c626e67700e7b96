"""One step of a whole U-Net on a CPU, and any number of them for some clips, compiled by numba.

Legend: B clips, T samples, D width, S samples pooled.
"""

import numpy as np
from numba import njit

from audio.packing import (
    BLOCKS,
    FIRST_DOWN,
    FIRST_UP,
    INNER,
    POOL,
    RANK,
    S_CURRENT,
    S_WAITING,
    STATE,
    UP_BLOCKS,
    W_DOWN,
    W_UP,
    WIDE,
)  # fmt: skip
from audio.stepping_layers import OPTIONS, block, layer_norm, linear
from audio.stepping_levels import choose, log_probability


@njit(**OPTIONS)
def pack_frame(frame, pool, dim, out):
    """(S, D) to (D, S), the order of the poolings' weights."""
    for s in range(pool):
        for d in range(dim):
            out[d * pool + s] = frame[s * dim + d]


@njit(**OPTIONS)
def step(level, unet, blocks, stages, w, h, phase, ends, room, skips, logits):
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
            block(blocks[stage[FIRST_DOWN] + i], w, h, x, room)
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
        pack_frame(waiting, pool, dim, spare)
        depth += 1
        linear(spare, pool * dim, stages[depth, WIDE], w, stage[W_DOWN], x)
    for d in range(min(depth, last - 1), -1, -1):
        stage = stages[d]
        dim, pool = stage[WIDE], stage[POOL]
        full = phase[d] == pool
        if full:  # x is what the inner stages say about this frame, for the next one
            linear(x, stages[d + 1, WIDE], pool * dim, w, stage[W_UP], spare)
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
            block(blocks[stage[FIRST_UP] + i], w, h, x, room)
            if unet:
                kept -= 1
                x[:dim] += skips[kept, :dim]
        if not unet:
            x[:dim] += skips[kept, :dim]
    layer_norm(x, stages[0, WIDE], w, ends[1], spare)
    linear(spare, stages[0, WIDE], len(logits), w, ends[2], logits)


@njit(**OPTIONS)
def advance(
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
    strength,
):
    """Takes the clips ``first:stop`` through levels (B, T), or draws these first.

    With guidance of a strength above 0 the states behind the first B are those of the same clips untold.
    """
    widest = max(2 * blocks[:, INNER].max(), (stages[:, POOL] * stages[:, WIDE]).max(), stages[:, WIDE].max())
    widest = max(widest, (blocks[:, RANK] + 2 * blocks[:, STATE]).max())
    room = np.empty((8, widest), np.float32)
    skips = np.empty(((stages[:, BLOCKS] + 1).sum(), stages[:, WIDE].max()), np.float32)
    for b in range(first, stop):
        untold = b + len(levels)
        for t in range(levels.shape[1]):
            if draw:
                said = logits[b]
                if strength > 0:
                    said = said + strength * (said - logits[untold])
                levels[b, t] = choose(said, uniform[b, t], *how)
                likelihood[b] += log_probability(logits[b], levels[b, t])
            level = offset[b] + levels[b, t]
            step(level, unet, blocks, stages, w, state[b], phase[b], ends, room, skips, logits[b])
            if strength > 0:
                level = offset[untold] + levels[b, t]
                step(level, unet, blocks, stages, w, state[untold], phase[untold], ends, room, skips, logits[untold])
