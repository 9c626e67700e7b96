"""How the convolution's GPU kernels for tokens in order are cut into programs, by rule on sizes, dtype and GPU.

B batch, L tokens, D channels, W conv width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from kernels.causal_conv1d.problem import Problem

WARPS = 4  # of a program
RESIDENT = 3  # programs of the backward that a multiprocessor's registers hold
BRIEF, FORWARD_BRIEF = 1 << 16, 1 << 17  # places
START = 16  # places that could be computed while such a program starts


class Shape(NamedTuple):
    """How a problem is cut.

    Attributes:
        R: Runs of a program.
        U: Places whose rows are loaded at once.
        BD: Channels of a program.
        steps: U places each of a run.
        runs: Programs that share the places of a batch and a block of channels.
        blocks: Blocks of channels.
        warps: Of a program.
    """

    R: int
    U: int
    BD: int
    steps: int
    runs: int
    blocks: int
    warps: int


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a number of that kind where there is none, in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def shape_of(p: Problem, backward: bool) -> Shape:
    """The shape of the forward or backward kernel, a rule on sizes, dtype and GPU."""
    wide = p.x.element_size()
    brief = wide == 2 and p.batch * p.length <= (BRIEF if backward else FORWARD_BRIEF)
    most = 2 if brief and backward else 4
    V = max(v for v in (most, 2, 1) if v * p.width <= (16 if wide < 8 else 8) or v == 1)  # the rest is registers
    brief = brief and most == V
    U = max(1, (16 if backward == brief else 8) // wide)
    return cut(p.batch, p.length, p.channels, V, U, backward, brief, processors(p.x.device))


@functools.cache
def cut(batch: int, length: int, channels: int, V: int, U: int, backward: bool, brief: bool, processors: int) -> Shape:
    """The shape for V channels a thread and U places at once; ``brief`` for 16-bit maps of few places.

    Forward runs are 16 places in brief maps, else as long as leaves 5 programs to a multiprocessor, up to 64. In the
    backward a program's start costs as much as START places, and RESIDENT of them fit a multiprocessor: of all runs the
    one is taken whose rounds of programs take the least time (fitted to measurements; see docs/benchmarks.md).
    """
    BD = min(32 * V, int(triton.next_power_of_2(channels)))
    R, blocks = 32 * V * WARPS // BD, -(-channels // BD)

    def at(steps: int) -> Shape:
        return Shape(R, U, BD, steps, -(-length // (R * U * steps)), blocks, WARPS)

    def programs(steps: int) -> int:
        return batch * blocks * at(steps).runs

    longest = max(1, min(-(-length // (R * U)), ((256 if brief else 512) if backward else 16 if brief else 64) // U))
    if backward:
        places = {n: -(-programs(n) // (RESIDENT * processors)) * (n * U + START) for n in range(1, longest + 1)}
        return at(min(places, key=places.__getitem__))
    steps = longest
    while steps > max(1, 16 // U) and programs(steps) < 5 * processors:
        steps = -(-steps // 2)
    return at(steps)
