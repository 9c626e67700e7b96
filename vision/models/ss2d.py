"""Selective scans over maps along several routes at once, the mixers of VMamba and its kin.

Maps are (B, H, W, C) throughout: a pixel's channels lie together, so a scan in any order reads whole rows and there is
neither a permutation nor a copy for a direction. ``x_proj`` commutes with the order of the tokens, so one product with
the raster tokens serves all routes.

Dimension letters: B batch, H W map, L = H W tokens, D model width, E inner width, N state, K routes, R dt rank
(heads of Mamba-2, which have a time step each), P head dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import hippo
from core.mixers.mamba import decay_rates
from vision.models.maps import DepthwiseConv2d, LayerNorm
from vision.models.mixer import block_diagonal
from vision.routes import check_routes

__all__ = ["SS2D", "SSD2D", "MapMixer"]

torch.fx.wrap("decay_rates")  # branches on the dtype: a leaf for the tracer in this module too


class MapMixer(nn.Module):
    """What the mixers share: in_proj, depthwise convolution, activation, a scan, out_norm, gate, out_proj.

    x, z = in_proj(u); y = scan(act(conv2d(x))); out = out_proj(out_norm(y) * silu(z)), without z unless ``gated``.

    Args:
        dim: D.
        inner: E.
        routes: Names of the K scan routes, from ``vision.routes``.
        conv_bias: Whether the 3 x 3 convolution has a bias.
        gated: Whether there is a z.
        act: Name of the activation, ``silu`` or ``gelu``.
        rank: R, numbers that x_proj gives for the time steps of a route.
        d_state: N.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For unknown routes.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        routes: Sequence[str],
        conv_bias: bool,
        gated: bool,
        act: str,
        rank: int,
        d_state: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_routes(routes, 4, 4)
        self.routes, self.gated = ",".join(routes), gated
        self.K, self.R, self.N = len(routes), rank, d_state
        self.fill = 0  # columns of zeros in front of a route's time steps
        self.in_proj = nn.Linear(dim, 2 * inner if gated else inner, bias=False, **dd)
        self.conv2d = DepthwiseConv2d(inner, 3, act, conv_bias, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(self.K, rank + 2 * d_state, inner, **dd))
        self.out_norm = LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises x_proj, uniform as a linear map of PyTorch; subclasses add their parameters."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What x_proj gives for tokens (B, L, E): (B, L, K, R) for the time steps, B and C (B, L, K, 1, N)."""
        weight, sizes = self.x_proj_weight, [self.R, self.N, self.N]
        if self.fill > 0:
            weight, sizes = F.pad(weight, [0, 0, self.fill, 0]), [self.fill, self.R, self.N, self.N]
        parts = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (self.K, -1)).split(sizes, dim=-1)
        return parts[-3], parts[-2].unsqueeze(3), parts[-1].unsqueeze(3)

    def scan(self, x: Tensor, route: Tensor) -> Tensor:
        """Mixes tokens (B, L, E) along ``route`` (K, positions); returns (B, L, E)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Mixes maps (B, H, W, D) of any size."""
        height, width = x.shape[1], x.shape[2]
        x = self.in_proj(x)
        gate: Tensor | None = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            gate = z.flatten(1, 2)
        x = self.conv2d(x).flatten(1, 2)
        route = torch.ops.triscan.scan_routes(x, self.routes, height, width, False)
        y = self.out_norm(self.scan(x, route), gate)
        return self.out_proj(y).unflatten(1, (height, width))


