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
ROUNDS = 4  # at most: each rounds the sums of the backward
SLICED = 1024 // CHUNK  # chunks of a sequence that the backward goes over in slices (``cuda_sums``) instead of rounds


@functools.cache
def properties(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, the bytes of shared memory that a block may ask for there."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


class Shape(NamedTuple):
    """How a scan is cut into blocks, threads and tiles.

    Attributes:
        lanes: LN, lanes that share a channel.
        states: S, states of a channel that a thread holds.
        each: CH, channels of a thread.
        tile: T of the forward.
        part: T of the backward, steps whose states and decays fit the registers.
        warps: NW, warps of a block that hold states.
        extra: EXTRA, warps that hold none. Forward, they alone load and write; backward, all do, and they help where
            a walk over few states is short beside the rest.
        resident: Blocks of a multiprocessor: what registers and shared memory allow.
        width: BD, channels of a block at once.
        blocks: Blocks of channels that a group has.
        segments: Parts of a sequence that run at once.
        rounds: Blocks of channels that a block of the backward takes one after another.
    """

    lanes: int
    states: int
    each: int
    tile: int
    part: int
    warps: int
    extra: int
    resident: int
    width: int
    blocks: int
    segments: int
    rounds: int = 1

    @property
    def forward_words(self) -> int:
        """Words of shared memory of the forward."""
        each = rows(2 * self.width) + rows(self.width * self.lanes) + 2 * self.lanes * self.states + 1
        return 2 * self.tile * each + 8  # for barriers

    def backward_words(self, ends: bool) -> int:
        """Words of shared memory of the backward, or of its first pass."""
        T, states = self.part, self.lanes * self.states
        staged = CHUNK * (rows(2 * self.width) + self.width + 2 * states + 1) + 16
        if ends:
            return staged + 4
        starts = CHUNK // T * self.width * states
        if self.lanes == 4 and T == 8 and self.extra == 0:  # x, dy and z in 16 bits
            shares = 3 * CHUNK * (self.width + 4) // 2
        else:
            shares = T * (rows(self.width * self.lanes) + rows(2 * self.width * self.lanes) + 12)
        sums = 2 * self.lanes * (self.states + self.states % 2)
        return staged + starts + shares + 4 + 8 // self.lanes * self.warps * (T * (sums + 4) + 16)


@functools.cache
def shape_of(
    state: int, channels: int, scans: int, slots: int, wide: bool, backward: bool, pairs: bool, device: torch.device,
    table: bool = False,
) -> Shape:  # fmt: skip
    """The rule.

    Args:
        state: N.
        channels: Of a group.
        scans: Sequences times routes times groups.
        slots: Chunks of a sequence.
        wide: Whether x is float32: a tile of it fills more registers.
        backward: The backward of many states needs most of a multiprocessor's shared memory for any block: it gets
            one of 8 warps.
        pairs: Whether two neighbouring states are a complex number, which one thread holds.
        device: The GPU.
        table: Whether steps are looked up: then no rows can be asked for ahead.
    """
    cores, memory = properties(device)
    lanes = 1 if state <= 4 else 2 if state <= 8 else 4 if state <= 16 else 8
    states = -(-state // lanes)
    states += pairs and states % 2
    most = 2 * WARPS if states > 4 and backward and memory >= 224 << 10 else WARPS
    warps = min(most, -(-channels * lanes // 32))
    width = 32 // lanes * warps
    blocks = -(-channels // width)
    if backward:
        extra = (max(1, 4 // lanes) - 1) * warps
        small = lanes == 1 or (states <= 4 and not extra and (wide or slots <= SHORT))
        resident = 1 if warps > WARPS or lanes == 1 else 2 if extra else 3
    else:
        extra = 2 * warps if lanes == 1 else 2 if lanes == 8 and states > 4 and warps % 2 == 0 else warps
        small = lanes <= 2 or states > 4 or wide or slots <= SHORT // 4
        resident = 3 if lanes in (2, 4) or extra < warps else 2
        resident += small and states <= 4 and not wide and lanes == 4
    # Segments cost a pass that finds the states they end in: only where blocks are few. At 16 states in long tiles the
    # forward of 4 segments takes longer than one walk over everything (measured).
    enough = 6 if lanes == 4 and not (backward or small) else 3
    fit = cores * resident * WARPS // min(warps, WARPS) // max(1, scans * blocks)
    if not backward and fit > 8:  # so many shorten what waits for the first pass no more, and each has one
        fit = fit * 2 // 3
    segments = 1 if fit < enough else max(1, min(fit, 64, slots))
    tile, part = 16 if small else 32, 8 if states <= 4 else 4
    found = Shape(lanes, states, 1, tile, part, warps, extra, resident, width, blocks, segments)
    if backward:
        few = segments == 1 and slots < SLICED
        return found._replace(rounds=_rounds(blocks, scans, cores * resident)) if few else found
    if wide or pairs or lanes < 4:
        return found
    single = None if table else _single(found, channels, scans, slots, cores, memory)
    joined = None if table else _joined(found, channels, scans, cores, memory)
    return single or joined or _paired(found, channels, scans, cores, memory) or found


def _rounds(blocks: int, scans: int, room: int) -> int:
    """As many as keep the GPU, which has room for so many blocks at once, busy no longer: the sums' parts get fewer."""

    def time(rounds: int) -> int:
        return -(-scans * blocks // (rounds * room)) * rounds

    return max(n for n in range(1, ROUNDS + 1) if blocks % n == 0 and time(n) <= time(1))


def _single(shape: Shape, channels: int, scans: int, slots: int, cores: int, memory: int) -> Shape | None:
    """Where 16 channels to a multiprocessor are all there are: one walk, 8 lanes a channel, instead of segments.

    A walk over more steps is slower than segments whose first pass stops where everything has been forgotten.
    """
    blocks = -(-channels // 16)
    full = 3 * cores < 4 * scans * blocks <= 4 * cores and channels >= 16 and memory >= 128 << 10
    if shape.lanes != 4 or not full or not SHORT // 4 < slots <= 8 * SHORT:
        return None
    return shape._replace(
        lanes=8, states=2, tile=CHUNK, warps=WARPS, extra=2 * WARPS, resident=1, width=16, blocks=blocks, segments=1
    )


def _joined(shape: Shape, channels: int, scans: int, cores: int, memory: int) -> Shape | None:
    """Where blocks of 96 channels just fill the GPU: one of 12 + 12 warps to a multiprocessor instead of three.

    Three don't go on alike: the last one ends alone, and a third of the warps can't keep a multiprocessor busy.
    """
    width = 3 * shape.width
    blocks = -(-channels // width)
    segments = cores // (scans * blocks) if shape.segments > 1 else 1
    full = 9 * cores < 10 * scans * blocks * segments <= 10 * cores and 10 * channels >= 9 * blocks * width
    if (shape.lanes, shape.tile, shape.warps) != (4, CHUNK // 2, WARPS) or not full or memory < 224 << 10:
        return None
    if segments != shape.segments:
        return None
    warps, extra = 3 * shape.warps, 3 * shape.extra
    return shape._replace(warps=warps, extra=extra, resident=1, width=width, blocks=blocks)


def _paired(shape: Shape, channels: int, scans: int, cores: int, memory: int) -> Shape | None:
    """Where channels are many and tiles short: two channels a thread, which read B and C once."""
    width = 64 // shape.lanes * WARPS
    blocks = -(-channels // width)
    few = 2 * scans * blocks <= 3 * cores or 4 * channels < 3 * blocks * width  # blocks, or channels of the last one
    if few or shape.tile > CHUNK // 4 or (shape.lanes == 8 and shape.states <= 4):
        return None
    warps, extra = WARPS, WARPS if shape.lanes == 4 else WARPS // 2
    resident = 2
    halved = -(-channels // (2 * width))
    if shape.lanes == 4 and scans * halved <= cores and memory >= 224 << 10:  # all at once, in one block each
        warps, extra, resident, width, blocks = 2 * warps, 2 * extra, 1, 2 * width, halved
    return shape._replace(each=2, warps=warps, extra=extra, resident=resident, width=width, blocks=blocks, segments=1)


def rows(floats: int) -> int:
    """Floats that a padded row takes in shared memory (``PADDED``)."""
    return -(-floats // 32) * 36
