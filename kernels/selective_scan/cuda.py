"""The selective scan on NVIDIA GPUs: CUDA C++ that NVRTC compiles at run time, for real numbers and up to 64 states.

    h_t = a_t h_{t-1} + dt_t B_t x_t,  a_t = exp(dt_t A),  y_t = <C_t, h_t> + D x_t        (Gu & Dao 2023, algorithm 2)

The kernels are in ``cuda_forward.cu`` and ``cuda_backward.cu``; ``triton.py`` is their plain Triton twin. Here is what
they are compiled and launched with, by rule on shapes, dtypes and alignment.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import nvrtc
from kernels.selective_scan.cuda_shape import Shape, properties, shape_of
from kernels.selective_scan.outputs import MapGradients, finished_y, fresh, new_y
from kernels.selective_scan.problem import CHUNK, Problem
from kernels.selective_scan.triton_plan import Plan

if TYPE_CHECKING:
    from kernels.selective_scan import Gradients

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
MAX_STATE = 64

POINTERS = (
    "x", "dt", "A", "B", "C", "D", "z", "bias", "tokens", "bounds", "initial", "dfinal", "saved", "final", "y",
    "ends", "sums", "dy", "dx", "ddt", "dz", "dA", "dB", "dC", "dD", "dbias", "dinitial", "partial",
)  # fmt: skip
INTEGERS = (
    "x_b", "x_l", "x_k", "dt_b", "dt_l", "dt_k", "z_b", "z_l",
    "B_b", "B_l", "B_k", "B_g", "B_n", "C_b", "C_l", "C_k", "C_g", "C_n",
    "t_b", "t_k", "per_row", "first", "sign", "K", "G", "N", "L", "channels", "blocks", "segments", "slots", "dy_k",
)  # fmt: skip


@functools.cache
def source(name: str) -> str:
    """A kernel with what it shares with the others, and the struct of its arguments."""
    fields = [f"void* {n};" for n in POINTERS] + [f"long long {n};" for n in INTEGERS]
    folder = Path(__file__).parent
    files = (folder / "cuda_common.cuh", folder / f"cuda_{name}.cu")
    return "\n".join([f"struct Args {{ {' '.join(fields)} }};", *(f.read_text() for f in files)])


def supports(p: Problem) -> bool:
    """Whether these kernels can take the problem; the Triton kernels take any."""
    if not p.x.is_cuda or p.is_complex or p.state > MAX_STATE or not nvrtc.available():
        return False
    tensors = [t for t in (p.x, p.dt, p.B, p.C, p.z) if t is not None]
    needed = 4 * Launch(p, p.x).shape.backward_words(ends=False)
    return all(t.dtype in TYPES for t in tensors) and needed <= properties(p.x.device)[1]


@functools.cache
def lines(macros: tuple[tuple[str, str | int], ...]) -> tuple[str, ...]:
    """What follows ``#define`` for each macro; flags as 0 or 1."""
    return tuple(f"{n} {int(v) if isinstance(v, bool) else v}" for n, v in macros)


def vector(widest: int, sizes: tuple[int, ...], tensors: list[Tensor]) -> int:
    """How many neighbours one load can take: the last dimension is dense, all else is a multiple of it."""
    for width in (4, 2, 1):
        fits = all(
            (width == 1 or t.stride(-1) == 1)
            and all(s % width == 0 for s in t.stride()[:-1])
            and t.data_ptr() % (width * t.element_size()) == 0
            for t in tensors
        )
        if width <= widest and fits and all(s % width == 0 for s in sizes):
            return width
    return 1


