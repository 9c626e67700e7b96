"""The dual form of ``ssd``: one multiplication by a semiseparable matrix, as in attention with a mask.

    y = M x,   M = L o (C B^T diag(dt)),   L_ij = a_i a_{i-1} ... a_{j+1} for i >= j, else 0,   a_t = exp(dt_t A)

(Dao & Gu 2024, equations 3 and 16: the structured mask L in place of the causal mask and the softmax.) It costs L^2
operations where the recurrence costs L. The chunked algorithm is this form inside chunks and the recurrence between
them (section 6), so ``block`` here is its inside.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, S sequences, R = H / G.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_float, check_shape, full_precision
from kernels.ssd.problem import Problem
from kernels.ssd.reference import finish, gather, packed, prepare, skip, start_state


def semiseparable_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The matrix M that ``ssd`` multiplies x by: ``ssd(x, ...)[:, :, h] = M[:, h] @ x[:, :, h]`` without D, z, states.

    ``M_ij = <C_i, B_j> exp(dt_{j+1} A + ... + dt_i A) dt_j`` for i >= j, else 0 (Dao & Gu 2024, definition 3.2 with
    A a number times the identity; equation 16). Every sum of exponents is taken directly, none is a difference.

    Args:
        dt: ``(B, L, H)``, before bias, softplus and limits as in ``ssd``.
        A: ``(H,)``; 0 makes M the causal linear attention, a negative constant with dt = 1 the retention of RetNet.
        B: ``(B, L, G, N)``, the keys of attention.
        C: ``(B, L, G, N)``, the queries.
        dt_bias: ``(H,)`` or None.
        dt_softplus: Whether dt goes through softplus.
        dt_limit: dt is clamped between these two.

    Returns:
        ``(B, H, L, L)`` in dt's dtype.

    Raises:
        ValueError: If a shape, dtype or device doesn't fit.
    """
    check_float(dt, A=A, B=B, C=C, dt_bias=dt_bias)
    if dt.ndim != 3 or B.ndim != 4:
        raise ValueError(f"dt, B: got shapes {tuple(dt.shape)}, {tuple(B.shape)}, wanted (B, L, H) and (B, L, G, N)")
    heads, groups = dt.shape[2], B.shape[2]
    check_shape("A", A, (heads,), "(H,)")
    check_shape("dt_bias", dt_bias, (heads,), "(H,)")
    check_shape("B", B, (*dt.shape[:2], *B.shape[2:]), "(B, L, G, N)")
    check_shape("C", C, tuple(B.shape), "(B, L, G, N) as B")
    if not groups or heads % groups:
        raise ValueError(f"B: got {groups} groups for {heads} heads, wanted a divisor of {heads}")
    wide = torch.float64 if dt.dtype == torch.float64 else torch.float32
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    a = (step * A.to(wide)).transpose(1, 2)
    with full_precision(dt.device):
        scores = torch.einsum("bign,bjgn->bgij", C.to(wide), B.to(wide))
    M = torch.exp(segment_sums(a)) * scores.repeat_interleave(heads // groups, 1) * step.transpose(1, 2).unsqueeze(2)
    return M.to(dt.dtype)


def segment_sums(a: Tensor) -> Tensor:
    """``a_{j+1} + ... + a_i`` at (i, j) of ``(..., T, T)`` from a ``(..., T)``; -inf above the diagonal.

    Each is a running sum of its own that starts at j: a difference of two cumulative sums would lose digits where
    these are large, in the gradient even more than in the value.
    """
    T = a.shape[-1]
    ones = torch.ones(T, T, dtype=torch.bool, device=a.device)
    sums = torch.where(ones.tril(-1), a.unsqueeze(-1), 0).cumsum(-2)
    return torch.where(ones.tril(), sums, -math.inf)


def block(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, restart: Tensor | None
) -> tuple[Tensor, Tensor]:
    """T positions in scan order at once: the outputs without D, and the state after them.

    Args:
        x: ``(B, T, K, H, P)``, T > 0.
        dt: ``(B, T, K, H)``, as ``prepare`` returns it.
        A: ``(K, H)``.
        B: ``(B, T, K, G, N)``.
        C: As B.
        h: State before them, ``(B, K, H, P, N)``.
        restart: ``(B, K, T)``, where the state is set to zero first; or None.

    Returns:
        y ``(B, T, K, H, P)`` and the state ``(B, K, H, P, N)``.
    """
    groups = (B.shape[3], x.shape[3] // B.shape[3])  # G, R

    def grouped(t: Tensor) -> Tensor:  # (B, K, G, R, T) from (B, T, K, H)
        return t.permute(0, 2, 3, 1).unflatten(2, groups)

    a = grouped(dt * A)
    if restart is not None:
        a = torch.where(restart[:, :, None, None], -math.inf, a)
    x, dt, h = x.unflatten(3, groups), grouped(dt), h.unflatten(2, groups)
    decay = torch.exp(segment_sums(a))  # (B, K, G, R, T, T): from j to i
    enter = torch.exp(a.cumsum(-1))  # from before the first to i
    with full_precision(x.device):
        scores = torch.einsum("bikgn,bjkgn->bkgij", C, B)
        y = torch.einsum("bkgrij,bjkgrp->bikgrp", decay * scores.unsqueeze(3) * dt.unsqueeze(-2), x)
        y = y + torch.einsum("bikgn,bkgrpn->bikgrp", C, h) * enter.permute(0, 4, 1, 2, 3).unsqueeze(-1)
        weight = (decay[..., -1, :] * dt).permute(0, 4, 1, 2, 3).unsqueeze(-1)
        h = enter[..., -1, None, None] * h + torch.einsum("bjkgrp,bjkgn->bkgrpn", weight * x, B)
    return y.flatten(3, 4), h.flatten(2, 3)


def scan(p: Problem) -> tuple[Tensor, Tensor]:
    """The whole sequence as one block: ``y (B, L, [K,] H, P)`` in x's dtype, final state ``(S, K, H, P, N)``."""
    if p.cu_seqlens is not None:
        return packed(p, p.cu_seqlens, scan)
    x, dt, B, C = prepare(p, *gather(p))
    if not p.positions or not p.groups:
        return finish(p, x), start_state(p)
    restart = None if p.code is None else p.code == 1
    y, h = in_order(p, x, dt, B, C, start_state(p), restart)
    return finish(p, skip(p, y, x)), h


def in_order(
    p: Problem, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor, restart: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``block`` for positions that are visited from the last to the first where the problem says so."""
    if not p.reverse:
        return block(x, dt, p.A.to(p.dtype), B, C, h, restart)
    flipped = (t.flip(1) for t in (x, dt))
    x, dt = flipped
    y, h = block(x, dt, p.A.to(p.dtype), B.flip(1), C.flip(1), h, None if restart is None else restart.flip(2))
    return y.flip(1), h
