"""The convolution on the CPU over tokens in order, float32 or bfloat16, with its activation: one pass over memory.

Tables of places, which ``kernels.causal_conv1d.cpu`` follows, aren't needed where every row is one sequence. Places are
taken in tiles: inputs of a tile, and the W - 1 before it, go to scratch in float32, sums and silu stay in registers.

B batch, L tokens, D channels, W conv width.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.causal_conv1d.problem import Problem
from kernels.cpu_rows import FLOATS, SOURCES, flat, read_row
from kernels.jit import compiled
from kernels.selective_scan.cpu_arguments import FUSED, MATH
from kernels.selective_scan.cpu_math import sigmoid
from kernels.selective_scan.cpu_simd import WIDTH, load, pointer, store
from kernels.threads import parts, run

PLACES = 32  # of a tile: with 256 channels it and its sums lie in the processor's first cache
CHANNELS = 256  # at most, of a tile


def takes(p: Problem) -> bool:
    """Whether the problem is one of these."""
    return p.in_order and p.x.dtype in FLOATS and p.x.stride(3) == 1 and p.x.numel() > 0 and p.dtype == torch.float32


@njit(**FUSED)
def _sum(tile, weight, bias, at, d, width, lanes, silu):
    """The output at a place whose oldest input lies at ``at`` of the tile: 16 channels from ``d`` on."""
    s = load(bias, d, 0, 1)
    for w in range(width):
        s = s + load(weight, w * lanes + d, 0, 1) * load(tile, at + w * lanes + d, 0, 1)
    return s * sigmoid(s) if silu else s


def _make(sources: str):
    """The kernel; it closes over what it is made of."""

    @compiled(**MATH)
    def forward(x, steps, weight, bias, state, y, sizes, silu, reverse, first, last):
        """Writes y (B, L, D) of the tiles first <= j < last; sizes are L, D and the lanes of a block of channels.

        weight (blocks, W, lanes) and bias (blocks, lanes) are zero in channels beyond D. state (B, W - 1, D), oldest
        input first, may be empty.
        """
        _ = sources
        length, channels, lanes = sizes
        width = weight.shape[1]
        tiles = (length + PLACES - 1) // PLACES
        blocks = weight.shape[0]
        rows = np.zeros((PLACES + width - 1) * lanes, np.float32)
        out = np.zeros(lanes, np.float32)
        for job in range(first, last):
            block, tile, b = job % blocks, job // blocks % tiles, job // (blocks * tiles)
            d0 = block * lanes
            count = min(lanes, channels - d0)
            q0 = tile * PLACES
            places = min(PLACES, length - q0)
            for i in range(places + width - 1):
                q = q0 + i - (width - 1)
                if q >= 0:
                    token = length - 1 - q if reverse else q
                    read_row(x, b * steps[0] + token * steps[1] + d0, rows, i * lanes, count)
                elif state.size > 0:
                    read_row(state, (b * (width - 1) + q + width - 1) * channels + d0, rows, i * lanes, count)
                else:
                    rows[i * lanes : (i + 1) * lanes] = 0
            inputs, weights, biases = pointer(rows), pointer(weight[block]), pointer(bias[block])
            for i in range(places):
                for d in range(0, lanes, WIDTH):
                    store(out, d, 0, _sum(inputs, weights, biases, i * lanes, d, width, lanes, silu))
                token = length - 1 - q0 - i if reverse else q0 + i
                read_row(out, 0, y, (b * length + token) * channels + d0, count)

    return forward


_forward = _make(SOURCES)


def _blocked(t: Tensor, blocks: int, lanes: int) -> np.ndarray:
    """``(..., D)`` in float32 as ``(blocks, ..., lanes)``, zeros in the last block beyond D."""
    padded = torch.nn.functional.pad(t.detach().float(), (0, blocks * lanes - t.shape[-1]))
    return padded.unflatten(-1, (blocks, lanes)).movedim(-2, 0).contiguous().numpy()


def forward(p: Problem) -> Tensor:
    """y ``(B, L, 1, D)`` in x's dtype."""
    y = torch.empty(p.batch, p.length, 1, p.channels, dtype=p.x.dtype)
    lanes = min(CHANNELS, -(-p.channels // WIDTH) * WIDTH)
    blocks = -(-p.channels // lanes)
    bias = torch.zeros(p.channels) if p.bias is None else p.bias[0]
    state = torch.empty(0) if p.initial_state is None or p.width == 1 else p.initial_state.detach().float()
    arguments = (
        flat(p.x), p.x.stride()[:2], _blocked(p.weight[0].T, blocks, lanes), _blocked(bias, blocks, lanes),
        state.contiguous().view(-1).numpy(), flat(y), (p.length, p.channels, lanes), p.silu, p.reverse,
    )  # fmt: skip
    jobs = p.batch * blocks * -(-p.length // PLACES)
    run(_forward, [(*arguments, *part) for part in parts(jobs)])
    return y