@dataclass(frozen=True)
class Launch:
    """A problem, the shape of its kernels and the arguments that they share.

    Attributes:
        p: The problem.
        dy: The gradient of y, for the backward.
    """

    p: Problem
    dy: Tensor | None = None

    @cached_property
    def shape(self) -> Shape:
        p = self.p
        scans, slots = p.sequences * p.routes * p.groups, p.slots // max(1, p.sequences)
        return shape_of(p.state, p.channels // p.groups, scans, slots, self.dy is not None, p.x.device)

    @cached_property
    def table(self) -> Tensor | None:
        """The entry of each step (see ``triton_steps``), or None where tokens are visited in order."""
        p = self.p
        return None if p.route is None and p.code is None and p.cu_seqlens is None else Plan(p).tokens

    @cached_property
    def vectors(self) -> tuple[int, int]:
        """V and VN, channels and states that one load takes."""
        p = self.p
        rows = [t for t in (p.x, p.dt, p.z, self.dy) if t is not None]
        channels = vector(4, (p.channels // p.groups, self.shape.width, p.channels), rows)
        states = vector(4, (p.state, self.shape.states), [t for t in (p.B, p.C) if t.ndim == 5])
        return channels, states

    def defines(self, **more: str | int) -> tuple[str, ...]:
        """The macros of a kernel."""
        p, shape = self.p, self.shape
        V, VN = self.vectors
        real = {n: TYPES[t.dtype] for n, t in (("TX", p.x), ("TDT", p.dt), ("TB", p.B), ("TC", p.C))}
        flags = {
            "S": shape.states, "LN": shape.lanes, "NW": shape.warps, "V": V, "VN": VN,
            "HELP": shape.help, "BLOCKS": shape.resident,
            "TZ": "float" if p.z is None else TYPES[p.z.dtype], "HAS_D": p.D is not None, "HAS_Z": p.z is not None,
            "HAS_BIAS": p.dt_bias is not None, "CONST_B": p.B.ndim == 3, "CONST_C": p.C.ndim == 3,
            "SOFTPLUS": p.dt_softplus, "TABLE": self.table is not None, "PACKED": p.cu_seqlens is not None,
            "AT_TOKEN": p.route is None or p.route_params, "PRECISE": p.x.dtype == torch.float32,
        }  # fmt: skip
        macros = {"ENDS": 0, "T": shape.part, "TY": "float", "HAS_INITIAL": 0, "HAS_FINAL": 0, "EXACT": 0}
        return lines(tuple((macros | real | flags | more).items()))

    @cached_property
    def shared(self) -> dict[str, int | Tensor | None]:
        """Fields that every kernel reads."""
        p, table = self.p, self.table
        float32 = {
            n: t if t is None else t.float().contiguous()
            for n, t in (("A", p.A), ("D", p.D), ("bias", p.dt_bias), ("initial", p.initial_state))
        }
        fields: dict[str, int | Tensor | None] = {"x": p.x, "dt": p.dt, "z": p.z, "tokens": table, **float32}
        fields["bounds"] = p.cu_seqlens
        for name, t in (("B", p.B), ("C", p.C)):
            constant = t.ndim == 3
            fields[name] = t.float().contiguous() if constant else t
            strides = (0,) * 5 if constant else t.stride()
            fields |= {f"{name}_{n}": s for n, s in zip("blkgn", strides, strict=True)}
        fields |= {f"x_{n}": s for n, s in zip("blk", p.x.stride(), strict=False)}
        fields |= {f"dt_{n}": s for n, s in zip("blk", p.dt.stride(), strict=False)}
        fields["x_k"] = p.x.stride(2) if p.x.shape[2] > 1 else 0
        if p.z is not None:
            fields |= {f"z_{n}": s for n, s in zip("bl", p.z.stride(), strict=False)}
        if table is not None:
            rows, routes, size = table.shape
            fields |= {"t_b": routes * size if rows > 1 else 0, "t_k": size if routes > 1 else 0}
        per_row = p.slots if p.cu_seqlens is not None else -(-p.positions // CHUNK)
        return fields | {
            "per_row": per_row, "first": p.positions - 1 if p.reverse else 0, "sign": -1 if p.reverse else 1,
            "K": p.routes, "G": p.groups, "N": p.state, "L": p.length, "channels": p.channels,
            "blocks": self.shape.blocks, "segments": self.shape.segments, "slots": p.slots,
        }  # fmt: skip

    def run(self, name: str, shared: int, fields: dict[str, int | Tensor | None], **macros: str | int) -> None:
        """Compiles a kernel on first use and launches it, a block a segment, route, group and channel block."""
        p = self.p
        programs = p.sequences * self.shape.segments * p.routes * p.groups * self.shape.blocks
        kernel = nvrtc.kernel(source(name), name, self.defines(**macros), shared)
        kernel(programs, 32 * self.shape.warps * self.shape.help, pack(self.shared | fields))

    def carries(self, name: str, shared: int, more: dict[str, int | Tensor | None], **macros: str | int) -> dict:
        """What the scan of each segment leaves, from zero: ``ends`` and ``sums``; nothing for one segment."""
        if self.shape.segments == 1:
            return {}
        p = self.p
        size = (p.sequences, self.shape.segments, p.routes, p.channels)
        found = {"ends": p.x.new_empty((*size, p.state), dtype=torch.float32),
                 "sums": p.x.new_empty(size, dtype=torch.float32)}  # fmt: skip
        self.run(name, shared, {**more, **found}, ENDS=1, **macros)
        return found

    def float32(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.p.x.device)


def pack(fields: dict[str, int | Tensor | None]) -> list[int]:
    """The struct: addresses, then integers."""
    values = (fields.get(n) for n in POINTERS + INTEGERS)
    return [0 if v is None else v.data_ptr() if isinstance(v, Tensor) else int(v) for v in values]


def dense(p: Problem) -> Problem:
    """The problem with channels next to each other; they nearly always are."""
    from dataclasses import replace

    changed = {n: t.contiguous() for n in ("x", "dt", "z") if (t := getattr(p, n)) is not None and t.stride(-1) != 1}
    return replace(p, **changed) if changed else p


def forward(p: Problem, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan.

    Args:
        p: The problem.
        exact: Whether the final state is wanted as exact as float32 is. The GPU's own exponential is off by up to two
            units in the last place, which a long memory adds up; y, rounded to 16 bits, doesn't show it.

    Returns:
        y ``(B, L, D)`` or ``(B, L, K, D)`` in x's dtype, the final state ``(S, K, D, N)``, and the state before each
        chunk ``(slots, K, N, D)``, zero in slots that belong to no chunk.
    """
    with torch.cuda.device(p.x.device):
        return _forward(dense(p), exact)


def _forward(p: Problem, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    launch = Launch(p)
    T = 16 if launch.shape.lanes == 1 else 32
    words = launch.shape.forward_words(T)
    saved = launch.float32(p.slots, p.routes, p.state, p.channels)
    if p.cu_seqlens is not None:
        saved.zero_()
    final = launch.float32(p.sequences, p.routes, p.channels, p.state)
    y = new_y(p)
    found = launch.carries("forward", 4 * words, {}, T=T, EXACT=int(exact))
    launch.run("forward", 4 * words, {"saved": saved, "final": final, "y": y, **found},
               T=T, EXACT=int(exact), TY=TYPES[y.dtype], HAS_INITIAL=p.initial_state is not None)  # fmt: skip
    return finished_y(p, y), final, saved


def backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    """Gradients of ``forward``.

    Args:
        p: The problem that forward solved.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, D, N)``, or None.
        saved: The states that forward saved.
    """
    with torch.cuda.device(p.x.device):
        return _backward(dense(p), dy, dstate, saved)


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    from kernels.selective_scan import Gradients

    dy = (dy.unsqueeze(2) if dy.ndim == 3 else dy).contiguous()
    launch = Launch(p, dy)
    maps = MapGradients.new(p)
    parts = (p.sequences, launch.shape.segments, p.routes, p.channels)
    dA = launch.float32(*parts, p.state)
    dB, dC = (launch.float32(*parts, p.state) if t.ndim == 3 else fresh(p, t.shape, t.dtype) for t in (p.B, p.C))
    dD, dbias = (None if t is None else launch.float32(*parts) for t in (p.D, p.dt_bias))
    dinitial = launch.float32(p.sequences, p.routes, p.channels, p.state)
    summed = p.B.ndim == 5 or p.C.ndim == 5
    partial = (
        launch.float32(launch.shape.blocks, p.slots * p.routes * p.groups * CHUNK * 2 * p.state) if summed else None
    )
    fields = {
        "dy": dy, "dy_k": dy.shape[2], "saved": saved, "dx": maps.x, "ddt": maps.dt, "dz": maps.z,
        "dA": dA, "dB": dB, "dC": dC, "dD": dD, "dbias": dbias, "dinitial": dinitial, "partial": partial,
        "dfinal": None if dstate is None else dstate.float().contiguous(),
    }  # fmt: skip
    macros: dict[str, str | int] = {
        "TDY": TYPES[dy.dtype],
        "TDX": TYPES[maps.x.dtype],
        "TDZ": "float" if maps.z is None else TYPES[maps.z.dtype],
        "HAS_FINAL": int(dstate is not None),
    }
    fields |= launch.carries("backward", 4 * launch.shape.backward_words(ends=True), fields, **macros)
    launch.run("backward", 4 * launch.shape.backward_words(ends=False), fields, **macros)
    if partial is not None:
        kernel = nvrtc.kernel(source("reduce"), "reduce", launch.defines(T=16), 0)
        kernel(-(-partial[0].numel() // 256), 256, pack(launch.shared | fields))
    return Gradients(
        x=maps.merged_x,
        dt=maps.dt,
        A=dA.sum((0, 1)),
        B=dB.sum((0, 1)) if p.B.ndim == 3 else dB,
        C=dC.sum((0, 1)) if p.C.ndim == 3 else dC,
        D=None if dD is None else dD.sum((0, 1)),
        z=maps.merged_z,
        dt_bias=None if dbias is None else dbias.sum((0, 1)),
        initial_state=None if p.initial_state is None else dinitial,
    )
