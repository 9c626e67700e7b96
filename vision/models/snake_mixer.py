"""Mamba along four snakes, the mixer of PlainMamba.

Paper: "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", Yang et al. 2024,
https://arxiv.org/abs/2403.17695.

Dimension letters: B batch, H W grid of patches, L = H W tokens, D model width, E inner width, N state, R dt rank,
K = 4 routes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from core import hippo
from core.mixers.mamba import decay_rates
from vision.models.ready import filled_up
from vision.routes import scan_routes
from vision.tables import Kept

__all__ = ["SNAKES", "SnakeMixer", "snake_tables"]

torch.fx.wrap("decay_rates")  # branches on the dtype: a leaf for the tracer in this module too

SNAKES = ("snake", "snake_reversed", "snake_columns", "snake_columns_reversed")


@Kept
def snake_tables(height: int, width: int, device: torch.device) -> Tensor:
    """The four snakes and what step led to each of their positions.

    Returns:
        (2, K, L) int32: token, and direction of the step into it: 0 start, 1 right, 2 left, 3 up, 4 down.
    """
    with torch.device(device):
        tokens = scan_routes(SNAKES, height, width)
        rows, columns = tokens // width, tokens % width
        down, right = (F.pad(t.diff(dim=1), (1, 0)) for t in (rows, columns))
        steps = (right == 1) * 1 + (right == -1) * 2 + (down == -1) * 3 + (down == 1) * 4
        return torch.stack((tokens, steps.to(torch.int32)))


@torch.library.custom_op("triscan::snake_tables", mutates_args=())
def _snake_tables(tokens: Tensor, height: int, width: int) -> Tensor:
    """``snake_tables`` on the device of ``tokens``: an op, so that tracers keep it."""
    return snake_tables(height, width, tokens.device).clone()


@_snake_tables.register_fake
def _(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.new_empty((2, 4, height * width), dtype=torch.int32)


class SnakeMixer(nn.Module):
    """Mamba along four snakes that share all parameters, after a convolution on the map.

    x, z = in_proj(u); x = silu(conv2d(x)); dt, B, C = x_proj(x); for each snake, B_t += direction_Bs[step into t];
    y = out_proj(sum of the scans * silu(z))   (PlainMamba, equations 4 to 6).

    Args:
        dim: D.
        d_state: N.
        expand: E / D.
        conv_size: Width of the depthwise convolution, odd.
        device: Where the parameters live.
        dtype: Their dtype; A_log, D and direction_Bs are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: int,
        conv_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        inner = expand * dim
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv2d = nn.Conv2d(inner, inner, conv_size, padding=conv_size // 2, groups=inner, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **wide))
        self.D = nn.Parameter(torch.empty(inner, **wide))
        self.direction_Bs = nn.Parameter(torch.empty(5, d_state, **wide))
        self.out_proj = nn.Linear(inner, dim, **dd)

    @torch.no_grad()
    def init_weights(self, depth: int) -> None:
        """Mamba's dt, S4D-Real A, D = 1, small direction vectors."""
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            layer.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = hippo.log_uniform_dt(self.dt_proj.out_features, floor=1e-4, device=self.dt_proj.bias.device)
        self.dt_proj.bias.copy_(hippo.inverse_softplus(dt))
        self.A_log.copy_(torch.log(-hippo.s4d_real(self.d_state)).to(self.A_log.device))
        nn.init.ones_(self.D)
        trunc_normal_(self.direction_Bs, std=0.02)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Mixes tokens (B, H W, D) of a grid; returns (B, H W, D)."""
        tables = torch.ops.triscan.snake_tables(x, height, width)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv2d(x.transpose(1, 2).unflatten(2, [height, width])).flatten(2).transpose(1, 2)
        x = F.silu(x).contiguous()
        x_weight, dt_weight = filled_up(self.x_proj.weight, self.dt_proj.weight, self.dt_rank)
        low, N = F.linear(x, x_weight), self.d_state
        # B's first columns fill the time steps' up: they meet dt_proj's zeros.
        dt = F.linear(low[..., : dt_weight.shape[1]], dt_weight).unsqueeze(2).expand(-1, -1, 4, -1)
        B, C = low[..., self.dt_rank : self.dt_rank + N], low[..., self.dt_rank + N : self.dt_rank + 2 * N]
        directions = self.direction_Bs[tables[1].t()]  # (L, K, N)
        B = (B.unsqueeze(2) + directions.to(B.dtype)).unsqueeze(3)
        y, _, _ = torch.ops.triscan.selective_scan(
            x, dt, decay_rates(self.A_log).expand(4, -1, -1), B,
            C.unsqueeze(2).unsqueeze(3).expand(-1, -1, 4, -1, -1), self.D.expand(4, -1), z,
            (2 * self.dt_proj.bias).expand(4, -1), None, tables[0],
            None, None, None, True, False, "sum", False, False, "auto",
        )  # fmt: skip
        return self.out_proj(y)
