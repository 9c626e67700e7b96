"""The definition of the selective scan: a plain loop over the positions, any dtype, differentiable. The tests' truth.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        (Gu & Dao 2023, equation 2 with the zero-order hold of A
    y_t = <C_t, h_t> + D x_t                         and dB = dt B, section 3.2 and algorithm 2)

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan.problem import Problem


def scan(p: Problem) -> tuple[Tensor, Tensor]:
    """Returns ``y (B, L, D)`` or ``(B, L, K, D)`` in x's dtype, and the final state ``(S, K, D, N)``."""
    if p.cu_seqlens is not None:
        return packed(p, p.cu_seqlens, scan)
    x, dt, B, C = inputs_at_positions(p)
    A, h = p.A.to(p.state_dtype), start_state(p)
    order = range(p.positions - 1, -1, -1) if p.reverse else range(p.positions)
    y = [torch.empty(0)] * p.positions
    for t in order:
        if p.code is not None:
            h = torch.where(p.code[:, :, t, None, None] == 1, 0, h)
        h = torch.exp(dt[:, t, :, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        y[t] = read(p, h, C[:, t])
    out = torch.stack(y, 1) if y else x
    if p.D is not None:
        out = out + p.D.to(p.dtype) * x
    return finish(p, out), h


def start_state(p: Problem) -> Tensor:
    """The initial state ``(S, K, D, N)``, zeros where none is given."""
    if p.initial_state is not None:
        return p.initial_state.to(p.state_dtype, copy=True)  # without a position it is the final state
    return p.x.new_zeros((p.sequences, *p.A.shape), dtype=p.state_dtype)


def read(p: Problem, h: Tensor, C: Tensor) -> Tensor:
    """``<C, h>`` over the state; twice the real part where the state is complex (conjugate pairs)."""
    y = (h * C).sum(-1)
    return 2 * y.real if p.is_complex else y


def inputs_at_positions(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and dt ``(B, P, K, D)``, B and C ``(B, P, K, D, N)``, read along the routes, in the dtype of the scan."""
    x = along(p.x.expand(-1, -1, p.routes, -1), p.route).to(p.dtype)
    place = p.route if p.route is None or p.route_params else _places(p.route)
    dt = along(p.dt, place).to(p.dtype)
    keep = None if p.code is None else (p.code != 2).transpose(1, 2)[..., None]
    if keep is not None:  # before softplus, whose derivative there would be whatever dt is
        dt = torch.where(keep, dt, 0)
    if p.dt_bias is not None:
        dt = dt + p.dt_bias.to(p.dtype)
    if p.dt_softplus:
        dt = F.softplus(dt)

    def spread(t: Tensor) -> Tensor:
        if t.ndim == 3:
            return t.to(p.state_dtype).expand(p.batch, p.positions, -1, -1, -1)
        return along(t, place).to(p.state_dtype).repeat_interleave(p.channels // t.shape[3], 3)

    B, C = spread(p.B), spread(p.C)
    if keep is not None:  # a skipped position: no decay (dt = 0), no input, no output
        x, dt = torch.where(keep, x, 0), torch.where(keep, dt, 0)
        B, C = torch.where(keep[..., None], B, 0), torch.where(keep[..., None], C, 0)
    return x, dt, B, C


def finish(p: Problem, y: Tensor) -> Tensor:
    """Outputs at positions ``(B, P, K, D)`` to the tokens: merged, gated, rounded once."""
    if p.route is not None:
        place = torch.where(p.route < 0, p.length, p.route).long().t()  # padding goes to a row that is cut off
        tokens = y.new_zeros(p.batch, p.length + 1, p.routes, p.channels)
        rows = torch.arange(p.batch, device=y.device)[:, None, None]
        y = tokens.index_put((rows, place, _columns(p.route)), y)[:, :-1]
    if p.merge or p.route is None:
        y = y.sum(2)
    if p.z is not None:
        gate = F.silu(_gated(p))
        y = y * (gate if y.ndim == 3 else gate[:, :, None])
    return y.to(p.x.dtype)


def _gated(p: Problem) -> Tensor:
    """z ``(B, L, D)`` in the scan's dtype; zeros at tokens that are skipped or on no route, whatever it holds there."""
    assert p.z is not None
    z = p.z.to(p.dtype)
    if p.seq_idx is not None:
        z = torch.where((p.seq_idx < 0)[..., None], 0, z)
    if p.route is not None:
        z = torch.where(on_a_route(p.route, p.length)[:, None], z, 0)
    return z


def on_a_route(route: Tensor, length: int) -> Tensor:
    """Whether each token is on one of the routes: ``(L,)``. Nothing is written in place, as export wants it."""
    place = torch.where(route < 0, length, route).long().flatten()  # padding goes to a place that is cut off
    return torch.zeros(length + 1, dtype=torch.bool, device=route.device).index_fill(0, place, True)[:-1]


def along(t: Tensor, route: Tensor | None) -> Tensor:
    """Rows of ``t (B, L, K, ...)`` in the order of the routes: ``(B, P, K, ...)``, zeros at padding."""
    if route is None:
        return t
    if not t.shape[1]:  # no tokens, and padding that reads none of them
        t = torch.cat([t, t.new_zeros(t.shape[0], 1, *t.shape[2:])], 1)
    rows = t[:, route.clamp(min=0).long().t(), _columns(route)]
    keep = (route >= 0).t().reshape(1, *rows.shape[1:3], *([1] * (t.ndim - 3)))
    return torch.where(keep, rows, 0)


def _columns(route: Tensor) -> Tensor:
    return torch.arange(route.shape[0], device=route.device)[None]


def _places(route: Tensor) -> Tensor:
    """The scan positions themselves, with the route's padding."""
    return torch.where(route < 0, -1, torch.arange(route.shape[1], device=route.device, dtype=route.dtype))


def packed(p: Problem, cu_seqlens: Tensor, scan: Callable[[Problem], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scans each packed sequence on its own, and lays them end to end again."""
    bounds = cu_seqlens.tolist()
    outs, states = [], []
    for s, (start, end) in enumerate(pairwise(bounds)):
        part = {n: getattr(p, n)[:, start:end] for n in ("x", "dt", "z") if getattr(p, n) is not None}
        part |= {n: getattr(p, n)[:, start:end] for n in ("B", "C") if getattr(p, n).ndim == 5}
        state = None if p.initial_state is None else p.initial_state[s : s + 1]
        y, h = scan(dataclasses.replace(p, **part, initial_state=state, cu_seqlens=None))
        outs.append(y)
        states.append(h)
    return torch.cat(outs, 1), torch.cat(states)
