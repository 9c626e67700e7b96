"""``ssd`` in plain ATen operators, chunk by chunk: for CPUs, devices without a kernel, export, higher derivatives.

Inside a chunk the dual form, which is matrix products; between chunks the state (Dao & Gu 2024, section 6). Memory is
a few ``(B, K, H, Q, Q)`` tensors; with autograd each chunk is computed again in the backward.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.ssd.problem import Problem
from kernels.ssd.quadratic import in_order
from kernels.ssd.reference import finish, gather, packed, prepare, skip, start_state

CHUNK = 64
ELEMENTS = 1 << 24  # of a (B, K, H, Q, Q) tensor: more rows and heads than fit take shorter chunks


def scan(p: Problem) -> tuple[Tensor, Tensor]:
    """Returns ``y (B, L, H, P)`` or ``(B, L, K, H, P)`` in x's dtype, and the final state ``(S, K, H, P, N)``."""
    if p.cu_seqlens is not None:
        return packed(p, p.cu_seqlens, scan)
    rows, h = gather(p), start_state(p)
    parts = []
    for span in chunks(p):
        x, dt, B, C = (t[:, span] for t in rows)
        run = _recomputed if torch.is_grad_enabled() else chunk
        y, h = run(at(p, span), x, dt, B, C, h)
        parts.append(y)
    if not parts:
        parts = [prepare(p, *rows)[0]]
    return finish(p, torch.cat(parts[::-1] if p.reverse else parts, 1)), h


def chunks(p: Problem) -> Iterator[slice]:
    """The positions of each chunk, in the order in which they are visited."""
    step = CHUNK
    while step > 16 and p.batch * p.routes * p.heads * step * step > ELEMENTS:
        step //= 2
    starts = range(0, p.positions if p.groups else 0, step)
    for start in reversed(starts) if p.reverse else starts:
        yield slice(start, min(start + step, p.positions))


def at(p: Problem, span: slice) -> Problem:
    """The problem with the codes of these positions."""
    return p if p.code is None else dataclasses.replace(p, code=p.code[:, :, span])


def _recomputed(p: Problem, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``chunk``, of which autograd keeps the inputs only."""
    return checkpoint(chunk, p, x, dt, B, C, h, use_reentrant=False, preserve_rng_state=False)  # type: ignore


def chunk(p: Problem, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs before the gate and the state after a chunk, from the rows that ``gather`` reads for it."""
    x, dt, B, C = prepare(p, x, dt, B, C)
    y, h = in_order(p, x, dt, B, C, h, None if p.code is None else p.code == 1)
    return skip(p, y, x), h
