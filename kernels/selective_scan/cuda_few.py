"""The selective scan over one state on NVIDIA GPUs, parallel over time inside a block (VMamba's scans have N = 1).

    h_t = a_t h_{t-1} + dt_t B_t x_t,  a_t = exp(dt_t A),  y_t = C_t h_t + D x_t        (Gu & Dao 2023, algorithm 2)

A thread that walks one state of a channel waits more than it works. Here a block's threads share a tile of positions:
each goes over a short run of them, and the recurrence over the runs, h <- (product of a) h + (end from zero), is the
same one again (Blelloch 1990), short enough for one warp. Routes that are summed are written in x's dtype, as their sum
is, and read back by a kernel that knows which tokens a route leaves out, so that no map has to be zeroed first.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels import nvrtc, plans
from kernels.checks import owned
from kernels.selective_scan.cuda import dense
from kernels.selective_scan.cuda_launch import KEPT, TYPES, Fields, dense_float32, has_table, lines, signature, vector
from kernels.selective_scan.cuda_shape import properties
from kernels.selective_scan.outputs import fresh
from kernels.selective_scan.problem import CHUNK, Problem
from kernels.selective_scan.triton_plan import Plan

if TYPE_CHECKING:
    from kernels.selective_scan import Gradients

LANES = 8  # threads that share a row of channels
CHANNELS = 4  # of a thread, at most

POINTERS = (
    "x", "dt", "A", "B", "C", "D", "z", "bias", "tokens", "bounds", "initial", "dfinal", "saved", "final", "y", "dy",
    "dx", "ddt", "dz", "dA", "dB", "dC", "dD", "dbias", "dinitial", "partial", "seen", "map", "merged", "rest",
)  # fmt: skip
INTEGERS = (
    "x_b", "x_l", "x_k", "dt_b", "dt_l", "dt_k", "z_b", "z_l", "B_b", "B_l", "B_k", "B_g", "C_b", "C_l", "C_k", "C_g",
    "t_b", "t_k", "per_row", "first", "sign", "batch", "L", "K", "G", "channels", "blocks", "slots", "dy_k",
)  # fmt: skip

_kernels: dict[tuple[object, ...], nvrtc.Kernel] = {}  # those used so far, by signature, name and further macros


class Shape(NamedTuple):
    """How a kernel cuts its tiles.

    Attributes:
        run: R, positions of a thread.
        warps: NW, of a block. A tile of the backward is a multiple of CHUNK: it starts from a saved state.
        resident: Blocks of a multiprocessor, which bounds the registers of a thread.
    """

    run: int
    warps: int
    resident: int


# By kernel, and whether registers hold little: 16-bit x and dt, no gate. Spilled registers cost more than fewer warps.
SHAPES = {
    ("forward", True): Shape(8, 4, 3),
    ("forward", False): Shape(4, 8, 2),
    ("backward", True): Shape(4, 8, 2),
    ("backward", False): Shape(4, 4, 3),
}


@functools.cache
def source(name: str) -> str:
    """``forward``, ``backward`` or ``merge`` with what they share, and the struct of their arguments."""
    folder = Path(__file__).parent
    names = ("numbers.cuh", "few_numbers.cuh", "few_layout.cuh", f"few_{name}.cu")
    parts = [(folder / f"cuda_{n}").read_text() for n in names]
    return "\n".join([nvrtc.arguments(POINTERS, INTEGERS), *parts])


def enough(state: int, width: int, scans: int, cores: int) -> bool:
    """Whether a problem that the CUDA kernels take is better off here.

    Args:
        state: N; only 1 is taken.
        width: Channels of a group.
        scans: Sequences times routes times groups.
        cores: Multiprocessors of the GPU: half of them should have a block, since no sequence is cut in segments here.
    """
    return state == 1 and 2 * scans * -(-width // (CHANNELS * LANES)) >= cores


def supports(p: Problem) -> bool:
    """``enough`` for a problem that ``cuda.supports``."""
    mixed = p.B.ndim == p.C.ndim == 5 and p.B.dtype != p.C.dtype
    scans = p.sequences * p.routes * p.groups
    return not (mixed or p.is_complex) and enough(p.state, p.channels // p.groups, scans, properties(p.x.device)[0])


@dataclass(frozen=True)
class Launch:
    """A problem and the arguments that its kernels share.

    Attributes:
        p: The problem, channels next to each other.
        dy: The gradient of y, for the backward.
    """

    p: Problem
    dy: Tensor | None = None

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """What the kernels' macros follow from."""
        return signature(self.p, self.dy)

    @cached_property
    def table(self) -> Tensor | None:
        """The entry of each step (see ``triton_steps``), or None where tokens are visited in order."""
        p = self.p
        return Plan(p).tokens if has_table(p) else None

    @cached_property
    def width(self) -> int:
        """V, channels of a thread."""
        p = self.p
        rows = [t for t in (p.x, p.dt, p.z, self.dy) if t is not None]
        return vector(CHANNELS, (p.channels // p.groups, p.channels), rows)

    @property
    def programs(self) -> int:
        """Blocks of a scan."""
        return self.p.sequences * self.p.routes * self.p.groups * self.blocks

    @cached_property
    def blocks(self) -> int:
        """Blocks that share the channels of a group."""
        return -(-(self.p.channels // self.p.groups) // (LANES * self.width))

    def shape(self, kernel: str) -> Shape:
        """The shape of ``forward`` or ``backward``."""
        p = self.p
        little = p.x.element_size() == p.dt.element_size() == 2 and p.z is None
        return SHAPES[kernel, little]

    def map(self, dtype: torch.dtype, merged: bool) -> Tensor:
        """Memory for rows ``(B, L, K, D)``; zeros where a kernel may leave out some and nobody looks after them."""
        p, size = self.p, (self.p.batch, self.p.length, self.p.routes, self.p.channels)
        return torch.empty(size, dtype=dtype, device=p.x.device) if merged else fresh(p, size, dtype)

    def defines(self, shape: Shape, **more: str | int) -> tuple[str, ...]:
        """The macros of a kernel."""
        p = self.p
        per_token = next((t for t in (p.B, p.C) if t.ndim == 5), p.x)
        types = {"TX": p.x, "TDT": p.dt, "TB": per_token, "TZ": p.x if p.z is None else p.z}
        flags = {
            "V": self.width, "R": shape.run, "NW": shape.warps, "BLOCKS": shape.resident,
            "HAS_D": p.D is not None, "HAS_Z": p.z is not None, "HAS_BIAS": p.dt_bias is not None,
            "CONST_B": p.B.ndim == 3, "CONST_C": p.C.ndim == 3, "SOFTPLUS": p.dt_softplus,
            "TABLE": has_table(p), "RESTARTS": p.code is not None, "PACKED": p.cu_seqlens is not None,
            "AT_TOKEN": p.route is None or p.route_params, "PRECISE": p.x.dtype == torch.float32, "EXACT": 0,
            "TY": TYPES[p.x.dtype],
        }  # fmt: skip
        return lines(tuple((flags | {n: TYPES[t.dtype] for n, t in types.items()} | more).items()))

    @cached_property
    def shared(self) -> Fields:
        """Fields that every kernel reads."""
        p, table = self.p, self.table
        fields: Fields = {"x": p.x, "dt": p.dt, "z": p.z, "tokens": table, "bounds": p.cu_seqlens}
        for name, t in (("A", p.A), ("D", p.D), ("bias", p.dt_bias), ("initial", p.initial_state)):
            fields[name] = dense_float32(t)
        for name, t in (("B", p.B), ("C", p.C)):
            constant = t.ndim == 3
            fields[name] = dense_float32(t) if constant else t
            strides = (0,) * 4 if constant else t.stride()[:4]
            fields |= {f"{name}_{n}": s for n, s in zip("blkg", strides, strict=True)}
        fields |= {f"x_{n}": s for n, s in zip("blk", p.x.stride(), strict=False)}
        fields |= {f"dt_{n}": s for n, s in zip("blk", p.dt.stride(), strict=False)}
        fields["x_k"] = p.x.stride(2) if p.x.shape[2] > 1 else 0
        if p.z is not None:
            fields |= {f"z_{n}": s for n, s in zip("bl", p.z.stride(), strict=False)}
        if table is not None:
            rows, routes, size = table.shape
            fields |= {"t_b": routes * size if rows > 1 else 0, "t_k": size if routes > 1 else 0}
        return fields | {
            "per_row": p.per_row,
            "first": p.positions - 1 if p.reverse else 0, "sign": -1 if p.reverse else 1, "batch": p.batch,
            "L": p.length, "K": p.routes, "G": p.groups, "channels": p.channels,
            "blocks": self.blocks, "slots": p.slots,
        }  # fmt: skip

    def run(self, kernel: str, blocks: int, fields: Fields, **macros: str | int) -> None:
        """Compiles a kernel on first use and launches it."""
        scans = kernel in ("forward", "backward")
        shape = self.shape(kernel if scans else "forward")
        key = (self.signature, kernel, *macros.items())
        compiled = _kernels.get(key)
        if compiled is None:
            compiled = nvrtc.kernel(source(kernel if scans else "merge"), kernel, self.defines(shape, **macros))
            if len(_kernels) >= KEPT:
                _kernels.clear()
            _kernels[key] = compiled
        values = ((self.shared | fields).get(n) for n in POINTERS + INTEGERS)
        numbers = (0 if v is None else v.data_ptr() if isinstance(v, Tensor) else int(v) for v in values)
        compiled(blocks, 32 * shape.warps if scans else 256, array("q", numbers))

    @cached_property
    def seen(self) -> Tensor:
        """``(B or 1, L, K)`` int8: whether a route, of several, visits a token."""
        p, table = self.p, self.table
        assert table is not None
        seen = torch.zeros((table.shape[0], p.length, p.routes), dtype=torch.int8, device=p.x.device)
        self.run("mark", -(-table.numel() // 256), {"seen": seen})
        return seen

    def merged(self, map: Tensor, rest: Tensor | None = None) -> Tensor:
        """The sum over the routes ``(B, L, D)``, in map's dtype; zeros in ``rest`` where a route leaves out a token."""
        p = self.p
        out = torch.empty((p.batch, p.length, p.channels), dtype=map.dtype, device=map.device)
        width = 8 if p.channels % 8 == 0 and map.element_size() == 2 else self.width  # V
        tokens = max(256 * width // p.channels, 1)  # of a block
        fields: Fields = {"seen": self.seen, "map": map, "merged": out, "rest": rest}
        self.run("merge", p.batch * -(-p.length // tokens), fields, V=width, TY=TYPES[map.dtype])
        return out

    def float32(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.p.x.device)


def forward(p: Problem, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan; see ``cuda.forward``.

    Args:
        p: The problem.
        exact: Whether the final state is wanted as exact as float32 is.

    Returns:
        y ``(B, L, D)`` or ``(B, L, K, D)`` in x's dtype, the final state ``(S, K, D, 1)``, and the state before each
        chunk ``(slots, K, 1, D)``, zero in slots that belong to no chunk.
    """
    with plans.on_device(p.x):
        return _forward(dense(p), exact)


def _forward(p: Problem, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    launch = Launch(p)
    saved = launch.float32(p.slots, p.routes, 1, p.channels)
    if p.cu_seqlens is not None:
        saved.zero_()
    final = launch.float32(p.sequences, p.routes, p.channels, 1)
    merge = p.merge and p.routes > 1
    y = launch.map(p.x.dtype, merge)
    launch.run("forward", launch.programs, {"saved": saved, "final": final, "y": y}, EXACT=int(exact))
    if merge:
        return launch.merged(y), final, saved
    return owned(y, (p.batch, p.length, p.channels)) if p.route is None or p.merge else y, final, saved


def backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    """Gradients of ``forward``.

    Args:
        p: The problem that forward solved.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, D, 1)``, or None.
        saved: The states that forward saved.
    """
    with plans.on_device(p.x):
        return _backward(dense(p), dy, dstate, saved)


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    from kernels.selective_scan import Gradients

    dy = (dy.unsqueeze(2) if dy.ndim == 3 else dy).contiguous()
    launch = Launch(p, dy)
    merge = p.routes > 1 and p.x.shape[2] == 1
    sparse = merge and p.route_params
    dx, ddt = launch.map(p.x.dtype, merge), launch.map(p.dt.dtype, sparse)
    dz = None if p.z is None else launch.map(p.z.dtype, p.routes > 1)
    parts = (p.sequences, p.routes, p.channels)
    dA, dinitial = launch.float32(*parts, 1), launch.float32(*parts, 1)
    dB, dC = (launch.float32(*parts, 1) if t.ndim == 3 else fresh(p, t.shape, t.dtype) for t in (p.B, p.C))
    dD, dbias = (None if t is None else launch.float32(*parts) for t in (p.D, p.dt_bias))
    positions = p.slots * p.routes * p.groups * CHUNK
    partial = None if p.B.ndim == p.C.ndim == 3 else launch.float32(launch.blocks, positions, 2)
    fields: Fields = {
        "dy": dy, "dy_k": dy.shape[2], "saved": saved, "dx": dx, "ddt": ddt, "dz": dz, "dA": dA, "dB": dB, "dC": dC,
        "dD": dD, "dbias": dbias, "dinitial": dinitial, "partial": partial,
        "dfinal": None if dstate is None else dstate.float().contiguous(),
    }  # fmt: skip
    types = {"TDY": dy.dtype, "TDX": dx.dtype, "TDZ": p.x.dtype if dz is None else dz.dtype}
    launch.run("backward", launch.programs, fields, **{n: TYPES[t] for n, t in types.items()})
    if partial is not None:
        launch.run("reduce", -(-positions // 256), fields)
    if dz is not None:
        dz = launch.merged(dz) if p.routes > 1 else dz.squeeze(2)
    return Gradients(
        x=launch.merged(dx, ddt if sparse else None).unsqueeze(2) if merge else dx,
        dt=ddt,
        A=dA.sum(0),
        B=dB.sum(0) if p.B.ndim == 3 else dB,
        C=dC.sum(0) if p.C.ndim == 3 else dC,
        D=None if dD is None else dD.sum(0),
        z=dz,
        dt_bias=None if dbias is None else dbias.sum(0),
        initial_state=None if p.initial_state is None else dinitial,
    )
