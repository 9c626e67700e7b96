"""An ``ssd`` problem laid out for its Triton kernels: tokens in scan order, memory, arguments and launches.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import dependent_launch
from kernels.plans import kept, launch_named
from kernels.selective_scan.problem import CHUNK as SLOT
from kernels.selective_scan.triton_steps import tokens_kernel
from kernels.ssd.triton_boxes import as_lines, rows_box
from kernels.ssd.triton_sizes import STATES, Segments, Sizes, power
from kernels.ssd.triton_states import carry_kernel, states_kernel
from kernels.ssd.triton_steps import steps_kernel

WORKSPACE = 320 << 20  # bytes for the states between chunks and segments in the backward; more take turns
WALKED = ("dy", "dy_box", "dfinal", "dinitial", "h_enter", "g_enter", "h_out", "h_box", "g_out", "g_box", "h_total",
          "g_total", "h_decay", "g_decay")  # tensors of ``states_kernel`` that not every launch has  # fmt: skip

Tensors = Mapping[str, Tensor | TensorDescriptor | None]


class Plan(Sizes):
    """A problem, its sizes, and the tensors and arguments that its kernels share."""

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

    def states(self, count: int) -> Tensor:
        """Memory for so many states of all heads, ``(count, K, H, P, N)``."""
        p = self.p
        return torch.empty((count, p.routes, p.heads, p.head_dim, p.state), dtype=p.dtype, device=p.x.device)

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

    def vectors(self, count: int) -> Tensor:
        """Memory for so many numbers a position and head, ``(count, B, K, H, chunks, Q)``."""
        p = self.p
        size = (count, self.rows, p.routes, p.heads, self.per_row, self.chunk)
        return torch.empty(size, dtype=p.dtype, device=p.x.device)

    @cached_property
    def ready(self) -> Tensor | None:
        """Whether each sharer has handed its state to the next one; ``steps_kernel`` says no."""
        sharing = self.share and not self.adjoint
        return torch.empty(self.sharers, dtype=torch.int32, device=self.p.x.device) if sharing else None

    @cached_property
    def handed(self) -> Tensor | None:
        """Those states."""
        size = (self.sharers, self.columns, self.width)
        return torch.empty(size, dtype=self.p.dtype, device=self.p.x.device) if self.share else None

    @cached_property
    def steps(self) -> Tensor:
        """dt and the exponents' running sums, see ``steps_kernel``."""
        steps = self.vectors(4 if self.folded else 3 if self.exact else 2)
        self.launch(
            steps_kernel, self.tiles, {"steps": steps, "ready": self.ready, **self.dt},
            lambda: {
                "plane": steps[0].numel(), "ADJOINT": self.adjoint, "PDL": self.early["PDL"],
                "sharers": 0 if self.ready is None else self.sharers, **self.dt_numbers,
            },
        )  # fmt: skip
        return steps

    @kept
    def early(self) -> dict[str, bool]:
        """Options of the forward's kernel, which may be launched before those in front of it have ended."""
        return dependent_launch(self.p.x)

    def by_chunk(self, t: Tensor, count: int = 1) -> Tensor:
        """Memory for ``count`` tensors like t a chunk, ``(count, chunks, ...)``."""
        return torch.empty((count, self.rows * self.per_row, *t.shape), dtype=self.p.dtype, device=t.device)

    @cached_property
    def shared(self) -> dict[str, Tensor | TensorDescriptor | None]:
        """Tensors of every kernel that walks chunks."""
        p = self.p
        columns = {"x": self.width, "B": p.state, "C": p.state}
        boxes = {f"{n}_box": rows_box(getattr(p, n), self.chunk, c) if self.boxed else None for n, c in columns.items()}
        return {
            "x": p.x, "B": p.B, "C": p.C, **boxes, "steps": self.steps, "tokens": self.tokens,
            "owner": self.owner,
        }  # fmt: skip

    def of_gradient(self, dy: Tensor | None) -> tuple[dict[str, Tensor | TensorDescriptor | None], dict[str, Any]]:
        """The tensors and the other arguments that go with a gradient of y ``(B, L, K or 1, H, P)``."""
        if dy is None:
            return {"dy": None, "dy_box": None}, {"ys": (0, 0, 0, 0, 0), "TMA": self.boxed}
        strides = (*dy.stride()[:2], dy.stride(2) if dy.shape[2] > 1 else 0, *dy.stride()[3:])
        boxed = self.boxed and not self.crowded and as_lines(dy)
        box = rows_box(dy, self.chunk, self.width) if boxed else None
        return {"dy": dy, "dy_box": box}, {"ys": strides, "TMA": boxed}

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
            "Bs": p.B.stride(), "Cs": p.C.stride(), "G": p.groups,
            "P": p.head_dim, "N": p.state, "blocks": -(-p.head_dim // self.width), "RESTART": p.code is not None,
            "PACKED": p.cu_seqlens is not None,
            "DOT": getattr(tl, str(self.product_dtype).removeprefix("torch.")),
            "NEAR": self.near, "FULL": self.full, "PRECISION": precision, "BP": self.width, "BN": self.columns,
            **self.order,
        }  # fmt: skip

    def walk(
        self, key: object, grid: tuple[int, ...], segments: Segments, tensors: Tensors, numbers: dict[str, Any]
    ) -> None:
        """Launches ``states_kernel`` with a grid of segments; ``key`` as in ``launch``."""
        p, blank = self.p, dict.fromkeys(WALKED)

        def rest() -> dict[str, Any]:
            return self.shared_numbers | {
                "first_segment": 0, "first_chunk": 0, "L": p.length, "HAS_INITIAL": self.initial is not None,
                "segments": segments.count, "length": segments.length,
                "BP": min(STATES, self.width), "blocks": self.blocks, "num_warps": 4,
                "num_stages": (2 if numbers["TMA"] else 3) if self.product_dtype == torch.bfloat16 else 1,
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
        of_gradient, numbers = self.of_gradient(dy)
        self.walk(
            ("entering", both), (count, 1 + both), segments,
            {"h_total": totals[0], "g_total": totals[-1], "dfinal": dfinal, **decays, **of_gradient},
            {"STORE": False, "BOTH": both, **numbers, "TMA": False},  # boxes take longer where nothing is stored
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
