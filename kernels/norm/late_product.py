"""``kernels.norm.late`` with the product in front of it, on Hopper GPUs in CUDA C++: one kernel for what were two.

A norm wants all outputs of a row, a tile of tensor cores' sums has some. Clusters of blocks have all of them between
them, and tell each other their sums of squares; while one half of a block's warps adds to the residual stream and
normalises, the other multiplies. (Gluon has no tiles of 192 columns and no copies to all blocks of a cluster.)

Legend: M rows, K channels in front of the product, D behind it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import nvrtc
from kernels.boxes import described

POINTERS = ("squares", "residual", "norm_weight", "y", "total")
INTEGERS = ("M", "share", "inner_eps", "eps")
THREADS = 384
BFLOAT16, SWIZZLE, PROMOTION = 9, 3, 2  # of cuTensorMapEncodeTiled: the dtype, in 128 bytes, to 128 bytes in L2


class Tile(NamedTuple):
    """How the product is cut.

    Attributes:
        outputs: TN, of a block.
        columns: Blocks of a cluster side by side, D together.
        rows: Blocks of a cluster below each other, of 128 rows each.
        stages: Tiles of x and weight that are on their way at once.
        batch: Vectors of the stream that a thread asks for at once.
        prefetch: Whether the stream is asked for in L2 while the product begins.
    """

    outputs: int
    columns: int
    rows: int
    stages: int
    batch: int = 6
    prefetch: bool = True


TILES = {768: Tile(192, 4, 1, 4)}  # by D
LEAST = 1 << 14  # rows; with fewer there is nothing to do for one half of the warps


def macros(tile: Tile, inputs: int, parts: int) -> tuple[str, ...]:
    """What ``late_product.cu`` is compiled with."""
    values = {
        "TN": tile.outputs, "COLS": tile.columns, "ROWS": tile.rows, "STAGES": tile.stages, "BATCH": tile.batch,
        "PREFETCH": int(tile.prefetch), "STEPS": inputs // 64, "PARTS": parts,
    }  # fmt: skip
    return tuple(f"{name} {value}" for name, value in values.items())


def shared(tile: Tile) -> int:
    """Bytes of shared memory of a block: tiles, sums of squares, barriers."""
    return tile.stages * (128 + tile.outputs) * 128 + 2048 * tile.columns + 16 * tile.stages + 128


@functools.cache
def source(outputs: int) -> str:
    """The kernel, the struct of its arguments and the tensor cores' instruction for so many outputs."""
    fields = [f"void* {n};" for n in POINTERS] + [f"long long {n};" for n in INTEGERS]
    maps = ", ".join(f"{n}_map[128]" for n in ("x", "weight", "stream"))
    given = f"struct alignas(64) Args {{ char {maps}; {' '.join(fields)} }};"
    return "\n".join([given, _instruction(outputs), (Path(__file__).parent / "late_product.cu").read_text()])


def _instruction(outputs: int) -> str:
    """``acc (64, outputs) += x (64, 16) weight^T``; without ``more`` the sums begin with it."""
    count = outputs // 2
    places = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    kind = f"wgmma.mma_async.sync.aligned.m64n{outputs}k16.f32.bf16.bf16"
    return (
        f"__device__ __forceinline__ void multiply(float (&acc)[{count}], "
        "unsigned long long x, unsigned long long w, int more) {\n"
        f'    asm volatile("{{.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n'
        f'{kind} {{{places}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;}}"\n'
        f'        : {operands} : "l"(x), "l"(w), "r"(more));\n}}'
    )


@functools.cache
def _clusters(tile: Tile, inputs: int, parts: int, device: int) -> int:
    """How many clusters a GPU has room for at once."""
    kernel, blocks = _kernel(tile, inputs, parts), tile.columns * tile.rows
    attribute = (ctypes.c_uint * 18)(4, 0, blocks, 1, 1)  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    config = nvrtc._Config((blocks, 1, 1), (THREADS, 1, 1), shared(tile), None, ctypes.addressof(attribute), 1)
    found = ctypes.c_int()
    status = nvrtc._driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), kernel.function, ctypes.byref(config))
    if status or not found.value:
        raise RuntimeError(f"CUDA driver: no room for clusters of {blocks} blocks (status {status})")
    return found.value


def _kernel(tile: Tile, inputs: int, parts: int) -> nvrtc.Kernel:
    return nvrtc.kernel(source(tile.outputs), "late_product", macros(tile, inputs, parts), shared(tile))


def fits(x: Tensor, squares: Tensor, matrix: Tensor | None, residual: Tensor, weight: Tensor) -> bool:
    """Whether ``forward`` takes them: the stream in float32, the rest in bfloat16, enough rows and on Hopper."""
    if matrix is None or not x.is_cuda or torch.version.hip is not None:
        return False
    low = all(t.dtype == torch.bfloat16 for t in (x, matrix, weight))
    wide = residual.dtype == squares.dtype == torch.float32
    dense = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, squares, matrix, residual, weight))
    whole = len(matrix) in TILES and x.shape[-1] % 64 == 0 and x.numel() >= LEAST * x.shape[-1]
    if not (low and wide and dense and whole and nvrtc.available()):
        return False
    return torch.cuda.get_device_capability(x.device)[0] == 9  # later GPUs have no products of warp groups


def forward(
    x: Tensor, squares: Tensor, width: int, inner_eps: float, matrix: Tensor, residual: Tensor, weight: Tensor,
    eps: float, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.norm.late.add_norm`` of a product that ``fits``."""
    tile = tile or TILES[len(matrix)]
    (rows, inputs), outputs = x.flatten(0, -2).shape, len(matrix)
    y, total = torch.empty(residual.shape, dtype=x.dtype, device=x.device), torch.empty_like(residual)
    parts, line = squares.shape[-1], 2 * inputs
    maps = array("q")
    maps += described(x, (inputs, rows), (line,), (64, 128 // tile.columns))
    # Column 16 u + 4 q + 2 v + e of the product at place 16 u + 8 v + 2 q + e of a tile.
    sizes, box = (inputs, 2, 4, 2, outputs // 16), (64, 2, 4, 2, tile.outputs // 16 // tile.rows)
    maps += described(matrix, sizes, (line, 4 * line, 2 * line, 16 * line), box)
    maps += described(residual, (outputs, rows), (4 * outputs,), (tile.outputs, 16), swizzled=False)
    pointers = (t.data_ptr() for t in (squares, residual, weight, y, total))
    maps.extend((*pointers, rows, _bits(1 / width), _bits(inner_eps), _bits(eps)))
    maps.extend([0] * (-len(maps) % 8))  # the struct ends at a multiple of its alignment
    blocks = _clusters(tile, inputs, parts, x.get_device()) * tile.columns * tile.rows
    _kernel(tile, inputs, parts)(blocks, THREADS, maps)
    return y, total


def _bits(value: float) -> int:
    """A float32's bits, for a whole number's field."""
    return struct.unpack("i", struct.pack("f", value))[0]
