"""The selective scan in plain ATen operators: for devices without a kernel, export and higher derivatives.

Positions go in chunks. Inside one, a step is the pair (a, b) of ``h -> a h + b`` and log2(T) rounds combine pairs twice
as far apart (Hillis & Steele 1986); nothing is divided by a product of decays, which underflows. Memory is a few
``(B, T, K, D, N)`` tensors with T small; with autograd each chunk is computed again in the backward.

B batch, L tokens, D channels, N state, K routes, P scan positions, T positions of a chunk, S sequences.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.selective_scan.problem import CHUNK, Problem
from kernels.selective_scan.reference import finish, inputs_at_positions, packed, read, start_state

ELEMENTS = 1 << 22  # of a (B, T, K, D, N) tensor


def scan(p: Problem, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Returns ``y (B, L, D)`` or ``(B, L, K, D)`` in x's dtype, and the final state ``(S, K, D, N)``.

    Args:
        p: The scan.
        chunk: Positions of a chunk at most. Long ones make small graphs, which an export wants.
    """
    if p.cu_seqlens is not None:
        return packed(p, p.cu_seqlens, scan)
    batch = 1 if isinstance(p.batch, torch.SymInt) else p.batch  # an export's symbol, which is to stay open
    step = max(1, min(chunk, ELEMENTS // max(1, batch * p.routes * p.channels * p.state)))
    starts = range(0, p.positions, step)
    h = start_state(p)
    parts = []
    for start in reversed(starts) if p.reverse else starts:
        part = _positions(p, start, min(start + step, p.positions))
        y, h = _recomputed(part, h) if torch.is_grad_enabled() else _chunk(part, h)
        parts.append(y)
    if not parts:
        parts = [inputs_at_positions(p)[0]]
    return finish(p, torch.cat(parts[::-1] if p.reverse else parts, 1)), h


def _positions(p: Problem, start: int, end: int) -> Problem:
    """The problem of the scan positions ``start:end``."""
    part: dict[str, Tensor | None] = {}
    if p.route is None:
        part["x"] = p.x[:, start:end]
    else:
        part["route"] = p.route[:, start:end]
    if p.route is None or not p.route_params:
        part["dt"] = p.dt[:, start:end]
        part |= {name: t[:, start:end] for name, t in (("B", p.B), ("C", p.C)) if t.ndim == 5}
    if p.code is not None:
        part["code"] = p.code[:, :, start:end]
    return dataclasses.replace(p, **part)


def _recomputed(p: Problem, h: Tensor) -> tuple[Tensor, Tensor]:
    """``_chunk``, of which autograd keeps the inputs only."""
    return checkpoint(_chunk, p, h, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def _chunk(p: Problem, h: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, T, K, D)`` before the gate, and the state after the chunk."""
    x, dt, B, C = inputs_at_positions(p)
    a = torch.exp(dt[..., None] * p.A.to(p.state_dtype))
    b = (dt * x)[..., None] * B
    if p.code is not None:
        a = torch.where((p.code == 1).transpose(1, 2)[..., None, None], 0, a)
    if p.reverse:
        a, b, C = a.flip(1), b.flip(1), C.flip(1)
    reach = 1
    while reach < p.positions:  # (a, b) of each position then covers ``reach`` positions up to it
        b = torch.cat([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
        reach *= 2
    states = b + a * h[:, None]
    y = read(p, states, C)
    if p.reverse:
        y = y.flip(1)
    if p.D is not None:
        y = y + p.D.to(p.dtype) * x
    return y, states[:, -1]
