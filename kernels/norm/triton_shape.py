"""How the norms' GPU kernels are cut: rows, warps and programs, by rule on sizes and GPU.

D channels, M rows, G groups of D / G channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from kernels.norm.problem import Problem


class Shape(NamedTuple):
    """How a problem is cut.

    Attributes:
        rows: Of a tile.
        block: Channels of a tile, at least those of a group.
        spread: Rows that lie next to each other in different warps.
        warps: Of a program.
        strips: Programs that share the rows of a group.
        steps: Tiles of a program.
    """

    rows: int
    block: int
    spread: int
    warps: int
    strips: int
    steps: int


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a number of that kind where there is none, in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def shape_of(p: Problem, backward: bool, plain: bool) -> Shape:
    """The shapes that were fastest on an H200; see docs/benchmarks.md.

    Args:
        p: The problem.
        backward: Whether its backward runs.
        plain: Whether there is one tensor in and one out (and their gradients): no residual, no gate.
    """
    block, count = int(triton.next_power_of_2(p.channels // p.groups)), p.x.numel() // p.channels
    across = max(1, min(16, block // 512))  # warps side by side on a row
    if across == 1:
        few = plain and count < 256 * processors(p.x.device)
        spread = (2 if few else 1) if backward and plain else 4
        deep, resident = (2, 8 if few else 16) if backward else (2, 16 if few else 32) if plain else (1, 64)
    else:
        spread = max(1, 4 // across) if backward else 1
        # 16 warps leave a thread 128 registers: two rows of a backward don't fit them
        deep, resident = (2, 32) if not backward else (1, 16) if plain or across == 16 else (2, 8)
    rows = spread * max(1, min(deep, 16384 // block))  # the widest rows fill the registers alone
    warps = across * spread
    tiles = -(-count // rows)
    strips = max(1, min(tiles, processors(p.x.device) * resident // (warps * p.groups)))
    return Shape(rows, block, spread, warps, strips, -(-tiles // strips))
