"""The definition of the decoding ops in plain PyTorch; any dtype, no gradients through what is changed in place.

Legend: as in ``kernels.decode``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """t in float32, float64 for float64."""
    return t if t.dtype == torch.float64 else t.float()


def normalised(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    groups: int,
    norm_before_gate: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The rows (B, K) that a projection multiplies, and x + residual."""
    total = wide(x) if residual is None else wide(x) + wide(residual)
    s = total if gate is None or norm_before_gate else total * F.silu(wide(gate))
    if norm_weight is not None:
        parts = s.unflatten(-1, (groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
        s = parts.flatten(-2) * wide(norm_weight)
    if gate is not None and norm_before_gate:
        s = s * F.silu(wide(gate))
    return s, total


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """silu(conv) of one token (B, C), in wide precision; the state (B, W - 1, C) takes it in."""
    window = torch.cat([state, x.to(state.dtype).unsqueeze(1)], dim=1)
    state.copy_(window[:, 1:])
    y = (wide(window) * wide(weight).T).sum(1)
    return F.silu(y if bias is None else y + wide(bias))


def scan_step(
    low: Tensor,
    x: Tensor,
    z: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state: Tensor,
) -> Tensor:
    """One step of the selective scan (B, E), in wide precision; the state (B, E, N) is updated."""
    rank, n = dt_weight.shape[1], A_log.shape[1]
    dt, B, C = wide(low).sum(1).split([rank, n, n], dim=-1)
    x = wide(x)
    dt = F.softplus(dt @ wide(dt_weight).T + wide(dt_bias)).unsqueeze(-1)
    h = torch.exp(dt * -torch.exp(wide(A_log))) * wide(state) + dt * x.unsqueeze(-1) * B.unsqueeze(1)
    state.copy_(h)
    y = (h * C.unsqueeze(1)).sum(-1) + wide(D) * x
    return y * F.silu(wide(z))


def scaled(x: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor | None, eps: float) -> Tensor:
    """x W^T (B, O) over the root mean square that the squares (B, parts) are parts of, in wide precision."""
    y = F.linear(wide(x), wide(weight))
    if squares is not None:
        y = y * torch.rsqrt(wide(squares).sum(1, keepdim=True) / x.shape[1] + eps)
    return y if bias is None else y + wide(bias)


def heads_step(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor | None,
    state: Tensor,
    dt_limit: tuple[float, float],
) -> Tensor:
    """One step of Mamba-2's scan (B, H P) before its gate, in wide precision; the state (B, H, P, N) is updated."""
    _, heads, width, n = state.shape
    x = wide(x).unflatten(1, (heads, width))
    keys, queries = (wide(t).unflatten(1, (-1, n)).repeat_interleave(heads * n // t.shape[1], 1) for t in (B, C))
    step = F.softplus(wide(dt) + wide(dt_bias)).clamp(*dt_limit)
    decay = torch.exp(-step * torch.exp(wide(A_log)))
    h = decay[:, :, None, None] * wide(state) + (step[:, :, None] * x).unsqueeze(3) * keys.unsqueeze(2)
    state.copy_(h)
    y = (h * queries.unsqueeze(2)).sum(3)
    return (y if D is None else y + wide(D).view(heads, -1) * x).flatten(1)
