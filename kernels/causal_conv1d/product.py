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
POINTERS = ("conv_weight", "conv_bias", "y", "state", "rest")
INTEGERS = ("M", "L", "C", "N", "first", "rest_line")
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


TILE = Tile(192, 1, 2, 5)
LEAST = 1 << 14  # tokens; with fewer there is nothing to do for one half of the warps


class Projected(NamedTuple):
    """A projection, some of whose outputs are convolved."""

    before: Tensor  # (B, L, first): outputs as they are
    convolved: Tensor  # (B, L, C)
    behind: Tensor  # (B, L, N - first - C): outputs as they are
    state: Tensor  # (B, W - 1, C): the convolution's last inputs, as ``causal_conv1d`` returns them


def project_conv(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, first: int = 0) -> Projected:
    """``x weight^T``, and silu of its outputs ``first`` to ``first + C`` behind a causal convolution from the first
    token on (Gu & Dao 2023, figure 3), without gradients.

    Args:
        x: (B, L, K).
        weight: (N, K).
        conv_weight: (C, W).
        conv_bias: (C,) or None.
        first: The first output that is convolved.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
    """
    channels = len(conv_weight)
    check_float(x, weight=weight, conv_weight=conv_weight, conv_bias=conv_bias)
    check_shape("weight", weight, (len(weight), x.shape[-1]), "(N, K)")
    check_shape("conv_bias", conv_bias, (channels,), "(C,)")
    if not 0 <= first <= len(weight) - channels:
        raise ValueError(f"first: got {first}, wanted 0 to {len(weight) - channels}: N - C")
    if conv_bias is not None and _fits(x, weight, conv_weight, conv_bias, first):
        return forward(x, weight, conv_weight, conv_bias, first)
    before, inner, behind = F.linear(x, weight).split([first, channels, len(weight) - first - channels], dim=-1)
    y = causal_conv1d(inner, conv_weight, conv_bias, activation="silu", return_final_state=True)
    assert isinstance(y, tuple)
    return Projected(before, y[0], behind, y[1])


def saves_a_pass(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, first: int = 0) -> bool:
    """Whether ``project_conv`` has a kernel for them: bfloat16, four taps, whole vectors, enough tokens, on Hopper."""
    return conv_bias is not None and _fits(x, weight, conv_weight, conv_bias, first)


def _fits(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, first: int) -> bool:
    if x.ndim != 3 or conv_weight.shape[1] != WIDTH or x.shape[1] < 128 or len(x) * x.shape[1] < LEAST:
        return False
    (outputs, inputs), channels = weight.shape, len(conv_weight)
    sizes = inputs % 64 == 0 and outputs >= TILE.outputs and not any(n % 8 for n in (outputs, channels, first))
    low = all(t.dtype == torch.bfloat16 for t in (x, weight, conv_weight, conv_bias))
    return sizes and low and hopper.takes(x, weight, conv_weight, conv_bias)


def macros(tile: Tile, inputs: int) -> tuple[str, ...]:
    """What ``product.cu`` is compiled with."""
    values = {"TN": tile.outputs, "COLS": tile.columns, "ROWS": tile.rows, "STAGES": tile.stages, "STEPS": inputs // 64}
    return tuple(f"{name} {value}" for name, value in values.items())


def shared(tile: Tile) -> int:
    """Bytes of shared memory of a block: tiles, tokens at the edges of warps, barriers."""
    return tile.stages * (128 + tile.outputs) * 128 + 8 * (WIDTH - 1) * tile.outputs * 4 + 16 * tile.stages


@functools.cache
def source(outputs: int) -> str:
    """The kernel for tiles of so many outputs."""
    return hopper.source(Path(__file__).with_name("product.cu"), outputs, MAPS, POINTERS, INTEGERS)


def forward(
    x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, first: int = 0, tile: Tile = TILE
) -> Projected:
    """``project_conv`` by the kernel. Outputs as they are have rows that begin at whole lines of memory."""
    (batch, length, inputs), outputs, channels = x.shape, len(weight), len(conv_weight)
    tokens, line, others = batch * length, 2 * inputs, outputs - channels
    y, state = x.new_empty(batch, length, channels), x.new_empty(batch, WIDTH - 1, channels)
    rest = x.new_empty(batch, length, -(-others // 64) * 64)
    # Token 32 w + 4 g + 2 m + h of a tile is at place 64 m + 16 w + 8 h + g, output 32 a + 8 q + 2 j + e at
    # 32 a + 8 j + 2 q + e. Tiles may begin anywhere: at a place of the axes h and e, whose neighbours are neighbours.
    rows = (inputs, 8, tokens - 126, 4, 2), (4 * line, line, 32 * line, 2 * line), (64, 8, 2, 4, 2 // tile.columns)
    part = tile.outputs // tile.rows
    columns = (
        (inputs, outputs - part + 2, 4, 4, part // 32), (line, 8 * line, 2 * line, 32 * line),
        (64, 2, 4, 4, part // 32),
    )  # fmt: skip
    maps = hopper.described(x, *rows), hopper.described(weight, *columns)
    kernel = nvrtc.kernel(source(tile.outputs), "product_conv", macros(tile, inputs), shared(tile))
    numbers = (tokens, length, channels, outputs, first, rest.shape[-1])
    hopper.launch(kernel, tile.columns * tile.rows, maps, (conv_weight, conv_bias, y, state, rest, *numbers))
    return Projected(rest[..., :first], y, rest[..., first:others], state)
