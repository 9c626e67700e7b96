"""``kernels.norm.late`` with the product in front of it, on Hopper GPUs in CUDA C++: one kernel for what were two.

A norm wants all outputs of a row, a tile of tensor cores' sums has some. Clusters of blocks have all of them between
them, and tell each other their sums of squares; while one half of a block's warps adds to the residual stream and
normalises, the other multiplies. (Gluon has no tiles of 192 columns and no copies to all blocks of a cluster.)

Legend: M rows, K channels in front of the product, D behind it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import hopper, nvrtc

MAPS = ("x_map", "weight_map", "stream_map")
POINTERS = ("squares", "residual", "norm_weight", "y", "total")
INTEGERS = ("M", "share", "inner_eps", "eps")


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
    prefetch: bool = False


TILES = {768: Tile(192, 4, 1, 5)}  # by D
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
    """The kernel for tiles of so many outputs."""
    return hopper.source(Path(__file__).with_name("late_product.cu"), outputs, MAPS, POINTERS, INTEGERS)


def fits(x: Tensor, squares: Tensor | None, matrix: Tensor | None, residual: Tensor, weight: Tensor) -> bool:
    """Whether ``forward`` takes them: the stream in float32, the rest in bfloat16, enough rows and on Hopper."""
    if matrix is None or len(matrix) not in TILES or x.shape[-1] % 64 or x.numel() < LEAST * x.shape[-1]:
        return False
    low = all(t.dtype == torch.bfloat16 for t in (x, matrix, weight))
    given = () if squares is None else (squares,)
    wide = all(t.dtype == torch.float32 for t in (residual, *given))
    return low and wide and hopper.takes(x, matrix, residual, weight, *given)


def forward(
    x: Tensor, squares: Tensor | None, width: int, inner_eps: float, matrix: Tensor, residual: Tensor, weight: Tensor,
    eps: float, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.norm.late.add_norm`` of a product that ``fits``."""
    tile = tile or TILES[len(matrix)]
    (rows, inputs), outputs = x.flatten(0, -2).shape, len(matrix)
    y, total = torch.empty(residual.shape, dtype=x.dtype, device=x.device), torch.empty_like(residual)
    line = 2 * inputs
    # Column 16 u + 4 q + 2 v + e of the product at place 16 u + 8 v + 2 q + e of a tile.
    sizes, box = (inputs, 2, 4, 2, outputs // 16), (64, 2, 4, 2, tile.outputs // 16 // tile.rows)
    maps = (
        hopper.described(x, (inputs, rows), (line,), (64, 128 // tile.columns)),
        hopper.described(matrix, sizes, (line, 4 * line, 2 * line, 16 * line), box),
        hopper.described(residual, (outputs, rows), (4 * outputs,), (tile.outputs, 16), swizzled=False),
    )
    numbers = map(hopper.bits, (1 / width, inner_eps, eps))
    fields = (0 if squares is None else squares, residual, weight, y, total, rows, *numbers)
    lines = macros(tile, inputs, 0 if squares is None else squares.shape[-1])
    kernel = nvrtc.kernel(source(tile.outputs), "late_product", lines, shared(tile))
    hopper.launch(kernel, tile.columns * tile.rows, maps, fields)
    return y, total
