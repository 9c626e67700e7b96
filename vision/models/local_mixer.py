"""What LocalVim's blocks are made of: four routes with a gate on channels, and rotary embeddings.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al. 2024,
https://arxiv.org/abs/2403.09338.

Dimension letters: B batch, H W grid of patches, L tokens, D model width, E inner width, N state, R dt rank, K = 4
routes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from core import hippo
from vision.models.maps import ChannelAttention
from vision.models.mixer import scan_along
from vision.tables import Kept

__all__ = ["LocalMixer", "Rotary", "rotation", "rotation_angles", "rotation_table"]


def rotation_angles(height: int, width: int, dim: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles (H W, dim) of a rotary embedding: the first half of the channels turns with the row, the second with the
    column. Channels 2i and 2i + 1 of a half turn by position * 10000^(-2i / half), positions run from 0 to ``length``.
    """
    half = dim // 2
    with torch.device(device):
        rates = (10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)).repeat_interleave(2)
        rows, columns = ((torch.arange(n, dtype=torch.float64) / n * length)[:, None] * rates for n in (height, width))
        size = (height, width, half)
        return torch.cat((rows[:, None].expand(size), columns[None].expand(size)), dim=-1).flatten(0, 1)


@Kept
def rotation_table(height: int, width: int, dim: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines (2, H W, dim) of ``rotation_angles``."""
    angles = rotation_angles(height, width, dim, length, device)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


@torch.library.custom_op("triscan::rotation", mutates_args=())
def _rotation_op(like: Tensor, height: int, width: int, dim: int, length: int) -> Tensor:
    """Cosines and sines (2, H W, dim) of ``rotation_angles``, in dtype and place of ``like``: tracers keep an op."""
    return rotation_table(height, width, dim, length, like.dtype, like.device).clone()


@_rotation_op.register_fake
def _(like: Tensor, height: int, width: int, dim: int, length: int) -> Tensor:
    return like.new_empty((2, height * width, dim))


@torch.fx.wrap
@register_notrace_function
def rotation(freqs_cos: Tensor, freqs_sin: Tensor, own: list[int], grid: list[int], length: int) -> Tensor:
    """Cosines and sines (2, H W, D) on a grid: the tables given on their own, computed on any other."""
    if own == grid:
        return torch.stack((freqs_cos, freqs_sin))
    return torch.ops.triscan.rotation(freqs_cos, grid[0], grid[1], freqs_cos.shape[1], length)


class Rotary(nn.Module):
    """Turns pairs of channels by angles that grow with row and column (Su et al. 2021; EVA-02, Fang et al. 2023)."""

    def __init__(
        self,
        dim: int,
        grid: list[int],
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.length = grid, length
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(grid[0] * grid[1], dim, device=device, dtype=dtype))

    def init_weights(self) -> None:
        """Fills the tables; also after ``to_empty``."""
        angles = rotation_angles(self.grid[0], self.grid[1], self.freqs_cos.shape[1], self.length)
        self.freqs_cos.copy_(angles.cos())
        self.freqs_sin.copy_(angles.sin())

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Turns (B, L, D) by a table (2, L, D)."""
        pairs = x.unflatten(-1, [-1, 2])
        crossed = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return (x * table[0] + crossed * table[1]).to(x.dtype)


class LocalMixer(nn.Module):
    """Mamba along four routes with parameters of their own, whose outputs a channel gate weighs and sums.

    Args:
        dim: D.
        routes: Names of the four routes.
        d_state: N.
        expand: E / D.
        class_token: Whether a class token stands in the middle of the tokens.
        device: Where the parameters live.
        dtype: Their dtype; A_log and D are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int,
        expand: int,
        class_token: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(routes) != 4:
            raise ValueError(f"routes: got {len(routes)} in a block ({', '.join(routes)}), wanted 4, as LocalVim has")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        inner = expand * dim
        self.routes, self.class_token = ",".join(routes), class_token
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        for k in range(4):
            self.register_parameter(f"A_log_{k}", nn.Parameter(torch.empty(inner, d_state, **wide)))
            self.register_parameter(f"D_{k}", nn.Parameter(torch.empty(inner, **wide)))
            # Holds weight (E, 1, W) and bias (E,); the convolution itself is kernels.causal_conv1d.
            self.add_module(f"conv1d_{k}", nn.Conv1d(inner, inner, 4, groups=inner, **dd))
            self.add_module(f"x_proj_{k}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd))
            self.add_module(f"dt_proj_{k}", nn.Linear(self.dt_rank, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.attn = ChannelAttention(inner, **dd)

    @torch.no_grad()
    def init_weights(self, depth: int) -> None:
        """Mamba's dt, S4D-Real A, D = 1, out_proj divided by sqrt(depth).

        The released code sets the biases of dt to zero by mistake; here they are Mamba's.
        """
        for k in range(4):
            dt_proj = getattr(self, f"dt_proj_{k}")
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = hippo.log_uniform_dt(dt_proj.out_features, floor=1e-4, device=dt_proj.bias.device)
            dt_proj.bias.copy_(hippo.inverse_softplus(dt))
            A_log = getattr(self, f"A_log_{k}")
            A_log.copy_(torch.log(-hippo.s4d_real(self.d_state)).to(A_log.device))
            nn.init.ones_(getattr(self, f"D_{k}"))
            getattr(self, f"conv1d_{k}").reset_parameters()
            getattr(self, f"x_proj_{k}").reset_parameters()
        for layer in (self.in_proj, self.out_proj, self.attn.global_reduce, self.attn.channel_select):
            layer.reset_parameters()
        self.out_proj.weight /= math.sqrt(depth)

    def forward(self, x: Tensor, grid: list[int]) -> Tensor:
        """Mixes tokens (B, L, D) of a grid; returns (B, L, D)."""
        route = torch.ops.triscan.scan_routes(x, self.routes, grid[0], grid[1], self.class_token)
        # Spelt out, as TorchScript looks no attribute up by a computed name.
        bias_0, bias_1, bias_2, bias_3 = self.conv1d_0.bias, self.conv1d_1.bias, self.conv1d_2.bias, self.conv1d_3.bias
        assert bias_0 is not None  # nn.Conv1d declares it optional
        assert bias_1 is not None
        assert bias_2 is not None
        assert bias_3 is not None
        x_0, x_1, x_2, x_3 = self.x_proj_0.weight, self.x_proj_1.weight, self.x_proj_2.weight, self.x_proj_3.weight
        dt_0, dt_1, dt_2, dt_3 = self.dt_proj_0, self.dt_proj_1, self.dt_proj_2, self.dt_proj_3
        ways = [
            [self.A_log_0, self.D_0, self.conv1d_0.weight, bias_0, x_0, dt_0.weight, dt_0.bias],
            [self.A_log_1, self.D_1, self.conv1d_1.weight, bias_1, x_1, dt_1.weight, dt_1.bias],
            [self.A_log_2, self.D_2, self.conv1d_2.weight, bias_2, x_2, dt_2.weight, dt_2.bias],
            [self.A_log_3, self.D_3, self.conv1d_3.weight, bias_3, x_3, dt_3.weight, dt_3.bias],
        ]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = scan_along(x, z, route, ways, self.dt_rank, self.d_state, "keep")
        return self.out_proj((y * self.attn(y)).sum(2))
