"""How a CUDA scan is launched: what its kernels are compiled with and the struct that they read.

All of that but the addresses follows from the tensors' sizes, strides, dtypes and alignment: it is worked out once for
each such signature and kept, because Python would take longer over it than a GPU over a short scan.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvrtc
from kernels.selective_scan.cuda_shape import Shape, shape_of
from kernels.selective_scan.cuda_states import MOST, Part, reals
from kernels.selective_scan.cuda_sums import Sums
from kernels.selective_scan.problem import Problem
from kernels.selective_scan.triton_plan import Plan

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}

POINTERS = (
    "x", "dt", "A", "B", "C", "D", "z", "bias", "tokens", "bounds", "initial", "dfinal", "saved", "final", "y",
    "ends", "sums", "dy", "dx", "ddt", "dz", "dA", "dB", "dC", "dD", "dbias", "dinitial", "partial",
    "g_in", "g_out", "sum_A", "sum_B", "sum_C", "sum_D", "sum_bias",
)  # fmt: skip
INTEGERS = (
    "x_b", "x_l", "x_k", "dt_b", "dt_l", "dt_k", "z_b", "z_l",
    "B_b", "B_l", "B_k", "B_g", "B_n", "C_b", "C_l", "C_k", "C_g", "C_n",
    "t_b", "t_k", "per_row", "first", "sign", "K", "G", "N", "L", "P", "channels", "blocks", "segments", "slots",
    "lo", "hi", "add", "dy_k", "saved_n", "rows", "part_blocks",
)  # fmt: skip


PLACES = {n: i for i, n in enumerate(POINTERS + INTEGERS)}  # of each field in the struct
KEPT = 1024  # recipes
EARLY = ("backward", "reduce")  # kernels that follow each other, and start before the one before has ended

Fields = dict[str, "int | Tensor | None"]


@functools.cache
def source(name: str) -> str:
    """A kernel with what it shares with the others, and the struct of its arguments."""
    folder = Path(__file__).parent
    names = ("numbers.cuh", "common.cuh", "states.cuh", f"{name}.cu")
    files = ((folder / f"cuda_{n}").read_text() for n in names)
    return "\n".join([nvrtc.arguments(POINTERS, INTEGERS), *files])


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


def has_table(p: Problem) -> bool:
    """Whether the kernels look their steps up; else tokens are visited in order."""
    return not (p.route is None and p.code is None and p.cu_seqlens is None)


def shape_for(p: Problem, backward: bool, pairs: bool = False) -> Shape:
    """The ``Shape`` of a problem's kernels: of its first states where there are several parts."""
    pairs, state = pairs or p.is_complex, min(reals(p), MOST)
    scans, slots = p.sequences * p.routes * p.groups, p.slots // max(1, p.sequences)
    wide = p.x.dtype == torch.float32
    return shape_of(state, p.channels // p.groups, scans, slots, wide, backward, pairs, p.x.device, has_table(p))


@dataclass(frozen=True)
class Recipe:
    """What follows from the signature of a problem.

    Attributes:
        shape: How the scan is cut.
        macros: What all its kernels are compiled with.
        base: The struct, with zeros for addresses.
        sums: What the backward leaves in parts.
        kernels: Those used so far, by name and further macros.
    """

    shape: Shape
    macros: dict[str, str | int]
    base: array[int]
    sums: Sums
    kernels: dict[tuple[object, ...], nvrtc.Kernel] = field(default_factory=dict)


def macros_of(part: Part, dy: Tensor | None, shape: Shape) -> dict[str, str | int]:
    """``Recipe.macros``."""
    p = part.p
    rows = [t for t in (p.x, p.dt, p.z, dy) if t is not None]
    staged = vector(4, (p.channels // p.groups, shape.width, p.channels), rows)
    real = {n: TYPES[t.dtype] for n, t in (("TX", p.x), ("TDT", p.dt), ("TB", p.B), ("TC", p.C))}
    return {
        "ENDS": 0, "T": shape.part, "TY": "float", "HAS_INITIAL": 0, "EXACT": 0, "ADD": 0, **real,
        "FORWARD": dy is None, "PAIRS": part.pairs, "RESTARTS": p.code is not None,
        "S": shape.states, "CH": shape.each, "LN": shape.lanes,
        "NW": shape.warps, "EXTRA": shape.extra, "BLOCKS": shape.resident, "ROUNDS": shape.rounds,
        "V": staged if dy is None else min(2, staged),  # with 2, all threads of a block have gradients to write
        "VS": staged if shape.lanes < 8 else min(2, staged),  # 4 % faster with 64 states
        "VN": vector(4, (p.state, shape.states), [t for t in (p.B, p.C) if t.ndim == 5]),
        "TZ": "float" if p.z is None else TYPES[p.z.dtype], "HAS_D": p.D is not None, "HAS_Z": p.z is not None,
        "HAS_BIAS": p.dt_bias is not None, "CONST_B": p.B.ndim == 3, "CONST_C": p.C.ndim == 3,
        "SOFTPLUS": p.dt_softplus, "TABLE": has_table(p), "PACKED": p.cu_seqlens is not None,
        "WHOLE_N": p.state == shape.lanes * shape.states, "CUT": p.B.dtype == p.C.dtype == torch.bfloat16,
        "AT_TOKEN": p.route is None or p.route_params, "PRECISE": p.x.dtype == torch.float32,
    }  # fmt: skip


def integers_of(part: Part, shape: Shape) -> dict[str, int]:
    """Strides and sizes that every kernel reads."""
    p = part.p
    fields: dict[str, int] = {}
    for name, t in (("B", p.B), ("C", p.C)):
        strides = (0,) * 5 if t.ndim == 3 else t.stride()
        fields |= {f"{name}_{n}": s for n, s in zip("blkgn", strides, strict=True)}
    fields |= {f"x_{n}": s for n, s in zip("blk", p.x.stride(), strict=False)}
    fields |= {f"dt_{n}": s for n, s in zip("blk", p.dt.stride(), strict=False)}
    fields["x_k"] = p.x.stride(2) if p.x.shape[2] > 1 else 0
    if p.z is not None:
        fields |= {f"z_{n}": s for n, s in zip("bl", p.z.stride(), strict=False)}
    return fields | {
        "per_row": p.per_row, "first": p.positions - 1 if p.reverse else 0, "sign": -1 if p.reverse else 1,
        "K": p.routes, "G": p.groups, "N": p.state, "L": p.length, "P": p.positions, "channels": p.channels,
        "blocks": shape.blocks, "segments": shape.segments, "slots": p.slots, "lo": 0, "hi": p.per_row,
        "saved_n": part.of, "rows": p.sequences * shape.segments,
    }  # fmt: skip


def forward_macros(shape: Shape, exact: bool) -> dict[str, str | int]:
    """What both passes of the forward are compiled with, besides ``macros_of``."""
    return {"T": shape.tile, "EXACT": int(exact)}


def backward_macros(dy: Tensor, dx: Tensor, ddt: Tensor, dz: Tensor | None) -> dict[str, str | int]:
    """The same of the backward."""
    found = {"TDY": dy, "TDX": dx, "TDDT": ddt, "TDZ": dz}
    return {n: "float" if t is None else TYPES[t.dtype] for n, t in found.items()}


_recipes: dict[tuple[object, ...], Recipe] = {}


def signature(p: Problem, dy: Tensor | None) -> tuple[object, ...]:
    """What a recipe follows from."""
    tensors = (p.x, p.dt, p.A, p.B, p.C, p.D, p.z, p.dt_bias, dy)
    found = [t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors]
    others = [t if t is None else t.shape for t in (p.route, p.cu_seqlens, p.code)]
    return (*found, *others, p.dt_softplus, p.route_params, p.reverse, p.x.device)


def recipe_for(part: Part, dy: Tensor | None) -> Recipe:
    """The recipe of a part, made on first sight of its signature."""
    key = (*signature(part.p, dy), part.pairs, part.of)
    found = _recipes.get(key)
    if found is None:
        shape = shape_for(part.p, dy is not None, part.pairs)
        integers = integers_of(part, shape)
        sums = Sums(part.p, shape)
        integers["part_blocks"] = sums.part_blocks
        base = array("q", [0] * len(POINTERS) + [integers.get(n, 0) for n in INTEGERS])
        found = Recipe(
            shape, macros_of(part, dy, shape) | {"TOGETHER": sums.together, "ADDERS": sums.adders}, base, sums
        )
        if len(_recipes) >= KEPT:
            _recipes.clear()
        _recipes[key] = found
    return found


class Launch:
    """States of a problem on their way to the GPU.

    Attributes:
        p: The problem.
        shape: How it is cut.
        sums: What the backward leaves in parts.
    """

    def __init__(self, part: Part, dy: Tensor | None = None) -> None:
        self.part, self.p, self.recipe = part, part.p, recipe_for(part, dy)
        self.shape, self.sums = self.recipe.shape, self.recipe.sums

    @cached_property
    def inputs(self) -> Fields:
        """Addresses that every kernel reads, and how the table of steps lies."""
        p = self.p
        fields: Fields = {
            "x": p.x, "dt": p.dt, "z": p.z, "bounds": p.cu_seqlens,
            "B": p.B if p.B.ndim == 5 else dense_float32(p.B), "C": p.C if p.C.ndim == 5 else dense_float32(p.C),
            "A": dense_float32(p.A), "D": dense_float32(p.D), "bias": dense_float32(p.dt_bias),
            "initial": dense_float32(p.initial_state),
        }  # fmt: skip
        if has_table(p):
            table = Plan(p).tokens
            rows, routes, size = table.shape
            fields |= {"tokens": table, "t_b": routes * size if rows > 1 else 0, "t_k": size if routes > 1 else 0}
        return fields

    def kernel(self, name: str, shared: int, **macros: str | int) -> nvrtc.Kernel:
        """A kernel, compiled on first use."""
        recipe, key = self.recipe, (name, *macros.items())
        found = recipe.kernels.get(key)
        if found is None:
            defines = lines(tuple((recipe.macros | macros).items()))
            found = recipe.kernels[key] = nvrtc.kernel(source(name), name, defines, shared, name in EARLY)
        return found

    def start(self, name: str, blocks: int, threads: int, shared: int, fields: Fields, **macros: str | int) -> None:
        """Launches a kernel with ``inputs`` and ``fields``."""
        kernel, values = self.kernel(name, shared, **macros), self.recipe.base[:]
        for given in (self.inputs, fields):
            for n, v in given.items():
                if v is not None:
                    values[PLACES[n]] = v.data_ptr() if isinstance(v, Tensor) else v
        kernel(blocks, threads, values)

    @property
    def blocks(self) -> int:
        """Blocks of a scan: one a segment, route, group and channel blocks of all rounds."""
        p, shape = self.p, self.shape
        return p.sequences * shape.segments * p.routes * p.groups * shape.blocks // shape.rounds

    @property
    def threads(self) -> int:
        """Threads of a scan's block."""
        return 32 * (self.shape.warps + self.shape.extra)

    def backward_bytes(self, ends: bool) -> int:
        """Shared memory of the backward, or of its first pass."""
        return 4 * self.shape.backward_words(ends)

    def run(self, name: str, shared: int, fields: Fields, **macros: str | int) -> None:
        """Starts a scan."""
        self.start(name, self.blocks, self.threads, shared, fields, **macros)

    def carries(self, name: str, shared: int, more: Fields, **macros: str | int) -> Fields:
        """What the scan of each segment leaves, from zero: ``ends`` and ``sums``; nothing for one segment."""
        if self.shape.segments == 1:
            return {}
        p = self.p
        size = (p.sequences, self.shape.segments, p.routes, p.channels)
        sums = torch.empty(size, dtype=torch.float64 if self.part.pairs else torch.float32, device=p.x.device)
        found: Fields = {"ends": self.float32(*size, p.state), "sums": sums}
        self.run(name, shared, {**more, **found}, ENDS=1, **macros)
        return found

    def float32(self, *size: int) -> Tensor:
        """Memory."""
        return torch.empty(size, dtype=torch.float32, device=self.p.x.device)


def dense_float32(t: Tensor | None) -> Tensor | None:
    """As kernels read parameters."""
    return t if t is None else t.float().contiguous()
