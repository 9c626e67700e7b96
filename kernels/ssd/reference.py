"""The definition of ``ssd``: a plain loop over the positions, any dtype, differentiable. The tests' truth.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T       (Dao & Gu 2024, equation 2 with A a number times the identity,
    y_t = h_t C_t + D x_t                             discretised as in section 7.1)

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan.reference import along, on_a_route
from kernels.ssd.problem import Problem


def scan(p: Problem) -> tuple[Tensor, Tensor]:
    """Returns ``y (B, L, H, P)`` or ``(B, L, K, H, P)`` in x's dtype, and the final state ``(S, K, H, P, N)``."""
    if p.cu_seqlens is not None:
        return packed(p, p.cu_seqlens, scan)
    x, dt, B, C = prepare(p, *gather(p))
    B, C = (t.repeat_interleave(p.heads // p.groups, 3) for t in (B, C))  # (B, T, K, H, N)
    A, h = p.A.to(p.dtype), start_state(p)
    order = range(p.positions - 1, -1, -1) if p.reverse else range(p.positions)
    y = [torch.empty(0)] * p.positions
    for t in order:
        if p.code is not None:
            h = torch.where(p.code[:, :, t, None, None, None] == 1, 0, h)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, ..., None] * x[:, t])[..., None] * B[:, t, :, :, None]
        y[t] = (h * C[:, t, :, :, None]).sum(-1)
    return finish(p, skip(p, torch.stack(y, 1) if y else x, x)), h


def start_state(p: Problem) -> Tensor:
    """The initial state ``(S, K, H, P, N)``, zeros where none is given."""
    if p.initial_state is not None:
        return p.initial_state.to(p.dtype)
    return p.x.new_zeros((p.sequences, p.routes, p.heads, p.head_dim, p.state), dtype=p.dtype)


def gather(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x ``(B, T, K, H, P)``, dt ``(B, T, K, H)``, B and C ``(B, T, K, G, N)`` as they are, read along the routes."""
    x = along(p.x.expand(-1, -1, p.routes, -1, -1), p.route)
    return x, along(p.dt, p.route), along(p.B, p.route), along(p.C, p.route)


def prepare(p: Problem, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``gather`` returned in the dtype of the scan, with dt after bias, softplus and limits."""
    x, dt, B, C = (t.to(p.dtype) for t in (x, dt, B, C))
    keep = None
    if p.code is not None:  # a skipped position: no decay (dt = 0), no input, no output, whatever is there
        keep = (p.code != 2).transpose(1, 2)[..., None]
        dt = torch.where(keep, dt, 0)
        x, B, C = (torch.where(keep[..., None], t, 0) for t in (x, B, C))
    dt = limited(p, dt)
    return x, dt if keep is None else torch.where(keep, dt, 0), B, C


def limited(p: Problem, dt: Tensor) -> Tensor:
    """dt ``(..., K, H)`` after bias, softplus and limits, in the dtype of the scan."""
    dt = dt.to(p.dtype)
    if p.dt_bias is not None:
        dt = dt + p.dt_bias.to(p.dtype)
    if p.dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*p.dt_limit) if p.clamped else dt


def skip(p: Problem, y: Tensor, x: Tensor) -> Tensor:
    """``y + D x`` at the positions, ``(B, T, K, H, P)``."""
    if p.D is None:
        return y
    D = p.D.to(p.dtype)
    return y + (D if D.ndim == 3 else D[..., None]) * x


def finish(p: Problem, y: Tensor) -> Tensor:
    """Outputs at positions ``(B, T, K, H, P)`` to the tokens: merged, gated, rounded once."""
    if p.route is not None:
        place = torch.where(p.route < 0, p.length, p.route).long().t()  # padding goes to a row that is cut off
        tokens = y.new_zeros(p.batch, p.length + 1, *y.shape[2:])
        rows = torch.arange(p.batch, device=y.device)[:, None, None]
        y = tokens.index_put((rows, place, torch.arange(p.routes, device=y.device)[None]), y)[:, :-1]
    if p.merge or p.route is None:
        y = y.sum(2)
    if p.z is not None:
        silu = F.silu(gate(p, p.z))
        y = y * (silu if y.ndim == 4 else silu[:, :, None])
    return y.to(p.x.dtype)


def gate(p: Problem, z: Tensor) -> Tensor:
    """z in the dtype of the scan, zero at tokens that are skipped or on no route, whatever it holds there."""
    z = z.to(p.dtype)
    if p.padding is not None:
        z = torch.where(p.padding[..., None, None], 0, z)
    if p.route is not None:
        z = torch.where(on_a_route(p.route, p.length)[:, None, None], z, 0)
    return z


def packed(p: Problem, cu_seqlens: Tensor, scan: Callable[[Problem], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scans each packed sequence on its own, and lays them end to end again."""
    found = [scan(part) for part in sequences(p, cu_seqlens)]
    return torch.cat([y for y, _ in found], 1), torch.cat([h for _, h in found])


def sequences(p: Problem, cu_seqlens: Tensor) -> list[Problem]:
    """Each packed sequence as a problem of its own."""
    parts = []
    for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        part = {n: getattr(p, n)[:, start:end] for n in ("x", "dt", "B", "C", "z") if getattr(p, n) is not None}
        state = None if p.initial_state is None else p.initial_state[s : s + 1]
        parts.append(dataclasses.replace(p, **part, initial_state=state, cu_seqlens=None))
    return parts
