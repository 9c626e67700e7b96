"""Layers' steps over many rows as CUDA C++: products on tensor cores that do what surrounds them, and the scans' steps.

Each kernel is launched early and fetches weights and states before it waits for the one in front. That is safe for
states because one kernel of a step writes each of them, and a step begins with a kernel that waits for all before it.

Legend: as in ``kernels.decode.many``; E inner width, R dt rank.
"""

from __future__ import annotations

import functools
import struct
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels import nvrtc
from kernels.backend import is_hopper

if TYPE_CHECKING:
    from kernels.decode import Conv

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
ROWS = 64  # of a product's tile
MULTIPROCESSORS = 132
SHARED = 227 << 10  # bytes of shared memory that a block may have
SCAN_CHANNELS, SCAN_WARPS, SCAN_ROWS = 32, 4, 2  # of a block, of a thread
HEAD_STATES = 8 << 10  # bytes of a head's state that a warp works on
POINTERS = {
    "product": (
        "x", "weight", "bias", "conv_weight", "conv_bias", "conv_state", "residual", "next_weight", "squares", "y",
        "total", "sums",
    ),
    "scan": ("low", "x", "z", "dt_weight", "dt_bias", "A_log", "D", "state", "y"),
    "heads": (
        "x", "keys", "queries", "z", "dt", "dt_bias", "A_log", "D", "norm_weight", "state", "y", "squares",
    ),
}  # fmt: skip
INTEGERS = {
    "product": ("B", "O", "x_b", "first", "C", "eps"),
    "scan": ("B", "E", "x_b", "z_b"),
    "heads": ("heads", "per_group", "x_b", "z_b", "dt_b", "least", "most"),
}


class Tile(NamedTuple):
    """How a product is cut.

    Attributes:
        parts: S, blocks of a cluster, each with its part of the inputs.
        outputs: BO, of a cluster.
    """

    parts: int
    outputs: int


def product_fits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, conv: Conv | None = None, squares: Tensor | None = None
) -> bool:
    """Whether ``product`` and ``add`` take them: 16 bits throughout, vectors of 8, a tile of these sizes."""
    given = (weight, bias, *((conv.weight, conv.bias, conv.state) if conv is not None else ()))
    if any(t is not None and not (t.dtype == x.dtype and _dense(t)) for t in given):
        return False
    if squares is not None and not (squares.dtype == torch.float32 and squares.is_contiguous()):
        return False
    whole = _aligned(x) and len(weight) % 8 == 0
    if conv is not None:
        whole &= conv.first % 4 == 0 and len(conv.weight) % 4 == 0 and 1 <= conv.weight.shape[1] <= 8
    return whole and _has_kernels(x) and tile_of(x.shape[1], len(weight)) is not None


def scan_fits(low: Tensor, x: Tensor, z: Tensor, dt_weight: Tensor, A_log: Tensor, state: Tensor) -> bool:
    """Whether ``scan`` takes them: whole vectors, up to 32 states and ranks up to 128, up to 8 parts in float32."""
    (inner, rank), n = dt_weight.shape, A_log.shape[1]
    sizes = inner % SCAN_CHANNELS == 0 and rank % 8 == 0 and rank <= 128 and n % 8 == 0 and n <= 32
    dense = all(_dense(t) for t in (low, dt_weight, A_log, state))
    sizes &= low.shape[1] <= 8
    kinds = low.dtype == torch.float32 and x.dtype == z.dtype == dt_weight.dtype and state.dtype in TYPES
    return sizes and dense and kinds and x.stride(1) == z.stride(1) == 1 and _has_kernels(x)


def heads_fit(x: Tensor, state: Tensor, norm_weight: Tensor | None, *small: Tensor | None) -> bool:
    """Whether ``heads`` takes them: 16 bits, heads of up to 128 channels, of up to 32 KiB of state."""
    if norm_weight is not None and norm_weight.dtype != x.dtype:
        return False
    if any(t is not None and not (t.dtype in TYPES and t.is_contiguous()) for t in (norm_weight, *small)):
        return False
    width, states = state.shape[2:]
    vector = 16 // state.element_size()
    lanes = states // vector
    whole = states % vector == 0 and 0 < lanes <= 64 and lanes & (lanes - 1) == 0 and width % 8 == 0 and width <= 128
    held = width * states * state.element_size() <= 32 << 10 and state.dtype in TYPES and _dense(state)
    return whole and held and _aligned(x) and _has_kernels(x)


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() and t.data_ptr() % 16 == 0


