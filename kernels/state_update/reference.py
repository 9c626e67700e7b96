"""The definition of ``state_update``: a loop over tokens in plain operators. The tests' truth.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T       (Gu & Dao 2023, equation 2 with the discretisation of section 3.3;
    y_t = h_t C_t + D x_t, then y_t silu(z_t)         Dao & Gu 2024, section 6 where A is one number a head)

B batch, T tokens, H heads, P head dim, N state, G groups, S rows of states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.state_update.problem import Problem


def update(p: Problem) -> Tensor:
    """Updates ``p.state`` in place and returns y ``(B, T, H, P)`` in x's dtype."""
    y, h = [], read_rows(p)
    repeats = p.heads // p.groups
    for t in range(p.x.shape[1]):
        x, dt, B, C = (v[:, t].to(p.dtype) for v in (p.x, p.dt, p.B, p.C))
        dt = time_step(p, dt)
        B, C = (v.repeat_interleave(repeats, 1)[:, :, None, :] for v in (B, C))  # (B, H, 1, N)
        h = torch.exp(dt[..., None] * p.A.to(p.dtype)) * h + (dt * x)[..., None] * B
        y.append(finish(p, t, (h * C).sum(-1), x))
    write_rows(p, h)
    return drop_padding(p, torch.stack(y, 1)) if y else torch.empty_like(p.x)


def time_step(p: Problem, dt: Tensor) -> Tensor:
    """dt ``(B, H, P or 1)`` after bias, softplus and limits."""
    if p.dt_bias is not None:
        dt = dt + p.dt_bias.to(p.dtype)
    if p.dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*p.dt_limit) if p.clamped else dt


def finish(p: Problem, t: int, y: Tensor, x: Tensor) -> Tensor:
    """y ``(B, H, P)`` with skip connection and gate, rounded once."""
    if p.D is not None:
        y = y + p.D.to(p.dtype) * x
    if p.z is not None:
        y = y * F.silu(p.z[:, t].to(p.dtype))
    return y.to(p.x.dtype)


def read_rows(p: Problem) -> Tensor:
    """The states ``(B, H, P, N)`` of the batch, a copy in the wide dtype; those of padding rows are anything."""
    rows = p.state if p.indices is None else p.state[p.indices.clamp(min=0).long()]
    return rows.to(p.dtype, copy=True, memory_format=torch.contiguous_format)


def write_rows(p: Problem, rows: Tensor) -> None:
    """Puts the states back where they came from."""
    if p.indices is None:
        p.state.copy_(rows)
        return
    real = p.indices >= 0
    p.state[p.indices[real].long()] = rows[real].to(p.state.dtype)


def drop_padding(p: Problem, y: Tensor) -> Tensor:
    """y with the padding rows zero."""
    return y if p.indices is None else torch.where((p.indices < 0)[:, None, None, None], 0, y)
