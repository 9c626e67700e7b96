"""What the CUDA backward leaves besides maps: sums over time, and the parts of dB and dC, slice by slice.

The backward goes over slices of every segment of a sequence from the last to the first, one launch each, so that the
parts of dB and dC (one for each block that runs, of channels) are kept for one slice. The state's gradient goes from
each to the one before.

K routes, N state, S sequences.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.selective_scan.outputs import fresh
from kernels.selective_scan.problem import CHUNK, Problem

if TYPE_CHECKING:
    from kernels.selective_scan.cuda_shape import Shape

THREADS = 256  # of a block that adds up
LEAST = 8  # chunks of a slice: the launches of shorter ones cost more than they save
BRIEF = 3  # the same of short segments
ADDERS = 4  # lanes that share the parts of a number, if these are many


class Sums:
    """Memory for them, float32, and which of it each launch gets.

    Attributes:
        slices: How many.
        parts: Sizes of what each sequence and segment has, by field: dA, and dB and dC if constant,
            ``(S, segments, K, D, N)``; dD and dbias without N. Each slice adds to them.
        sums: Sizes of their sums, by field, in the same order.
        maps: Sizes and dtypes of dB and dC where tokens have their own. No tensors: all of this outlives the call.
        span: Chunks of a slice; the last one may have fewer.
        slots: Saved states of a slice.
        shares: Float32 words of the parts of dB and dC, or 0. Those of bfloat16 are kept in bfloat16.
        together: States whose parts one thread adds up.
        adders: Threads that share the parts of a state.
        kept: Numbers of the state's gradient, of all segments.
    """

    def __init__(self, p: Problem, shape: Shape) -> None:
        rows, sizes = (p.sequences, shape.segments), {"A": (p.routes, p.channels, p.state)}
        sizes |= {n: sizes["A"] for n, t in (("B", p.B), ("C", p.C)) if t.ndim == 3}
        sizes |= {n: sizes["A"][:2] for n, t in (("D", p.D), ("bias", p.dt_bias)) if t is not None}
        self.parts = {f"d{n}": (*rows, *size) for n, size in sizes.items()}
        self.sums = {f"sum_{n}": size for n, size in sizes.items()}
        self.maps = {f"d{n}": (t.shape, t.dtype) for n, t in (("B", p.B), ("C", p.C)) if t.ndim == 5}
        self.chunks = -(-p.chunks // shape.segments)  # of a segment
        self.halves = p.B.dtype == p.C.dtype == torch.bfloat16
        self.slices = self._slices(p, shape)
        self.span = -(-self.chunks // self.slices)
        self.slots = p.slots if p.cu_seqlens is not None else p.sequences * shape.segments * self.span
        each = p.routes * p.groups * CHUNK * 2 * p.state  # numbers of a slot, for one block
        self.shares = -(-self.slots * each * (shape.blocks // shape.rounds) // (1 + self.halves)) if self.maps else 0
        self.together = math.gcd(p.state, 4)
        self.adders = ADDERS if shape.blocks // shape.rounds > 4 * ADDERS else 1
        each_block = THREADS // self.adders * self.together
        self.part_blocks = -(-self.slots * each // each_block) if self.maps else 0
        self.sum_blocks = -(-sum(torch.Size(size).numel() for size in self.sums.values()) // THREADS)
        self.kept = p.sequences * shape.segments * p.routes * p.channels * p.state if self.slices > 1 else 0

    def _slices(self, p: Problem, shape: Shape) -> int:
        """So many that the shares of one take no more room than the states that forward saved, if there are enough.

        Short segments, each with sums of its own, are cut once more.
        """
        if p.cu_seqlens is not None or not self.maps or not self.chunks:
            return 1
        blocks = shape.blocks // shape.rounds * p.groups
        bytes_ = -(-2 * CHUNK * blocks // p.channels // (1 + self.halves))  # over those of the states
        slices = max(1, min(bytes_, self.chunks // LEAST))
        if slices == 1 and shape.segments > 1:
            slices = max(1, min(bytes_ + 1, self.chunks // BRIEF))
        return -(-self.chunks // -(-self.chunks // slices))  # none of them empty

    def bounds(self, i: int) -> dict[str, int]:
        """Numbers for the launches of slice ``i``: its chunks in a segment, whether others came before, its slots."""
        lo = i * self.span
        return {"lo": lo, "hi": lo + self.span, "add": int(i < self.slices - 1), "slots": self.slots}

    def blocks(self, i: int) -> int:
        """Blocks of the launch that adds up after slice ``i``."""
        return self.part_blocks + (self.sum_blocks if i == 0 else 0)


class Held:
    """Tensors for ``Sums``, by field.

    Attributes:
        fields: What every launch gets.
        g: The state's gradient between slices, if there are several: a block reads its own before it writes it.
    """

    def __init__(self, p: Problem, sums: Sums) -> None:
        def floats(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=p.x.device)

        self.of = sums
        self.fields = {n: floats(*size) for n, size in (sums.parts | sums.sums).items()}
        self.fields |= {n: fresh(p, *like) for n, like in sums.maps.items()}
        if sums.shares:
            self.fields["partial"] = floats(sums.shares)
        self.g = floats(sums.kept) if sums.kept else None

    def states(self, i: int) -> dict[str, Tensor]:
        """Where slice ``i`` finds and leaves the state's gradient."""
        if self.g is None:
            return {}
        found = {"g_in": self.g} if i < self.of.slices - 1 else {}
        return found | ({"g_out": self.g} if i > 0 else {})

    def done(self) -> None:
        """Gives back what no launch needs any more."""
        self.fields.pop("partial", None)
        self.g = None

    def total(self, name: str) -> Tensor:
        """The sum ``A``, ``D`` or ``bias``; ``B`` or ``C``, or the map of it that tokens have."""
        return self.fields[f"d{name}" if f"d{name}" in self.of.maps else f"sum_{name}"]
