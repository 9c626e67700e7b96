"""A projection and the causal convolution of its outputs in one kernel, on Hopper GPUs in CUDA C++: for prompts.

The convolution reads what the product has just written and writes as much again; here it reads the product's sums where
they are, in registers, while another half of a block's warps multiplies. No gradients.

Legend: B batch, L tokens, K inputs, C channels, W conv width.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import hopper, nvrtc
from kernels.causal_conv1d import causal_conv1d
from kernels.checks import check_float, check_shape

__all__ = ["project_conv", "saves_a_pass"]

MAPS = ("x_map", "weight_map")
POINTERS = ("conv_weight", "conv_bias", "y", "state")
INTEGERS = ("M", "L", "C")
WIDTH = 4  # W


class Tile(NamedTuple):
    """How the product is cut.

    Attributes:
        outputs: TN, of a block.
        columns: Blocks of a cluster side by side, which share tokens.
        rows: Blocks of a cluster below each other, which share the weight.
        stages: Tiles of x and weight that are on their way at once.
    """

    outputs: int
    columns: int
    rows: int
    stages: int


TILE = Tile(128, 2, 2, 5)
LEAST = 1 << 14  # tokens; with fewer there is nothing to do for one half of the warps


def project_conv(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``silu(causal_conv1d(x weight^T))`` from the first token on (Gu & Dao 2023, figure 3), without gradients.

    Args:
        x: (B, L, K).
        weight: (C, K).
        conv_weight: (C, W).
        conv_bias: (C,) or None.

    Returns:
        (B, L, C) in x's dtype, and the convolution's last inputs (B, W - 1, C), as ``causal_conv1d`` returns them.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
    """
    check_float(x, weight=weight, conv_weight=conv_weight, conv_bias=conv_bias)
    check_shape("weight", weight, (len(weight), x.shape[-1]), "(C, K)")
    check_shape("conv_weight", conv_weight, (len(weight), conv_weight.shape[-1]), "(C, W)")
    check_shape("conv_bias", conv_bias, (len(weight),), "(C,)")
    if conv_bias is not None and _fits(x, weight, conv_weight, conv_bias):
        return forward(x, weight, conv_weight, conv_bias)
    y = causal_conv1d(F.linear(x, weight), conv_weight, conv_bias, activation="silu", return_final_state=True)
    assert isinstance(y, tuple)
    return y


def saves_a_pass(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None) -> bool:
    """Whether ``project_conv`` has a kernel for them: bfloat16, four taps, whole tiles, enough tokens and on Hopper."""
    return conv_bias is not None and _fits(x, weight, conv_weight, conv_bias)


def _fits(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> bool:
    if x.ndim != 3 or conv_weight.shape[1] != WIDTH or x.shape[1] < 128:
        return False
    sizes = x.shape[2] % 64 == 0 and len(weight) % (TILE.outputs * TILE.columns) == 0 and len(x) * x.shape[1] >= LEAST
    low = all(t.dtype == torch.bfloat16 for t in (x, weight, conv_weight, conv_bias))
    return sizes and low and hopper.takes(x, weight, conv_weight, conv_bias)


def macros(tile: Tile, inputs: int) -> tuple[str, ...]:
    """What ``product.cu`` is compiled with."""
    values = {"TN": tile.outputs, "COLS": tile.columns, "ROWS": tile.rows, "STAGES": tile.stages, "STEPS": inputs // 64}
    return tuple(f"{name} {value}" for name, value in values.items())


def shared(tile: Tile) -> int:
    """Bytes of shared memory of a block: tiles, tokens at the edges of warps, barriers."""
    return tile.stages * (128 + tile.outputs) * 128 + 16 * (WIDTH - 1) * tile.outputs * 4 + 16 * tile.stages


@functools.cache
def source(outputs: int) -> str:
    """The kernel for tiles of so many outputs."""
    return hopper.source(Path(__file__).with_name("product.cu"), outputs, MAPS, POINTERS, INTEGERS)


def forward(
    x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, tile: Tile = TILE
) -> tuple[Tensor, Tensor]:
    """``project_conv`` by the kernel."""
    (batch, length, inputs), channels = x.shape, len(weight)
    tokens, line = batch * length, 2 * inputs
    y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    state = torch.empty(batch, WIDTH - 1, channels, dtype=x.dtype, device=x.device)
    # Token 32 w + 4 g + 2 m + h of a tile is at place 64 m + 16 w + 8 h + g, column 32 a + 8 q + 2 j + e at
    # 32 a + 8 j + 2 q + e.
    rows = (inputs, 8, tokens - 126, 4, 2), (4 * line, line, 32 * line, 2 * line), (64, 8, 2, 4, 2 // tile.columns)
    box = (64, 2, 4, 4, tile.outputs // 32 // tile.rows)
    columns = (inputs, 2, 4, 4, channels // 32), (line, 8 * line, 2 * line, 32 * line), box
    maps = hopper.described(x, *rows), hopper.described(weight, *columns)
    kernel = nvrtc.kernel(source(tile.outputs), "product_conv", macros(tile, inputs), shared(tile))
    fields = (conv_weight, conv_bias, y, state, tokens, length, channels)
    hopper.launch(kernel, tile.columns * tile.rows, maps, fields)
    return y, state
