"""The sizes of ``ssd``'s Triton kernels, by rule: how positions lie in chunks, rows in segments, work in programs.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kernels.backend import is_hopper
from kernels.plans import kept
from kernels.selective_scan.cuda_shape import properties
from kernels.selective_scan.problem import CHUNK as SLOT
from kernels.ssd.problem import Problem
from kernels.ssd.triton_boxes import as_lines

CHUNK = {torch.bfloat16: 64, torch.float32: 32, torch.float64: 16}  # Q by the dtype of products; all divide SLOT
SHORTEST = 8  # chunks of a segment in the forward, at least
SHORT = 32  # and in the backward, at most
PIECE = 64  # columns of a large state, or of one in float32, that a program of ``outer`` holds
# Columns of bfloat16 tiles, at least: where they are narrower, ptxas 12.8 mixes up the addresses of Hopper's products.
NARROWEST = 32
BY_ADDRESS = 64  # of tiles that are not copied in boxes
STATES = 64  # rows of the state that a program of ``states_kernel`` holds


class Segments(NamedTuple):
    """How each row is cut: ``count`` segments of ``length`` chunks, the last one maybe shorter."""

    count: int
    length: int


def cores(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return properties(device)[0] if device.type == "cuda" else 128


def power(n: int) -> int:
    """The smallest tile side that holds n: a power of two, at least 16 as matrix products want it."""
    return max(16, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Sizes:
    """What follows from the signature of a problem alone.

    Attributes:
        p: The problem.
        adjoint: Whether its backward is meant.
    """

    p: Problem
    adjoint: bool = False

    @kept
    def product_dtype(self) -> torch.dtype:
        """What the tensor cores multiply: bfloat16 if all rows are, else the dtype of the scan.

        float16 would overflow in the products of gradients; Triton's interpreter has no bfloat16 products.
        """
        p = self.p
        low = all(t.dtype == torch.bfloat16 for t in (p.x, p.B, p.C)) and p.x.device.type != "cpu"
        return torch.bfloat16 if low else p.dtype

    @kept
    def chunk(self) -> int:
        """Q: half as long for large states, whose tiles would not fit into shared memory."""
        return CHUNK[self.product_dtype] // (2 if power(self.p.state) > 128 and self.product_dtype.itemsize < 8 else 1)

    @kept
    def exact(self) -> bool:
        """Whether sums of exponents are kept in two parts; bfloat16 products have no use for that."""
        return self.product_dtype != torch.bfloat16

    @kept
    def folded(self) -> bool:
        """Whether log2(dt) can go into the exponents: no dt is negative."""
        low, high = self.p.dt_limit
        return not self.exact and (self.p.dt_softplus or low >= 0) and high >= 0

    @kept
    def weighed(self) -> bool:
        """Whether the backward can take log2(dt) into the exponents too, and divide by dt at last: it is never zero."""
        return self.folded and self.p.dt_softplus

    @kept
    def table(self) -> bool:
        """Whether the kernels read tokens from a table."""
        return any(t is not None for t in (self.p.route, self.p.code, self.p.cu_seqlens))

    @property
    def rows(self) -> int:
        """Rows of tokens: one if sequences are packed."""
        return self.p.batch

    @kept
    def slots(self) -> int:
        """Stretches of SLOT positions in a row; a packed sequence starts a new one."""
        whole = -(-self.p.positions // SLOT)
        return whole + self.p.sequences if self.p.cu_seqlens is not None else whole

    @kept
    def per_row(self) -> int:
        """Chunks of a row."""
        return self.slots * (SLOT // self.chunk) if self.table else -(-self.p.positions // self.chunk)

    @property
    def tables(self) -> tuple[int, int]:
        """Rows and routes whose tokens differ."""
        p = self.p
        return 1 if p.code is None else p.batch, 1 if p.route is None else p.routes

    @kept
    def boxed(self) -> bool:
        """Whether tiles of x, B and C go by bulk copies: nothing needs a mask, nothing has gaps."""
        p, columns, width = self.p, *self.sides(NARROWEST)
        plain = self.product_dtype == torch.bfloat16 and is_hopper(p.x.device) and not p.reverse
        if self.adjoint and self.crowded and columns < BY_ADDRESS:  # ``chunks_kernel`` takes none then
            return False
        return plain and self.fills(columns, width) and all(as_lines(t) for t in (p.x, p.B, p.C))

    @kept
    def narrowest(self) -> int:
        """Columns that a tile has at least."""
        if self.product_dtype != torch.bfloat16:
            return 0
        return BY_ADDRESS if is_hopper(self.p.x.device) and not self.boxed else NARROWEST

    def sides(self, narrowest: int) -> tuple[int, int]:
        """BN and BP, if tiles have so many columns at least."""
        wide = 64 if self.product_dtype.itemsize <= 4 else 32
        return max(power(self.p.state), narrowest), max(min(power(self.p.head_dim), wide), narrowest)

    @kept
    def columns(self) -> int:
        """BN, columns of a tile that holds whole states."""
        return self.sides(self.narrowest)[0]

    @kept
    def width(self) -> int:
        """BP, columns of x that a program of the forward or backward holds."""
        return self.sides(self.narrowest)[1]

    @kept
    def programs(self) -> int:
        """Programs of one segment in the forward."""
        return self.p.routes * self.p.heads * -(-self.p.head_dim // self.width) if self.p.groups else 0

    @property
    def warps(self) -> int:
        return 4 if power(self.p.state) <= 128 and self.product_dtype == torch.bfloat16 else 8

    @property
    def stages(self) -> int:
        return 2 if power(self.p.state) <= 128 and self.product_dtype == torch.bfloat16 else 1

    @kept
    def piece(self) -> int:
        """Columns of the state that a program of the backward's ``outer`` holds."""
        state = self.columns
        return state if state <= 128 and self.product_dtype == torch.bfloat16 else min(state, PIECE)

    @kept
    def roomy(self) -> bool:
        """Whether shared memory holds two programs of the backward's ``chunks_kernel`` with a stage more."""
        x = self.p.x
        return x.is_cuda and torch.version.hip is None and properties(x.device)[1] >= 200 << 10

    @kept
    def crowded(self) -> bool:
        """Whether a head's tiles of x and dy are too many to copy the next ones ahead."""
        return -(-self.p.head_dim // self.sides(NARROWEST)[1]) > 2

    @kept
    def pipeline(self) -> dict[str, int]:
        """Warps and stages of the backward's ``chunks_kernel``."""
        stages = 1 if self.crowded else self.stages
        more = int(self.roomy and stages > 1 and self.p.head_dim <= self.width)
        return {"num_warps": self.warps, "STAGES": stages, "INNER_STAGES": stages + more}

    @kept
    def segments(self) -> Segments:
        """How the forward cuts the rows: where there are fewer programs than multiprocessors, into two rounds.

        No program more: two fit into a multiprocessor, and a third round would take as long for a few as for all.
        """
        programs, many = max(1, self.rows * self.programs), cores(self.p.x.device)
        return self.cut(max(SHORTEST, -(-self.per_row // max(1, 4 * many // programs))))

    @kept
    def share(self) -> int:
        """Chunks that a program of the forward takes where all share the chunks of all rows evenly; else 0.

        Two programs fit into a multiprocessor. A last round of a few takes as long as one of all, and even shares cost
        5 %: rows at different chunks find less of B and C in the cache.
        """
        units, fit = self.rows * self.programs, 2 * cores(self.p.x.device)
        uneven = units > fit and -units % fit > units // 10
        resettable = self.tiles[0] >= fit  # by the kernel in front, a flag a program
        if self.p.cu_seqlens is not None or self.warps > 4 or not (uneven and resettable):
            return 0
        return -(-units * self.per_row // fit)

    @kept
    def sharers(self) -> int:
        """Programs that share them."""
        return -(-self.rows * self.programs * self.per_row // self.share) if self.share else 0

    @kept
    def short_segments(self) -> Segments:
        """How the backward does, which keeps the states of a few segments at a time: then more, shorter ones."""
        return self.cut(SHORT)

    def cut(self, length: int) -> Segments:
        """Segments of this length where the rows alone would not fill the GPU; else every row is one."""
        if not self.per_row or self.rows * self.programs >= cores(self.p.x.device):
            return Segments(1, self.per_row)
        even = -(-self.per_row // -(-self.per_row // length))
        return Segments(-(-self.per_row // even), even)

    @property
    def d_numbers(self) -> dict[str, Any]:
        """The arguments that go with D: elements from one head to the next, and whether each column has its own."""
        D = self.p.D
        wide = D is not None and D.ndim == 3
        return {"d_h": self.p.head_dim if wide else 1, "HAS_D": D is not None, "WIDE_D": wide}

    @property
    def order(self) -> dict[str, Any]:
        """How positions, tokens and chunks belong together."""
        p = self.p
        rows, routes, size = *self.tables, self.slots * SLOT
        return {
            "t_b": routes * size if rows > 1 else 0, "t_k": size if routes > 1 else 0, "per_row": self.per_row,
            "K": p.routes, "H": p.heads, "T": p.positions, "first": p.positions - 1 if p.reverse else 0,
            "sign": -1 if p.reverse else 1, "TABLE": self.table, "Q": self.chunk,
            "EXACT": self.exact, "FOLDED": self.folded,
        }  # fmt: skip

    @kept
    def dt_block(self) -> int:
        """Heads of a program of these kernels."""
        return min(8, 1 << max(0, self.p.heads - 1).bit_length())

    @kept
    def tiles(self) -> tuple[int]:
        """The grid of the kernels that know dt."""
        return (self.rows * self.p.routes * self.per_row * -(-self.p.heads // self.dt_block),)

    @kept
    def near(self) -> bool:
        """Whether the offsets in a chunk, which are one behind the other then, fit in 32 bits."""
        p = self.p
        wide = p.routes * p.heads * max(p.head_dim, 1)
        strides = [abs(s) for t in (p.x, p.z, p.B, p.C) if t is not None for s in t.stride()]
        return not self.table and SLOT * max(wide, *strides) < 2**30

    @kept
    def full(self) -> bool:
        """Whether every tile of x, B and C is full, so that nothing needs a mask."""
        return self.fills(self.columns, self.width)

    def fills(self, columns: int, width: int) -> bool:
        """The same for tiles of these sides."""
        odd = self.p.positions % self.chunk or self.p.head_dim % width or self.p.state != columns
        return not self.table and not odd

    @kept
    def blocks(self) -> int:
        """Programs that share a head's states."""
        return -(-self.p.head_dim // min(STATES, self.width))
