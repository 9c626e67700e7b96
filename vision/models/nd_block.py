"""The blocks of Mamba-ND: Mamba along one order of a grid's axes, and the merging of patches.

Paper: "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data", Li et al. 2024,
https://arxiv.org/abs/2402.05892.

Dimension letters: B batch, T H W grid of patches, L tokens, D model width, E inner width, N state, P scan positions.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from core.block import AddNorm
from core.mixers.mamba import Mamba, decay_rates
from vision.tables import Kept

__all__ = ["NDBlock", "OrderedMamba", "PatchMerging", "axis_order"]

torch.fx.wrap("decay_rates")  # branches on the dtype: a leaf for the tracer in this module too


@Kept
def axis_order(grid: tuple[int, ...], order: tuple[int, ...], device: torch.device) -> Tensor:
    """The tokens of a grid with its axes nested in another order, (1, P) int32; the last axis runs fastest."""
    numbers = torch.arange(math.prod(grid), dtype=torch.int32, device=device).view(grid)
    return numbers.permute(order).reshape(1, -1)


@torch.library.custom_op("triscan::axis_order", mutates_args=())
def _axis_order(tokens: Tensor, grid: list[int], order: list[int]) -> Tensor:
    """``axis_order`` on the device of ``tokens``: an op, so that tracers keep it."""
    return axis_order(tuple(grid), tuple(order), tokens.device).clone()


@_axis_order.register_fake
def _(tokens: Tensor, grid: list[int], order: list[int]) -> Tensor:
    return tokens.new_empty((1, math.prod(grid)), dtype=torch.int32)


class OrderedMamba(Mamba):
    """Mamba whose convolution and scan walk a grid along one order of its axes.

    Args:
        dim: D.
        order: The axes from the slowest to the fastest.
        reverse: Whether it walks from the last token to the first.
        d_state: N.
        device: Where the parameters live.
        dtype: Their dtype; A_log and D are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        order: Sequence[int],
        reverse: bool,
        d_state: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, d_state, reverse=reverse, device=device, dtype=dtype)
        self.order = list(order)
        self.in_order = self.order == sorted(self.order)
        name = {(0, 1): "raster", (1, 0): "columns"}.get(tuple(order), "")  # of a route, for pictures
        self.routes = f"{name}_reversed" if name and reverse else name

    @torch.jit.ignore
    def init_weights(self, depth: int) -> None:
        """Initialises as Mamba does."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
            layer.reset_parameters()
        self._reset_ssm(0.001, 0.1, "random", 1.0, 1e-4)

    def forward(self, x: Tensor, grid: list[int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Mixes tokens (B, L, D) of a grid; returns (B, L, D)."""
        route = None if self.in_order else torch.ops.triscan.axis_order(x, grid, self.order)
        weight, bias, A, D = self.conv1d.weight.squeeze(1), self.conv1d.bias, decay_rates(self.A_log), self.D
        dt_weight, dt_bias = self.dt_proj.weight, self.dt_proj.bias
        if route is not None:  # one route among K = 1
            assert bias is not None
            weight, bias, A, D = weight.unsqueeze(0), bias.unsqueeze(0), A.unsqueeze(0), D.unsqueeze(0)
            dt_weight, dt_bias = dt_weight.unsqueeze(0), dt_bias.unsqueeze(0)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = torch.ops.triscan.causal_conv1d(
            x, weight, bias, route, None, None, None, "silu", self.reverse, False, "auto"
        )
        dt, B, C = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, _, _ = torch.ops.triscan.selective_scan(
            x, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), D, z, dt_bias, dt_weight, route,
            None, None, None, True, True, "sum", self.reverse, False, "auto",
        )  # fmt: skip
        return self.out_proj(y)


class PatchMerging(nn.Module):
    """Four neighbours to one token of the same width: (B, H W, D) -> (B, ceil(H / 2) ceil(W / 2), D)."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: list[int]) -> tuple[Tensor, list[int]]:
        """Returns the merged tokens and their grid."""
        x = x.unflatten(1, grid)
        x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        grid = [(grid[0] + 1) // 2, (grid[1] + 1) // 2]
        # The channels of a token lie together, its four places within each: as an unfolding of a (B, D, H, W) map.
        x = x.unflatten(2, [grid[1], 2]).unflatten(1, [grid[0], 2]).permute(0, 1, 3, 5, 2, 4)
        return self.reduction(self.norm(x.flatten(3).flatten(1, 2))), grid


class NDBlock(nn.Module):
    """Add -> Norm -> Mixer, where the norm's output also goes on as the residual stream."""

    def __init__(
        self, norm: AddNorm, mixer: OrderedMamba, drop_path: float, proj_drop: float, merging: nn.Module | None
    ) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.dropout = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.down_sample_layer = merging

    def forward(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Returns this block's branch and the residual stream, both (B, L, D), and the grid."""
        residual = self.norm(hidden, residual)[0]
        hidden = self.drop_path(self.dropout(self.mixer(residual, grid)))
        if self.down_sample_layer is not None:
            hidden, grid = self.down_sample_layer(hidden + residual, grid)
            residual = torch.zeros_like(hidden)
        return hidden, residual, grid
