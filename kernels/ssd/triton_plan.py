"""An ``ssd`` problem laid out for its Triton kernels: tokens in scan order, segments of rows, sizes by rule.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.plans import kept, launch_named
from kernels.selective_scan.cuda_shape import properties
from kernels.selective_scan.problem import CHUNK as SLOT
from kernels.selective_scan.triton_steps import tokens_kernel
from kernels.ssd.problem import Problem
from kernels.ssd.triton_states import carry_kernel, states_kernel
from kernels.ssd.triton_steps import steps_kernel

CHUNK = {torch.bfloat16: 64, torch.float32: 32, torch.float64: 16}  # Q by the dtype of products; all divide SLOT
SHORTEST = 8  # chunks of a segment in the forward, at least
SHORT = 32  # and in the backward, at most
STATES = 64  # rows of the state that a program of ``states_kernel`` holds
WORKSPACE = 320 << 20  # bytes for the states between chunks and segments in the backward; more take turns


WALKED = ("dy", "dfinal", "dinitial", "h_enter", "g_enter", "h_out", "g_out", "h_to_g", "h_total", "g_total", "h_decay",
          "g_decay")  # tensors of ``states_kernel`` that not every launch has  # fmt: skip

Tensors = dict[str, Tensor | None]


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


def row_strides(dy: Tensor | None) -> dict[str, tuple[int, ...]]:
    """The argument ``ys``: of a gradient of y ``(B, L, K or 1, H, P)``."""
    if dy is None:
        return {"ys": (0, 0, 0, 0, 0)}
    return {"ys": (*dy.stride()[:2], dy.stride(2) if dy.shape[2] > 1 else 0, *dy.stride()[3:])}


@dataclass(frozen=True)
class Plan:
    """A problem and the arguments that its kernels share.

    Attributes:
        p: The problem.
    """

    p: Problem

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

    @cached_property
    def tokens(self) -> Tensor | None:
        """The entry of each position, ``(B or 1, K or 1, slots * SLOT)`` int32; see ``triton_steps``."""
        p = self.p
        if not self.table:
            return None
        rows, routes = self.tables
        tokens = torch.empty((rows, routes, self.slots * SLOT), dtype=torch.int32, device=p.x.device)
        if tokens.numel():
            route, code = (t if t is None else t.contiguous() for t in (p.route, p.code))
            tokens_kernel[(rows * routes * self.slots,)](
                route, code, p.cu_seqlens, tokens, p.positions, routes, self.slots, p.sequences,
                p.sequences.bit_length() + 1, ROUTE=route is not None, CODE=code is not None,
                PACKED=p.cu_seqlens is not None, REVERSE=p.reverse,
            )  # fmt: skip
        return tokens

    @cached_property
    def owner(self) -> Tensor | None:
        """The packed sequence of each chunk, -1 for none, with one more at both ends: ``(chunks + 2,)`` int32."""
        p = self.p
        if p.cu_seqlens is None:
            return None
        bounds = p.cu_seqlens.long()
        first = bounds[:-1] // SLOT + torch.arange(p.sequences, device=bounds.device)
        slot = torch.arange(self.slots, device=bounds.device)
        s = (torch.searchsorted(first, slot, right=True) - 1).clamp(min=0)
        end = first + (bounds.diff() + SLOT - 1) // SLOT
        owner = torch.where((slot >= first[s]) & (slot < end[s]), s, -1).repeat_interleave(SLOT // self.chunk)
        return torch.nn.functional.pad(owner, (1, 1), value=-1).int()

    @kept
    def width(self) -> int:
        """BP, columns of x that a program of the forward or backward holds."""
        return min(power(self.p.head_dim), 64 if self.product_dtype.itemsize <= 4 else 32)

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
    def pipeline(self) -> dict[str, int]:
        """Warps and stages of the backward's kernel over chunks: more of both where shared memory holds them."""
        if self.stages == 1 or not self.p.x.is_cuda or torch.version.hip or properties(self.p.x.device)[1] < 200 << 10:
            return {"num_warps": self.warps, "num_stages": self.stages}
        return {"num_warps": 8, "num_stages": 3}

    @kept
    def segments(self) -> Segments:
        """How the forward cuts the rows: where there are fewer programs than multiprocessors, into two rounds."""
        programs, many = max(1, self.rows * self.programs), cores(self.p.x.device)
        return self.cut(max(SHORTEST, self.per_row * programs // (4 * many)))

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

    @cached_property
    def initial(self) -> Tensor | None:
        """The initial states ``(S, K, H, P, N)`` in the dtype of the scan."""
        return None if self.p.initial_state is None else self.p.initial_state.to(self.p.dtype).contiguous()

    @cached_property
    def A(self) -> Tensor:
        """``(K, H)`` in the dtype of the scan."""
        return self.p.A.to(self.p.dtype).contiguous()

    @cached_property
    def D(self) -> Tensor | None:
        return None if self.p.D is None else self.p.D.to(self.p.dtype).contiguous()

    @property
    def d_strides(self) -> tuple[int, int]:
        """Elements between the D of two heads and of two columns."""
        return (self.p.head_dim, 1) if self.p.D is not None and self.p.D.ndim == 3 else (1, 0)

    def states(self, count: int) -> Tensor:
        """Memory for so many states of all heads, ``(count, K, H, P, N)``."""
        p = self.p
        return torch.empty((count, p.routes, p.heads, p.head_dim, p.state), dtype=p.dtype, device=p.x.device)

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

    @cached_property
    def dt(self) -> dict[str, Tensor]:
        """Tensors of the two kernels that know dt: before all others, and after them in the backward."""
        p = self.p
        bias = self.A if p.dt_bias is None else p.dt_bias.to(p.dtype).contiguous()
        return {"dt": p.dt, "A": self.A, "dt_bias": bias, "tokens": self.present(self.tokens)}

    @property
    def dt_numbers(self) -> dict[str, Any]:
        """Their other arguments."""
        p, block = self.p, self.dt_block
        return {
            "ts": p.dt.stride(), "SOFTPLUS": p.dt_softplus, "CLAMP": p.clamped, "LOW": p.dt_limit[0],
            "HIGH": p.dt_limit[1], "HAS_BIAS": p.dt_bias is not None, "BH": block, "blocks": -(-p.heads // block),
            **self.order,
        }  # fmt: skip

    @kept
    def dt_block(self) -> int:
        """Heads of a program of these kernels."""
        return min(16, 1 << max(0, self.p.heads - 1).bit_length())

    def vectors(self, count: int) -> Tensor:
        """Memory for so many numbers a position and head, ``(count, B, K, H, chunks, Q)``."""
        p = self.p
        size = (count, self.rows, p.routes, p.heads, self.per_row, self.chunk)
        return torch.empty(size, dtype=p.dtype, device=p.x.device)

    @kept
    def tiles(self) -> tuple[int]:
        """The grid of the kernels that know dt."""
        return (self.rows * self.p.routes * self.per_row * -(-self.p.heads // self.dt_block),)

    @cached_property
    def steps(self) -> Tensor:
        """dt and the exponents' running sums, see ``steps_kernel``."""
        steps = self.vectors(2 + (self.exact or self.folded))
        self.launch(
            steps_kernel, self.tiles, {"steps": steps, **self.dt},
            lambda: {"plane": steps[0].numel(), **self.dt_numbers},
        )  # fmt: skip
        return steps

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
        p = self.p
        odd = p.positions % self.chunk or p.head_dim % self.width or p.state != power(p.state)
        return not self.table and not odd

    def by_chunk(self, t: Tensor) -> Tensor:
        """Memory for one tensor like t a chunk."""
        return torch.empty((self.rows * self.per_row, *t.shape), dtype=self.p.dtype, device=t.device)

    @cached_property
    def shared(self) -> dict[str, Tensor | None]:
        """Tensors of every kernel that walks chunks."""
        p = self.p
        return {"x": p.x, "z": p.z, "B": p.B, "C": p.C, "steps": self.steps, "tokens": self.tokens, "owner": self.owner}

    @property
    def shared_numbers(self) -> dict[str, Any]:
        """Their other arguments: strides, sizes, flags."""
        p = self.p
        x_k = p.x.stride(2) if p.x.shape[2] > 1 else 0
        nvidia = p.x.is_cuda and torch.version.hip is None
        short = power(p.state) <= 128  # in longer sums tensor cores, which cut them off, lose more than float32 does
        precision = "tf32x3" if nvidia and short and self.product_dtype == torch.float32 else "ieee"
        return {
            "plane": self.steps[0].numel(), "xs": (*p.x.stride()[:2], x_k, *p.x.stride()[3:]),
            "zs": (0, 0, 0, 0) if p.z is None else p.z.stride(), "Bs": p.B.stride(), "Cs": p.C.stride(), "G": p.groups,
            "P": p.head_dim, "N": p.state, "blocks": -(-p.head_dim // self.width), "RESTART": p.code is not None,
            "PACKED": p.cu_seqlens is not None, "HAS_Z": p.z is not None,
            "DOT": getattr(tl, str(self.product_dtype).removeprefix("torch.")),
            "NEAR": self.near, "FULL": self.full, "PRECISION": precision, "BP": self.width, "BN": power(p.state),
            **self.order,
        }  # fmt: skip

    @kept
    def blocks(self) -> int:
        """Programs that share a head's states."""
        return -(-self.p.head_dim // min(STATES, self.width))

    def walk(
        self, key: object, grid: tuple[int, ...], segments: Segments, tensors: Tensors, numbers: dict[str, Any]
    ) -> None:
        """Launches ``states_kernel`` with a grid of segments; ``key`` as in ``launch``."""
        p, blank = self.p, dict.fromkeys(WALKED)

        def rest() -> dict[str, Any]:
            return self.shared_numbers | {
                "first_segment": 0, "first_chunk": 0, "ADJOINT": False,
                "HAS_INITIAL": self.initial is not None, "segments": segments.count, "length": segments.length,
                "BP": min(STATES, self.width), "blocks": self.blocks, "num_warps": 4,
                "num_stages": 3 if self.product_dtype == torch.bfloat16 else 1,
                "HAS_DFINAL": tensors.get("dfinal") is not None, "FROM_H": tensors.get("h_enter") is not None,
                "FROM_G": tensors.get("g_enter") is not None, **numbers,
            }  # fmt: skip

        programs = p.routes * p.heads * self.blocks
        given = {**self.shared, **blank, "initial": self.initial, **tensors}
        self.launch(states_kernel, (grid[0] * programs, *grid[1:]), given, rest, key)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Tensors,
        others: Callable[[], dict[str, Any]],
        key: object = None,
    ) -> None:
        """``launch_named`` with ``present`` ones in place of absent tensors; ``key`` tells repeated launches apart."""
        found = {n: self.A if t is None else t for n, t in tensors.items()}
        launch_named(self.p.plan, (key,), kernel, grid, found, others)

    def present(self, argument: Any) -> Any:
        """Some memory in place of an absent tensor: kernels add offsets before they look."""
        return self.A if argument is None else argument

    def entering(
        self, segments: Segments, dy: Tensor | None = None, dfinal: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What enters each segment, ``(rows * segments, K, H, P, N)``; with dy also what its end gets back.

        Args:
            segments: How the rows are cut.
            dy: Gradient of y, ``(B, L, K or 1, H, P)``.
            dfinal: Gradient of the final states ``(S, K, H, P, N)``.
        """
        p, packed = self.p, self.p.cu_seqlens is not None
        if segments.count == 1 and not packed:
            return self.initial, dfinal
        both, count = dy is not None, self.rows * segments.count
        totals = [self.states(count) for _ in range(1 + both)]
        logs = [torch.empty((count, p.routes, p.heads), dtype=p.dtype, device=p.x.device) for _ in range(1 + both)]
        decays = dict(zip(("h_decay", "g_decay"), logs, strict=False))
        self.walk(
            ("entering", both), (count, 1 + both), segments,
            {"h_total": totals[0], "g_total": totals[-1], "dy": dy, "dfinal": dfinal, **decays},
            {"STORE": False, "BOTH": both, **row_strides(dy)},
        )  # fmt: skip
        size = p.routes * p.heads * p.head_dim * p.state
        initial = None if packed else self.initial  # packed sequences fetch theirs on the way
        dfinal = None if packed else dfinal
        self.launch(
            carry_kernel, (self.rows, -(-size // 256), 1 + both),
            {"h_total": totals[0], "g_total": totals[-1], "h_decay": logs[0], "g_decay": logs[-1],
             "initial": initial, "dfinal": dfinal},
            lambda: {
                "segments": segments.count, "size": size, "each": p.head_dim * p.state, "KH": p.routes * p.heads,
                "HAS_INITIAL": initial is not None, "HAS_DFINAL": dfinal is not None, "BOTH": both, "UNROLL": 8,
                "BE": 256, "num_warps": 2,
            },
            both,
        )  # fmt: skip
        return totals[0], totals[-1]
