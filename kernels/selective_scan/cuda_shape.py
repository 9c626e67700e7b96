"""How the CUDA scans are cut into blocks, threads and tiles: a rule on the problem's sizes and the GPU, nothing timed.

N state, S states of a thread, LN lanes of a channel, NW warps, BD channels of a block, T steps of a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kernels.selective_scan.problem import CHUNK

WARPS = 4  # of a block
SHORT = 4096 // CHUNK  # chunks of a sequence that is walked in small tiles


@functools.cache
def properties(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, the bytes of shared memory that a block may ask for there."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


class Shape(NamedTuple):
    """How a scan is cut into blocks, threads and tiles.

    Attributes:
        lanes: LN, lanes that share a channel.
        states: S, states of a thread.
        tile: T of the forward.
        part: T of the backward, steps whose states and decays fit the registers.
        warps: NW, warps of a block that hold states.
        help: HELP, threads of a block over those that hold states: a walk over few states is short beside the rest.
        resident: Blocks of a multiprocessor: what registers and shared memory allow.
        width: BD, channels of a block.
        blocks: Blocks that share the channels of a group.
        segments: Parts of a sequence that run at once.
    """

    lanes: int
    states: int
    tile: int
    part: int
    warps: int
    help: int
    resident: int
    width: int
    blocks: int
    segments: int

    @property
    def forward_words(self) -> int:
        """Words of shared memory of the forward."""
        each = rows(2 * self.width) + rows(self.width * self.lanes) + 2 * self.lanes * self.states + 1
        return 2 * self.tile * each

    def backward_words(self, ends: bool) -> int:
        """Words of shared memory of the backward, or of its first pass."""
        T, states = self.part, self.lanes * self.states
        staged = CHUNK * (rows(2 * self.width) + self.width + 2 * states + 1)
        if ends:
            return staged
        starts = CHUNK // T * 32 * self.warps * self.states
        shares = T * (rows(self.width * self.lanes) + rows(2 * self.width * self.lanes))
        return staged + starts + shares + 8 // self.lanes * self.warps * (T * (2 * states + 4) + 16)


@functools.cache
def shape_of(
    state: int, channels: int, scans: int, slots: int, wide: bool, backward: bool, device: torch.device
) -> Shape:
    """The rule.

    Args:
        state: N.
        channels: Of a group.
        scans: Sequences times routes times groups.
        slots: Chunks of a sequence.
        wide: Whether x is float32: a tile of it fills more registers.
        backward: The backward of many states needs most of a multiprocessor's shared memory for any block: it gets
            one of 8 warps.
        device: The GPU.
    """
    cores, memory = properties(device)
    lanes = 1 if state <= 4 else 2 if state <= 8 else 4 if state <= 16 else 8
    states = -(-state // lanes)
    most = 2 * WARPS if states > 4 and backward and memory >= 224 << 10 else WARPS
    warps = min(most, -(-channels * lanes // 32))
    help_ = max(1, 4 // lanes)
    # Short walks want more blocks at once, which small tiles leave the registers for; long ones, fewer barriers.
    small = lanes == 1 or (states <= 4 and help_ == 1 and (wide or slots <= SHORT))
    resident = 2 if help_ > 1 else 1 if warps > WARPS else 4 if small and not (wide or backward) else 3
    width = 32 // lanes * warps
    blocks = -(-channels // width)
    # Segments cost a pass that finds the states they end in: only where blocks are few.
    fit = cores * resident * WARPS // min(warps, WARPS) // max(1, scans * blocks)
    segments = 1 if fit < 3 else max(1, min(fit, 64, slots))
    tile, part = 16 if small else 32, 8 if states <= 4 else 4
    return Shape(lanes, states, tile, part, warps, help_, resident, width, blocks, segments)


def rows(floats: int) -> int:
    """Floats that a padded row takes in shared memory (``PADDED``)."""
    return -(-floats // 32) * 36
