"""What the CUDA backward leaves besides maps: sums over time, and the parts of dB and dC, slice by slice.

The backward goes over slices of every sequence from the last to the first, one launch each, so that the parts of dB
and dC (one for each block of channels) are kept for one slice. The state's gradient goes from each to the one before.

K routes, N state, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.selective_scan.outputs import fresh
from kernels.selective_scan.problem import CHUNK, Problem

if TYPE_CHECKING:
    from kernels.selective_scan.cuda_shape import Shape


def slices_of(p: Problem, shape: Shape) -> int:
    """How many slices: the parts of one take no more room than the states that forward saved, if sequences are long.

    Where segments of a sequence run at once, each slice would need their first pass again: there is one.
    """
    if p.cu_seqlens is not None or shape.segments > 1 or p.B.ndim == p.C.ndim == 3:
        return 1
    parts = -(-2 * CHUNK * shape.blocks * p.groups // p.channels)  # their bytes over those of the saved states
    return max(1, min(parts, p.chunks // 4))


@dataclass(frozen=True)
class Sums:
    """Memory for them, float32.

    Attributes:
        p: The problem.
        slices: How many.
        each: dA, and dB and dC if constant ``(S, segments, K, D, N)``; dD and dbias without N. Each slice adds to them.
        maps: dB and dC as tokens have them.
        g: The state's gradient before and after a slice, in turns ``(2, S, K, D, N)``; g[0] ends as the initial one.
        parts: Of dB and dC, or None.
    """

    p: Problem
    slices: int
    each: dict[str, Tensor]
    maps: dict[str, Tensor]
    g: Tensor
    parts: Tensor | None

    @staticmethod
    def new(p: Problem, shape: Shape, dstate: Tensor | None) -> Sums:
        slices = slices_of(p, shape)
        size = (p.sequences, shape.segments, p.routes, p.channels)
        states = {"dA": p.A, **{n: t for n, t in (("dB", p.B), ("dC", p.C)) if t.ndim == 3}}
        numbers = {n: t for n, t in (("dD", p.D), ("dbias", p.dt_bias)) if t is not None}
        each = {n: new(p, *size, p.state) for n in states} | {n: new(p, *size) for n in numbers}
        g = new(p, 2, p.sequences, p.routes, p.channels, p.state)
        if dstate is not None:
            g[slices % 2] = dstate
        elif slices > 1:
            g[slices % 2] = 0.0
        maps = {n: fresh(p, t.shape, t.dtype) for n, t in (("dB", p.B), ("dC", p.C)) if t.ndim == 5}
        parts = new(p, shape.blocks, entries(p, span_of(p, slices))) if maps else None
        return Sums(p, slices, each, maps, g, parts)

    def fields(self, i: int) -> dict[str, int | Tensor | None]:
        """Arguments for slice ``i``."""
        lo, hi = self.bounds(i)
        return {
            **self.each, **self.maps, "partial": self.parts, "add": int(i < self.slices - 1),
            "dfinal": self.g[(i + 1) % 2], "dinitial": self.g[i % 2], "lo": lo, "hi": hi,
            "slots": slots_of(self.p, hi - lo),
        }  # fmt: skip

    def entries(self, i: int) -> int:
        """Numbers in the parts of slice ``i``, of one block."""
        lo, hi = self.bounds(i)
        return entries(self.p, hi - lo)

    def bounds(self, i: int) -> tuple[int, int]:
        """Chunks of a sequence where slice ``i`` begins and ends."""
        span = span_of(self.p, self.slices)
        return i * span, min(self.p.chunks, (i + 1) * span)

    def total(self, name: str) -> Tensor:
        """Over sequences and segments; the map of a dB or dC that tokens have."""
        return self.maps[name] if name in self.maps else self.each[name].sum((0, 1))


def new(p: Problem, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=p.x.device)


def span_of(p: Problem, slices: int) -> int:
    """Chunks of a slice; the last one may have fewer."""
    return -(-p.chunks // slices)


def slots_of(p: Problem, span: int) -> int:
    """Saved states of a slice of ``span`` chunks of each sequence; all where sequences are packed."""
    return p.slots if p.cu_seqlens is not None else p.sequences * span


def entries(p: Problem, span: int) -> int:
    """Numbers in one block's parts of dB and dC of a slice of ``span`` chunks."""
    return slots_of(p, span) * p.routes * p.groups * CHUNK * 2 * p.state
