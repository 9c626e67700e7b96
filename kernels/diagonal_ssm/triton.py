"""Triton kernels: the states between chunks in one pass over memory instead of one for each doubling of the reach, and
the copies around them, which take several times as long as PyTorch's copies between strides.

Legend: R rows (channels and sequences), J chunks, M complex states of a row; B batch, L length, H channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.plans import on_device

TILE = 128  # steps of a tile, which a block of threads scans at once
STATES = 8  # states of a block: their numbers are 64 bytes side by side


@triton.jit
def _compose(a1r, a1i, x1r, x1i, a2r, a2i, x2r, x2i):
    """x -> a1 x + x1, then x -> a2 x + x2."""
    return (a1r * a2r - a1i * a2i, a1r * a2i + a1i * a2r,
            a2r * x1r - a2i * x1i + x2r, a2r * x1i + a2i * x1r + x2i)  # fmt: skip


@triton.jit
def _tile(step, added, edge, row, j, m, J, M, per_step, ADJOINT: tl.constexpr):
    """Of the steps j (T, S): decays, and what each adds; ``edge`` stands at one end of ``added``."""
    inside = (j <= J) & (m < M)
    a = (row // per_step * M + m) * 2 + tl.zeros_like(j)
    ar, ai = tl.load(step + a, inside, 1.0), tl.load(step + a + 1, inside, 0.0)
    if ADJOINT:
        ai = -ai
        at_edge, place = j == J, j
    else:
        at_edge, place = j == 0, j - 1
    of_edge = (row * M + m) * 2 + tl.zeros_like(j)
    of_rest = ((row.to(tl.int64) * J + place) * M + m) * 2
    rest = inside & (at_edge == 0)
    xr = tl.load(added + of_rest, rest, 0.0) + tl.load(edge + of_edge, inside & at_edge, 0.0)
    xi = tl.load(added + of_rest + 1, rest, 0.0) + tl.load(edge + of_edge + 1, inside & at_edge, 0.0)
    return ar, ai, xr, xi, inside


@triton.jit
def _states_kernel(step, added, first, before, last, J, M, per_step, T: tl.constexpr, S: tl.constexpr):
    """x_0 = first, x_{j+1} = a x_j + added_j: ``before`` gets x_0 to x_{J-1}, ``last`` x_J."""
    row, m = tl.program_id(0), tl.program_id(1) * S + tl.arange(0, S)[None, :]
    lines = tl.arange(0, T)[:, None]
    er, ei = tl.zeros((1, S), tl.float32), tl.zeros((1, S), tl.float32)
    for tile in range(tl.cdiv(J + 1, T)):
        j = tile * T + lines
        ar, ai, xr, xi, inside = _tile(step, added, first, row, j, m, J, M, per_step, False)
        ar, ai, xr, xi = tl.associative_scan((ar, ai, xr, xi), 0, _compose)
        xr, xi = ar * er - ai * ei + xr, ar * ei + ai * er + xi
        out = ((row.to(tl.int64) * J + j) * M + m) * 2
        tl.store(before + out, xr, inside & (j < J))
        tl.store(before + out + 1, xi, inside & (j < J))
        end = (row * M + m) * 2 + tl.zeros_like(j)
        tl.store(last + end, xr, inside & (j == J))
        tl.store(last + end + 1, xi, inside & (j == J))
        er = tl.sum(tl.where(lines == T - 1, xr, 0.0), 0, keep_dims=True)
        ei = tl.sum(tl.where(lines == T - 1, xi, 0.0), 0, keep_dims=True)


@triton.jit
def _adjoint_kernel(
    step, before, dbefore, dlast, dadded, dfirst, dstep, J, M, per_step, T: tl.constexpr, S: tl.constexpr
):
    """g_J = dlast, g_j = a* g_{j+1} + dbefore_j: g_1 to g_J go to ``dadded``; ``dstep`` is the sum of g_{j+1} x_j*."""
    row, m = tl.program_id(0), tl.program_id(1) * S + tl.arange(0, S)[None, :]
    lines = tl.arange(0, T)[:, None]
    er, ei = tl.zeros((1, S), tl.float32), tl.zeros((1, S), tl.float32)
    sr, si = tl.zeros((1, S), tl.float32), tl.zeros((1, S), tl.float32)
    tiles = tl.cdiv(J + 1, T)
    for i in range(tiles):
        j = (tiles - 1 - i) * T + lines
        ar, ai, gr, gi, inside = _tile(step, dbefore, dlast, row, j, m, J, M, per_step, True)
        ar, ai, gr, gi = tl.associative_scan((ar, ai, gr, gi), 0, _compose, reverse=True)
        gr, gi = ar * er - ai * ei + gr, ar * ei + ai * er + gi
        out, later = ((row.to(tl.int64) * J + j - 1) * M + m) * 2, inside & (j > 0)
        tl.store(dadded + out, gr, later)
        tl.store(dadded + out + 1, gi, later)
        xr, xi = tl.load(before + out, later, 0.0), tl.load(before + out + 1, later, 0.0)
        sr += tl.sum(gr * xr + gi * xi, 0, keep_dims=True)
        si += tl.sum(gi * xr - gr * xi, 0, keep_dims=True)
        end = (row * M + m) * 2 + tl.zeros_like(j)
        tl.store(dfirst + end, gr, inside & (j == 0))
        tl.store(dfirst + end + 1, gi, inside & (j == 0))
        er = tl.sum(tl.where(lines == 0, gr, 0.0), 0, keep_dims=True)
        ei = tl.sum(tl.where(lines == 0, gi, 0.0), 0, keep_dims=True)
    end = (row * M + m) * 2
    tl.store(dstep + end, sr, m < M)
    tl.store(dstep + end + 1, si, m < M)


@triton.jit
def _copy_kernel(source, target, L, H, from_b, from_l, from_h, to_b, to_l, to_h, T: tl.constexpr, C: tl.constexpr):
    """A tile of T samples and C channels of a sequence, from strides to strides."""
    tiles = tl.cdiv(L, T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    sample = (tl.program_id(0) % tiles * T + tl.arange(0, T)[:, None]).to(tl.int64)
    channel = (tl.program_id(1) * C + tl.arange(0, C)[None, :]).to(tl.int64)
    inside = (sample < L) & (channel < H)
    x = tl.load(source + b * from_b + sample * from_l + channel * from_h, inside)
    tl.store(target + b * to_b + sample * to_l + channel * to_h, x, inside)


class _States(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added: Tensor, first: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        added, first, step = added.contiguous(), first.contiguous(), step.contiguous()
        before, last = torch.empty_like(added), torch.empty_like(first)
        _launch(_states_kernel, (step, added, first, before, last), added, step)
        ctx.save_for_backward(before, step)
        return before, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dbefore: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, step = ctx.saved_tensors
        dadded, dfirst, dstep = torch.empty_like(before), torch.empty_like(dlast), torch.empty_like(dlast)
        given = (step, before, dbefore.contiguous(), dlast.contiguous(), dadded, dfirst, dstep)
        _launch(_adjoint_kernel, given, before, step)
        return dadded, dfirst, dstep.view(step.shape[0], -1, *step.shape[1:]).sum(1)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: Tensor, step: Tensor) -> None:
    channels, states = step.shape[:2]
    count, chunks = rows.shape[:2]
    grid = (count, triton.cdiv(states, STATES))
    with on_device(rows):
        kernel[grid](*tensors, chunks, states, count // channels, T=TILE, S=STATES)


def between(added: Tensor, first: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 = first, x_{j+1} = step x_j + added_j, with gradients; see ``aten.between``."""
    shape = added.shape
    before, last = _States.apply(added.flatten(0, 1), first.flatten(0, 1), torch.view_as_real(step))  # type: ignore
    return before.view(shape), last.view(first.shape)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, H) -> (H, B, L), contiguous."""
    batch, length, channels = x.shape
    out = x.new_empty((channels, batch, length), dtype=dtype)
    _copy(x, out.permute(1, 2, 0))
    return out


def put_rows(x: Tensor, to: Tensor) -> None:
    """(H, B, L) into ``to`` (B, L, H)."""
    _copy(x.permute(1, 2, 0), to)


def _copy(source: Tensor, target: Tensor) -> None:
    batch, length, channels = source.shape
    C = min(32, triton.next_power_of_2(channels))
    T = min(2048 // C, triton.next_power_of_2(length))
    with on_device(source):
        _copy_kernel[(batch * triton.cdiv(length, T), triton.cdiv(channels, C))](
            source, target, length, channels, *source.stride(), *target.stride(), T=T, C=C
        )