def _aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def _has_kernels(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and is_hopper(x.device) and nvrtc.available()


@functools.cache
def source(name: str) -> str:
    """A kernel with what it shares with the others, and the struct of its arguments."""
    here = Path(__file__).parent
    numbers = (here.parent / "selective_scan" / "cuda_numbers.cuh").read_text()
    files = ((here / n).read_text() for n in ("rows.cuh", f"rows_{name}.cu"))
    return "\n".join([numbers, nvrtc.arguments(POINTERS[name], INTEGERS[name]), *files])


@functools.cache
def tile_of(inputs: int, outputs: int) -> Tile | None:
    """The fewest parts with which blocks are on a third of the multiprocessors, and all at once; None if none is so."""
    for tile in (Tile(2, 64), Tile(4, 64), Tile(8, 64)):
        size, blocks = shared(inputs, tile) + 1024, -(-outputs // tile.outputs) * tile.parts
        at_once = MULTIPROCESSORS * (SHARED // size)
        if inputs % (16 * tile.parts) == 0 and MULTIPROCESSORS // 3 <= blocks <= at_once:
            return tile
    return None


def shared(inputs: int, tile: Tile) -> int:
    """Bytes of shared memory of a block: weights and inputs, sums, scales."""
    line = inputs // tile.parts + 8  # neighbouring lines begin in other banks
    return 2 * (ROWS + tile.outputs) * line + 4 * ROWS * (tile.outputs + 4) + 4 * ROWS


def product_macros(
    dtype: torch.dtype, y: torch.dtype, stream: torch.dtype, inputs: int, tile: Tile, *, conv: int = 0,
    adds: bool = False, bias: bool = False, squares: int = 0,
) -> tuple[str, ...]:  # fmt: skip
    """What ``rows_product.cu`` is compiled with."""
    per = inputs // tile.parts
    chunk = next(size for size in (192, 128, 96, 64, 48, 32, 16) if per % size == 0)
    return _lines(
        X=TYPES[dtype], Y=TYPES[y], R=TYPES[stream], K=inputs, S=tile.parts, BO=tile.outputs, CHUNK=chunk, CONV=conv,
        ADDS=int(adds), BIAS=int(bias), SQUARES=squares,
    )  # fmt: skip


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor | None, eps: float, *, conv: Conv | None = None,
    wide: bool = False,
) -> Tensor:  # fmt: skip
    """``kernels.decode.many.multiply_rows``; the output is float32 if ``wide``."""
    dtype = torch.float32 if wide else x.dtype
    y = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    _product(x, weight, bias, squares, eps, {"y": y}, conv=conv)
    return y


def add(
    x: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor | None, eps: float, residual: Tensor,
    norm_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``kernels.decode.many.add_rows``: the rows and squares that are pending, and the stream."""
    tile = tile_of(x.shape[1], len(weight))
    assert tile is not None
    parts = -(-len(weight) // tile.outputs) * tile.parts
    rows = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(len(x), parts, dtype=torch.float32, device=x.device)
    total = torch.empty_like(residual)
    given = {"residual": residual, "next_weight": norm_weight, "y": rows, "sums": sums, "total": total}
    _product(x, weight, bias, squares, eps, given)
    return rows, sums, total


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor | None, eps: float, given: dict[str, Tensor], *,
    conv: Conv | None = None,
) -> None:  # fmt: skip
    (batch, inputs), outputs = x.shape, len(weight)
    tile, stream = tile_of(inputs, outputs), given.get("residual")
    assert tile is not None
    lines = product_macros(
        x.dtype, given["y"].dtype, x.dtype if stream is None else stream.dtype, inputs, tile,
        conv=0 if conv is None else conv.weight.shape[1], adds=stream is not None, bias=bias is not None,
        squares=0 if squares is None else squares.shape[1],
    )  # fmt: skip
    fields: dict[str, Tensor | int | None] = {"x": x, "weight": weight, "bias": bias, "squares": squares, **given}
    fields |= {"B": batch, "O": outputs, "x_b": x.stride(0), "eps": _bits(eps)}
    if conv is not None:
        fields |= {"conv_weight": conv.weight, "conv_bias": conv.bias, "conv_state": conv.state, "first": conv.first}
        fields["C"] = len(conv.weight)
    blocks = -(-outputs // tile.outputs) * -(-batch // ROWS) * tile.parts
    _launch("product", lines, shared(inputs, tile), blocks, 256, fields)


def scan_macros(
    dtype: torch.dtype, state: torch.dtype, A: torch.dtype, D: torch.dtype, bias: torch.dtype, rank: int, n: int,
    parts: int,
) -> tuple[str, ...]:  # fmt: skip
    """What ``rows_scan.cu`` is compiled with."""
    return _lines(
        X=TYPES[dtype], H=TYPES[state], A_T=TYPES[A], D_T=TYPES[D], B_T=TYPES[bias], RANK=rank, N=n, PARTS=parts,
        ROWS=SCAN_ROWS,
    )  # fmt: skip


def scan(
    low: Tensor, x: Tensor, z: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """``kernels.decode.scan_step``."""
    batch, inner = x.shape
    y = torch.empty(batch, inner, dtype=x.dtype, device=x.device)
    rank, n = dt_weight.shape[1], A_log.shape[1]
    lines = scan_macros(x.dtype, state.dtype, A_log.dtype, D.dtype, dt_bias.dtype, rank, n, low.shape[1])
    fields: dict[str, Tensor | int | None] = {
        "low": low, "x": x, "z": z, "dt_weight": dt_weight, "dt_bias": dt_bias, "A_log": A_log, "D": D, "state": state,
        "y": y, "B": batch, "E": inner, "x_b": x.stride(0), "z_b": z.stride(0),
    }  # fmt: skip
    blocks = inner // SCAN_CHANNELS * -(-batch // (SCAN_WARPS * SCAN_ROWS))
    _launch("scan", lines, 0, blocks, 32 * SCAN_WARPS, fields)
    return y


def heads_warps(state: torch.dtype, width: int, n: int) -> int:
    """Warps of a block of ``rows_heads.cu``: a thread for each channel, and no more state a warp than HEAD_STATES."""
    return max(-(-width // 32), -(-width * n * state.itemsize // HEAD_STATES))


def heads_macros(
    dtype: torch.dtype, state: torch.dtype, A: torch.dtype, D: torch.dtype, bias: torch.dtype, width: int, n: int,
    norm: int, wide_D: bool,
) -> tuple[str, ...]:  # fmt: skip
    """What ``rows_heads.cu`` is compiled with."""
    return _lines(
        X=TYPES[dtype], H=TYPES[state], A_T=TYPES[A], D_T=TYPES[D], B_T=TYPES[bias], P=width, N=n, NORM=norm,
        D_WIDE=int(wide_D), WARPS=heads_warps(state, width, n),
    )  # fmt: skip


def heads(
    x: Tensor, B: Tensor, C: Tensor, z: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor | None,
    norm_weight: Tensor | None, state: Tensor, norm_before_gate: bool, dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``kernels.decode.many.heads_step``: its output, and sums of squares if there is a norm."""
    batch, count, width, n = state.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    squares = None
    if norm_weight is not None:
        squares = torch.empty(batch, count * -(-width // 32), dtype=torch.float32, device=x.device)
    norm = 0 if norm_weight is None else 2 if norm_before_gate else 1
    wide_D = D is not None and D.numel() != count
    kind = torch.float32 if D is None else D.dtype
    lines = heads_macros(x.dtype, state.dtype, A_log.dtype, kind, dt_bias.dtype, width, n, norm, wide_D)
    fields: dict[str, Tensor | int | None] = {
        "x": x, "keys": B, "queries": C, "z": z, "dt": dt, "dt_bias": dt_bias, "A_log": A_log, "D": D,
        "norm_weight": norm_weight, "state": state, "y": y, "squares": squares, "heads": count,
        "per_group": count * n // B.shape[1], "x_b": x.stride(0), "z_b": z.stride(0), "dt_b": dt.stride(0),
        "least": _bits(dt_limit[0]), "most": _bits(dt_limit[1]),
    }  # fmt: skip
    held, warps = width * n * state.element_size(), heads_warps(state.dtype, width, n)
    _launch("heads", lines, held, batch * count, 32 * warps, fields)
    return y, squares


def _launch(
    name: str, lines: tuple[str, ...], dynamic: int, blocks: int, threads: int, fields: dict[str, Tensor | int | None]
) -> None:
    """Launches kernel ``<name>_rows``; fields that are not given are zero."""
    given = (fields.get(n) for n in POINTERS[name] + INTEGERS[name])
    values = array("q", (v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in given))
    nvrtc.kernel(source(name), f"{name}_rows", lines, dynamic, early=True)(blocks, threads, values)


def _lines(**values: str | int) -> tuple[str, ...]:
    return tuple(f"{name} {value}" for name, value in values.items())


def _bits(value: float) -> int:
    """A float32's bits, for a whole number's field."""
    return struct.unpack("i", struct.pack("f", value))[0]
