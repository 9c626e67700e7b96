"""Mamba along several routes at once, the mixer of Vim and its kin.

Dimension letters: B batch, L tokens, H W grid of patches, M = H W, D model width, E inner width, N state, K routes,
P route positions, R dt rank, W convolution width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from core import hippo
from core.mixers.mamba import decay_rates
from vision.models.ready import Ready, filled_up
from vision.models.streams import leaves_idle, side_stream

__all__ = ["RouteMixer", "block_diagonal", "scan_along"]

torch.fx.wrap("scan_ways")
torch.fx.wrap("decay_rates")  # branches on the dtype: a leaf for the tracer in this module too


def block_diagonal(weights: Tensor) -> Tensor:
    """K matrices (K, O, I) as one, (K O, K I): K thin products of strided rows become one that GPUs are good at."""
    return torch.diag_embed(weights.permute(1, 2, 0)).permute(2, 0, 3, 1).flatten(2).flatten(0, 1)


def prepared(parameters: list[Tensor], R: int) -> list[Tensor]:
    """Parameters of one route as ``scan_ways`` takes them.

    Args:
        parameters: A_log (E, N), D (E,), weight (E, 1, W) and bias (E,) of the convolution, x_proj (R + 2 N, E), weight
            (E, R) and bias (E,) of dt_proj.
        R: Rank of the time steps.

    Returns:
        The same with A for A_log, the convolution's weight as (E, W), and both projections ``filled_up``.
    """
    A_log, D, conv_weight, conv_bias, x_weight, dt_weight, dt_bias = parameters
    x_weight, dt_weight = filled_up(x_weight, dt_weight, R)
    return [decay_rates(A_log), D, conv_weight.squeeze(1), conv_bias, x_weight, dt_weight, dt_bias]


def project(x: Tensor, parameters: list[Tensor], backwards: bool, R: int) -> list[Tensor]:
    """What a scan of tokens (B, L, E) reads: convolved ones (B, L, E), time steps (B, L, E), and B, C and more.

    Args:
        x: The tokens.
        parameters: As of ``prepared``.
        backwards: Whether they are scanned from the last to the first.
        R: Rank of the time steps.
    """
    x, _ = torch.ops.triscan.causal_conv1d(
        x, parameters[2], parameters[3], None, None, None, None, "silu", backwards, False, "auto"
    )
    parts = F.linear(x, parameters[4])
    # B's first columns fill the time steps' up: they meet dt_proj's zeros.
    return [x, F.linear(parts[..., : R + -R % 8], parameters[5]), parts[..., R:]]


def scan(projected: list[Tensor], z: Tensor, parameters: list[Tensor], backwards: bool, N: int) -> Tensor:
    """Scans what ``project`` returns, gated by z; all tokens are (B, L, E)."""
    x, dt, rest = projected
    B, C = rest[..., :N].unsqueeze(2), rest[..., N : 2 * N].unsqueeze(2)
    y, _, _ = torch.ops.triscan.selective_scan(
        x, dt, parameters[0], B, C, parameters[1], z, parameters[6], None, None,
        None, None, None, True, True, "sum", backwards, False, "auto",
    )  # fmt: skip
    return y


@register_notrace_function
def scan_ways(x: Tensor, z: Tensor, ways: list[list[Tensor]], backwards: list[bool], R: int, N: int) -> Tensor:
    """The sum of the scans of tokens (B, L, E) in order, or from the last to the first, gated by z; a leaf for tracers.

    Two long scans of few rows leave half of a GPU idle, so they run at the same time there.

    Args:
        x: What is scanned.
        z: The gate.
        ways: Parameters of each scan, as of ``prepared``.
        backwards: Which way each goes.
        R: Rank of the time steps.
        N: State size.
    """
    if not torch.jit.is_scripting() and len(ways) == 2 and _leaves_idle(x):
        return _side_by_side(x, z, ways, backwards, R, N)
    y = scan(project(x, ways[0], backwards[0], R), z, ways[0], backwards[0], N)
    for k in range(1, len(ways)):
        y = y + scan(project(x, ways[k], backwards[k], R), z, ways[k], backwards[k], N)
    return y


@torch.jit.ignore
def _leaves_idle(x: Tensor) -> bool:
    return leaves_idle(x)


@torch.jit.ignore
def _side_by_side(x: Tensor, z: Tensor, ways: list[list[Tensor]], backwards: list[bool], R: int, N: int) -> Tensor:
    """``scan_ways`` for two, of which one scans on a stream of its own.

    Both begin together: products have no room beside a scan, which takes a third of each multiprocessor's memory. Each
    use of that stream begins after what this one has to do by then, so memory goes back and forth in order.
    """
    main = torch.cuda.current_stream(x.device)
    side = side_stream(x.device, main.cuda_stream)
    first, second = (project(x, way, back, R) for way, back in zip(ways, backwards, strict=True))
    side.wait_stream(main)
    with torch.cuda.stream(side):
        y = scan(second, z, ways[1], backwards[1], N)
    first = scan(first, z, ways[0], backwards[0], N)
    main.wait_stream(side)
    return first + y


def scan_along(x: Tensor, z: Tensor, route: Tensor, ways: list[list[Tensor]], R: int, N: int, merge: str) -> Tensor:
    """Convolves and scans tokens (B, L, E) along routes (K, P), gated by z.

    Args:
        x: What is scanned.
        z: The gate.
        route: Positions of each route.
        ways: Parameters of each route, as ``prepared`` takes them.
        R: Rank of the time steps.
        N: State size.
        merge: ``sum`` for the routes' sum (B, L, E), ``keep`` for each of them (B, L, K, E).
    """
    A_log, D, conv_weight, conv_bias, x_weight, dt_weight, dt_bias = [
        torch.stack([way[i] for way in ways]) for i in range(7)
    ]
    x, _ = torch.ops.triscan.causal_conv1d(
        x, conv_weight.squeeze(2), conv_bias, route, None, None, None, "silu", False, False, "auto"
    )
    low = F.linear(x.flatten(2), block_diagonal(x_weight)).unflatten(-1, [route.shape[0], -1])
    dt, B, C = torch.split(low, [R, N, N], dim=-1)
    dt = F.linear(dt.flatten(2), block_diagonal(dt_weight)).unflatten(-1, [route.shape[0], -1])
    y, _, _ = torch.ops.triscan.selective_scan(
        x, dt, decay_rates(A_log), B.unsqueeze(3), C.unsqueeze(3), D, z, dt_bias, None, route,
        None, None, None, True, True, merge, False, False, "auto",
    )  # fmt: skip
    return y


class RouteMixer(nn.Module):
    """Mamba along K routes at once: a gated scan per route with parameters of its own, the outputs averaged.

    x, z = in_proj(u); for each route k: x_k = silu(conv1d_k(x)); dt, B, C = x_proj_k(x_k);
    y = sum_k scan_k(x_k, softplus(dt_proj_k(dt)), A_k, B, C, D_k); out = out_proj(y * silu(z)) / K
    (Vim, algorithm 1; the division by K = 2 is that of the released models).

    Routes that visit the tokens in order, or all of them backwards, run as such: no index is read and no route's output
    is kept apart.

    Args:
        dim: D.
        routes: Names of the K routes, from ``vision.routes``. The parameters of the first two have the published names
            (``A_log``, ``A_b_log``, ``D``, ``D_b``, ``conv1d``, ``conv1d_b``, ...), those of further ones end in
            ``_2``, ``_3``, ...
        d_state: N.
        d_conv: Width W of the causal convolution along each route.
        expand: E / D.
        device: Where the parameters live.
        dtype: Their dtype; A_log and D are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int,
        d_conv: int,
        expand: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        inner = expand * dim
        self.routes, self.K = ",".join(routes), len(routes)
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16)
        self.in_order = all(name in ("raster", "raster_reversed") for name in routes)
        self.backwards = [name == "raster_reversed" for name in routes]
        suffixes = ["", "_b", *(f"_{k}" for k in range(2, len(routes)))][: len(routes)]
        self.A_names = [f"A{suffix}_log" for suffix in suffixes]
        self.D_names, self.conv_names, self.x_names, self.dt_names = (
            [name + suffix for suffix in suffixes] for name in ("D", "conv1d", "x_proj", "dt_proj")
        )
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        for k in range(len(routes)):
            self.register_parameter(self.A_names[k], nn.Parameter(torch.empty(inner, d_state, **wide)))
            self.register_parameter(self.D_names[k], nn.Parameter(torch.empty(inner, **wide)))
            # Holds weight (E, 1, W) and bias (E,); the convolution itself is kernels.causal_conv1d.
            self.add_module(self.conv_names[k], nn.Conv1d(inner, inner, d_conv, groups=inner, **dd))
            self.add_module(self.x_names[k], nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd))
            self.add_module(self.dt_names[k], nn.Linear(self.dt_rank, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    @torch.no_grad()
    def init_weights(self, depth: int) -> None:
        """Initialises as published: Mamba's dt, S4D-Real A, D = 1, out_proj divided by sqrt(depth).

        The released code gives only the first route the time steps of Mamba (log-uniform in [1e-3, 1e-1]) and leaves
        the second at softplus(~0) = 0.7, which forgets within a few tokens. That is an oversight there; here all
        routes start alike. Loading a checkpoint is not affected.
        """
        for k in range(self.K):
            dt_proj = getattr(self, self.dt_names[k])
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = hippo.log_uniform_dt(dt_proj.out_features, floor=1e-4, device=dt_proj.bias.device)
            dt_proj.bias.copy_(hippo.inverse_softplus(dt))
            A_log = getattr(self, self.A_names[k])
            A_log.copy_(torch.log(-hippo.s4d_real(self.d_state)).to(A_log.device))
            nn.init.ones_(getattr(self, self.D_names[k]))
            getattr(self, self.conv_names[k]).reset_parameters()
            getattr(self, self.x_names[k]).reset_parameters()
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self.out_proj.weight /= math.sqrt(depth)

    def ways(self) -> list[list[Tensor]]:
        """The parameters of each route, as ``prepared`` takes them."""
        if torch.jit.is_scripting():  # which looks no attribute up by a computed name
            assert self.K == 2, "TorchScript takes models of two routes; use torch.export or torch.compile"
            bias, bias_b = self.conv1d.bias, self.conv1d_b.bias
            assert bias is not None  # nn.Conv1d declares it optional
            assert bias_b is not None
            first = [self.A_log, self.D, self.conv1d.weight, bias]
            second = [self.A_b_log, self.D_b, self.conv1d_b.weight, bias_b]
            first += [self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias]
            second += [self.x_proj_b.weight, self.dt_proj_b.weight, self.dt_proj_b.bias]
            return [first, second]
        ways = []
        for k in range(self.K):
            conv, dt_proj = getattr(self, self.conv_names[k]), getattr(self, self.dt_names[k])
            A_log, D, x_proj = (getattr(self, names[k]) for names in (self.A_names, self.D_names, self.x_names))
            ways.append([A_log, D, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias])
        return ways

    def scan_in_order(self, x: Tensor, z: Tensor) -> Tensor:
        """Convolves and scans tokens (B, L, E) forwards and backwards; the gated sum (B, L, E)."""
        ways = [prepared(way, self.dt_rank) for way in self.ways()]
        return scan_ways(x, z, ways, self.backwards, self.dt_rank, self.d_state)

    def scan_along_routes(self, x: Tensor, z: Tensor, grid: list[int]) -> Tensor:
        """Convolves and scans tokens (B, M + 1, E) of a grid along the routes; the gated sum (B, M + 1, E)."""
        route = torch.ops.triscan.scan_routes(x, self.routes, grid[0], grid[1], True)
        return scan_along(x, z, route, self.ways(), self.dt_rank, self.d_state, "sum")

    def forward(self, x: Tensor, grid: list[int]) -> Tensor:
        """Mixes tokens (B, M + 1, D) of a grid of M patches, the class token at row M // 2; returns (B, M + 1, D)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.scan_in_order(x, z) if self.in_order else self.scan_along_routes(x, z, grid)
        return F.linear(y, self.out_proj.weight / self.K)

    @torch.jit.ignore
    def infer(self, x: Tensor, ready: Ready) -> Tensor:
        """``forward`` of a mixer whose routes are in order, with weights that were made ready; no gradients."""
        x, z = F.linear(x, ready.in_proj).chunk(2, dim=-1)
        return F.linear(scan_ways(x, z, ready.ways, self.backwards, self.dt_rank, self.d_state), ready.out_proj)