class SS2D(MapMixer):
    """The selective scan (S6) over maps; every route has projections, time steps, A and D of its own.

    For each route k: dt, B, C = x_proj_k(x); y_k = scan(x, softplus(dt_proj_k(dt)), A_k, B, C, D_k); y = sum_k y_k
    (VMamba, Liu et al. 2024, section 4.2). Parameters have the published names and shapes.

    Args:
        dim: D.
        routes: See ``MapMixer``.
        d_state: N.
        expand: E / D.
        conv_bias: See ``MapMixer``.
        gated: See ``MapMixer``.
        device: See ``MapMixer``.
        dtype: See ``MapMixer``. ``A_logs`` and ``Ds`` are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int,
        expand: float,
        conv_bias: bool,
        gated: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inner = int(expand * dim)
        super().__init__(dim, inner, routes, conv_bias, gated, "silu", math.ceil(dim / 16), d_state, device, dtype)
        self.fill = -self.R % 4 if d_state % 4 == 0 else 0  # B and C then lie where a GPU reads four at once
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        self.dt_projs_weight = nn.Parameter(torch.empty(self.K, inner, self.R, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(self.K, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(self.K * inner, d_state, **wide))
        self.Ds = nn.Parameter(torch.empty(self.K * inner, **wide))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises as published: Mamba's time steps, S4D-Real A, D = 1."""
        super().init_weights()
        nn.init.uniform_(self.dt_projs_weight, -(self.R**-0.5), self.R**-0.5)
        dt = hippo.log_uniform_dt(self.dt_projs_bias.numel(), floor=1e-4, device=self.dt_projs_bias.device)
        self.dt_projs_bias.copy_(hippo.inverse_softplus(dt).view_as(self.dt_projs_bias))
        self.A_logs.copy_(torch.log(-hippo.s4d_real(self.N)).to(self.A_logs.device))
        nn.init.ones_(self.Ds)

    def time_steps(self, dt: Tensor, route: Tensor) -> Tensor:
        """Time steps (B, L, K, E), before bias and softplus, of low-rank ones (B, L, K, R)."""
        return F.linear(dt.flatten(2), block_diagonal(self.dt_projs_weight)).unflatten(-1, (self.K, -1))

    def scan_routes(self, x: Tensor, route: Tensor, merge: str) -> Tensor:
        """The scans of tokens (B, L, E): their sum (B, L, E), or one by one (B, L, K, E) with ``merge`` "keep"."""
        low, B, C = self.project(x)
        dt = self.time_steps(low, route)
        A, D = decay_rates(self.A_logs).unflatten(0, (self.K, -1)), self.Ds.unflatten(0, (self.K, -1))
        y, _, _ = torch.ops.triscan.selective_scan(
            x, dt, A, B, C, D, None, self.dt_projs_bias, None, route,
            None, None, None, True, True, merge, False, False, "auto",
        )  # fmt: skip
        return y

    def scan(self, x: Tensor, route: Tensor) -> Tensor:
        return self.scan_routes(x, route, "sum")


class SSD2D(MapMixer):
    """State space duality (Mamba-2) over maps: as ``SS2D`` with one time step and one A for each head of P channels.

    Args:
        dim: D.
        routes: See ``MapMixer``.
        d_state: N.
        expand: E / D; there are ceil(D / 16) heads.
        conv_bias: See ``MapMixer``.
        gated: See ``MapMixer``.
        device: See ``MapMixer``.
        dtype: See ``MapMixer``. ``A_logs`` and ``Ds`` are float32 at least.

    Raises:
        ValueError: If the heads don't divide E.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int,
        expand: float,
        conv_bias: bool,
        gated: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inner, heads = int(expand * dim), math.ceil(dim / 16)
        if inner % heads:
            raise ValueError(
                f"embed_dim: got a stage of {dim} channels, expanded to {inner}, which {heads} heads don't divide; "
                "wanted multiples of 16"
            )
        super().__init__(dim, inner, routes, conv_bias, gated, "gelu", heads, d_state, device, dtype)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        self.dt_projs_bias = nn.Parameter(torch.empty(self.K, heads, **dd))
        self.A_logs = nn.Parameter(torch.empty(self.K, heads, **wide))
        self.Ds = nn.Parameter(torch.empty(self.K, heads, inner // heads, **wide))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises as published: A = -1, D = 1, biases of the time steps uniform in [0, 0.1]."""
        super().init_weights()
        nn.init.uniform_(self.dt_projs_bias, 0, 0.1)
        nn.init.zeros_(self.A_logs)
        nn.init.ones_(self.Ds)

    def scan(self, x: Tensor, route: Tensor) -> Tensor:
        dt, B, C = self.project(x)
        y, _ = torch.ops.triscan.ssd(
            x.unflatten(-1, (self.R, -1)), dt, decay_rates(self.A_logs), B, C, self.Ds,
            None, self.dt_projs_bias, route, None, None, None, True, 0.0, math.inf, "sum", False, False, "auto",
        )  # fmt: skip
        return y.flatten(2)
