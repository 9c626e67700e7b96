"""Mamba-3's recurrence as one SSD: what comes before the scan, and what its outputs lack.

    h_t = a_t h_{t-1} + (1 - l_t) dt_t a_t k_{t-1} v_{t-1}^T + l_t dt_t k_t v_t^T,    y_t = h_t q_t + D v_t,
    a_t = exp(A_t dt_t)                           (Mamba-3, 2026: the exponential-trapezoidal rule)

An input enters twice, at its own step and at the next, after which both parts decay alike. So it can enter at once,
with weight s_t = l_t dt_t + (1 - l_{t+1}) dt_{t+1}, in an ordinary SSD; y_t has then seen (1 - l_{t+1}) dt_{t+1} k_t
v_t^T a step too soon, which is taken away again. After the last token nothing follows: the state is the true one.

``ssd`` weighs an input by the same number that the state decays by, dt' = -A_t dt_t here; keys are divided by it.

With rank R (MIMO) a step's R keys and values are R positions of the scan. Nearly all of the decay belongs to the first
one, ``SLIVER`` to each other, which keys and queries make up for; a query lacks the keys behind it in its own step.

Legend: B batch, L length, H heads, P head dim, N state, R rank, S rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.mixers.rotary import rotate

A_ACTIVATIONS = ("heavy_tail", "softplus")
SLIVER = 1 / 32  # of a step's decay, for each position but the first
SMALLEST = 1e-30  # decay exponents below it are raised to it: keys are divided by them


class Terms(NamedTuple):
    """Steps of the recurrence, in float32 or float64."""

    dt: Tensor  # (B, L, H)
    decay: Tensor  # (B, L, H): -A dt
    trap: Tensor  # (B, L, H): l, how much of an input enters at its own step
    next: Tensor  # (B, L, H): (1 - l) dt of the step after, zero where a sequence ends


def activate(x: Tensor, kind: str) -> Tensor:
    """The decay rate before its floor: softplus(x), or 1 + x for x >= 0 and 1 / (1 - x) below ("heavy_tail")."""
    if kind == "softplus":
        return F.softplus(x)
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


def next_weights(dt: Tensor, trap: Tensor, last: Tensor | None) -> Tensor:
    """(1 - l) dt of the next token (B, L, H), zero where there is none: at the end, and where ``last`` (B, L) says."""
    weights = F.pad(((1 - trap) * dt)[:, 1:], (0, 0, 0, 1))
    return weights if last is None else torch.where(last[..., None], 0, weights)


class _CumulativeTurns(torch.autograd.Function):
    """Running sums over L, modulo 1, in fixed point: exact for any length, where float32 would lose whole turns."""

    @staticmethod
    def forward(turns: Tensor) -> Tensor:
        bits = 52 if turns.dtype == torch.float64 else 32
        steps = ((turns - turns.round()) * 2.0**bits).round().long()
        return (steps.cumsum(1) & (2**bits - 1)).to(turns.dtype) * 2.0**-bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.flip(1).cumsum(1).flip(1)


def cumulative_angles(angle: Tensor, dt: Tensor, start: Tensor | None) -> Tensor:
    """Angles (B, L, H, S) in [0, 4 pi): the running sum of tanh(angle) pi dt modulo 2 pi, from ``start`` on.

    Args:
        angle: (B, L, S) before tanh.
        dt: (B, L, H).
        start: (B, H, S) in [0, 2 pi), or None for 0.
    """
    turns = torch.tanh(angle.to(dt.dtype))[:, :, None] * (dt[..., None] / 2)
    angles = 2 * math.pi * _CumulativeTurns.apply(turns)  # type: ignore[operator]
    return angles if start is None else angles + start[:, None].to(angles.dtype)


def turn_heads(t: Tensor, bias: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Keys or queries of groups as those of heads, with bias, rotated.

    Args:
        t: (B, L, R, G, N).
        bias: (H, R, N).
        angles: (B, L, H, S).
        interleaved: Pairs are (2i, 2i + 1), else (i, i + N / 2).

    Returns:
        (B, L, R, H, N) in the dtype of the angles.
    """
    wide = t.to(angles.dtype).repeat_interleave(bias.shape[0] // t.shape[3], 3)
    wide = wide + bias.transpose(0, 1).to(angles.dtype)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    if not interleaved:  # pairs span all of N; those beyond S stay as they are
        rest = (0, t.shape[4] // 2 - angles.shape[3])
        cos, sin = F.pad(cos, rest, value=1.0), F.pad(sin, rest)
    return rotate(wide, cos, sin, interleaved)


class Positions(NamedTuple):
    """What the scan gets, R positions a step."""

    x: Tensor  # (B, L R, H, P)
    dt: Tensor  # (B, L R, H)
    B: Tensor  # (B, L R, H, N)
    C: Tensor  # (B, L R, H, N)


def positions(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Positions:
    """Lays the steps out for the scan.

    Args:
        q: (B, L, R, H, N).
        k: As q.
        v: (B, L, R, H, P); its dtype is that of the products.
        terms: The steps.
    """
    rank = q.shape[2]
    behind = torch.arange(rank - 1, -1, -1, device=q.device, dtype=q.dtype) * SLIVER  # decay after each position
    share = torch.full_like(behind, SLIVER)
    share[:1].fill_(1 - (rank - 1) * SLIVER)  # filled: an assignment would copy from the CPU, which no CUDA graph takes
    decay = terms.decay[:, :, None]  # (B, L, 1, H)
    dt = (decay * share[:, None]).clamp(min=SMALLEST)
    made_up = torch.exp(decay * behind[:, None])
    weight = (terms.trap * terms.dt + terms.next)[:, :, None]
    # float16 does not reach the quotients; the scan's products of it are float32 anyway
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    keys = (k * (weight / dt * made_up)[..., None]).to(dtype)
    queries = (q / made_up[..., None]).to(dtype)
    return Positions(v.flatten(1, 2), dt.flatten(1, 2), keys.flatten(1, 2), queries.flatten(1, 2))


def same_step(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """What the scan's outputs lack of their own step, (B, L, R, H, P); the arguments are those of ``positions``.

    A query sees its step's keys with weight l dt; the scan gave it those up to its own position, with weight s.
    """
    rank = q.shape[2]
    scores = torch.einsum("blihn,bljhn->blhij", q, k)
    own = (terms.trap * terms.dt)[..., None, None]
    seen = torch.ones(rank, rank, device=q.device, dtype=q.dtype).tril()
    scores = scores * (own - (own + terms.next[..., None, None]) * seen)
    return torch.einsum("blhij,bljhp->blihp", scores, v.to(scores.dtype))
