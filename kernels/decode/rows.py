"""The decoding ops on GPUs for many rows: matrix products with the kernels around them fused.

At 64 rows a step still reads every weight once, but each is used 64 times: tensor cores, and no longer one row after
the other. Where a projection of few rows takes the norm of a sum in front of it, one of many rows has added its outputs
to the residual stream already, so that nobody reads two tensors to multiply one; the norm's square sums come along in
the loop over the inputs, and divide the products when it ends. Weights (and states) are asked for in L2 before the
kernel in front is waited for. Parts of sums go in a fixed order; addresses are int64.

Legend: as in ``kernels.decode``; a tile is BM rows of BO outputs, over BK inputs at a time.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import dependent_launch
from kernels.decode.shared import conv_tile, silu, slots
from kernels.early import prefetch
from kernels.selective_scan.triton_steps import softplus


@triton.jit
def _project_rows_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, total_ptr, conv_weight_ptr, conv_bias_ptr,
    conv_state_ptr, B, O, K, sx, first, C, each,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, W: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows, part of the inputs): its share of y (B, parts, O), and all that follows on it."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    b = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, K)
    m_o, m_b = o < O, b < B
    weights = weight_ptr + tl.minimum(o, O - 1).to(tl.int64) * K
    c = o - first
    m_c = (c >= 0) & (c < C) & m_o
    bias = tl.zeros((BO,), tl.float32)
    conv_bias = tl.zeros((BO,), tl.float32)
    if PDL:
        gdc_launch_dependents()
        for line in range(begin, end, LINE):
            prefetch(weights + line)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=m_o, other=0.0).to(tl.float32)
    if HAS_CONV_BIAS:
        conv_bias = tl.load(conv_bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)
    taps = slots(conv_weight_ptr, 1, (c * W)[None, :], m_c[None, :], W)
    if PDL:
        gdc_wait()
    tile = m_b[:, None] & m_o[None, :]
    at = b[:, None] * O + o[None, :]
    m_bc = m_b[:, None] & m_c[None, :]
    state_at = conv_state_ptr + b[:, None] * ((W - 1) * C)
    past = slots(state_at, C, c[None, :], m_bc, W - 1)
    acc = tl.zeros((BM, BO), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    for start in range(begin, end, BK):
        k = start + tl.arange(0, BK)
        m_k = k < end
        s = tl.load(x_ptr + b[:, None] * sx + k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        w = tl.load(weights[None, :] + k[:, None], mask=m_k[:, None], other=0.0)
        if HAS_NORM:
            wide = s.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            s = wide * tl.load(norm_ptr + k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(s.to(DOT), w.to(DOT), acc, input_precision="ieee")
    if HAS_NORM:
        acc *= tl.rsqrt(square / K + eps)[:, None]
    acc += bias[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=tile, other=0.0).to(tl.float32)
        tl.store(total_ptr + at, acc, mask=tile)
    if W > 0:
        acc = acc.to(y_ptr.dtype.element_ty).to(tl.float32)  # the convolution reads what a prompt's would
        mixed = conv_tile(acc, conv_bias[None, :], taps, past, state_at, c[None, :], m_bc, C, W, tl.float32)
        acc = tl.where(m_c[None, :], mixed, acc)
    parts = tl.num_programs(2)
    tl.store(y_ptr + (b[:, None] * parts + tl.program_id(2)) * O + o[None, :], acc, mask=tile)


@triton.jit
def _scan_rows_kernel(
    part_ptr, x_ptr, z_ptr, dt_weight_ptr, bias_ptr, A_ptr, D_ptr, state_ptr, y_ptr, rows, E, parts, sx, sz,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BM: tl.constexpr,
    BE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = exp(dt A) h + dt x B, y = (<C, h> + D x) silu(z), for BE channels of BM rows."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    b = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    m_e, m_n, m_b = e < E, n < N, b < rows
    if PDL:
        gdc_launch_dependents()
        prefetch(state_ptr + (tl.minimum(b, rows - 1)[:, None] * E + tl.minimum(e, E - 1)[None, :]) * N)
    weight = tl.load(dt_weight_ptr + e[None, :] * R + r[:, None], mask=m_e[None, :] & (r < R)[:, None], other=0.0)
    bias = tl.load(bias_ptr + e, mask=m_e, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + e[:, None] * N + n[None, :], mask=m_e[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    A = -tl.exp(A)
    D = tl.load(D_ptr + e, mask=m_e, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    m_be = m_b[:, None] & m_e[None, :]
    state_at = state_ptr + (b[:, None, None] * E + e[None, :, None]) * N + n[None, None, :]
    live = m_be[:, :, None] & m_n[None, None, :]
    h = tl.load(state_at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b[:, None] * sx + e[None, :], mask=m_be, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + b[:, None] * sz + e[None, :], mask=m_be, other=0.0).to(tl.float32)
    low = tl.zeros((BM, BLOCK_R), tl.float32)
    keys = tl.zeros((BM, BLOCK_N), tl.float32)
    queries = tl.zeros((BM, BLOCK_N), tl.float32)
    row = part_ptr + b[:, None] * (parts * (R + 2 * N))
    m_r, m_bn = m_b[:, None] & (r < R)[None, :], m_b[:, None] & m_n[None, :]
    for _ in range(parts):
        low += tl.load(row + r[None, :], mask=m_r, other=0.0).to(tl.float32)
        keys += tl.load(row + R + n[None, :], mask=m_bn, other=0.0).to(tl.float32)
        queries += tl.load(row + R + N + n[None, :], mask=m_bn, other=0.0).to(tl.float32)
        row += R + 2 * N
    dt = tl.dot(low, weight.to(tl.float32), input_precision=PRECISION)  # the sums of parts are not rounded
    dt = softplus(dt + bias[None, :])
    h = tl.exp(dt[:, :, None] * A[None, :, :]) * h + (dt * x)[:, :, None] * keys[:, None, :]
    tl.store(state_at, h, mask=live)
    y = (tl.sum(h * queries[:, None, :], 2) + D[None, :] * x) * silu(z)
    tl.store(y_ptr + b[:, None] * E + e[None, :], y, mask=m_be)


class Tiles(NamedTuple):
    """How a projection is cut."""

    rows: int  # BM
    outputs: int  # BO
    inputs: int  # BK
    parts: int  # of the inputs, each with a sum of its own
    warps: int
    stages: int


def tiles(batch: int, outputs: int, inputs: int, whole: bool) -> Tiles:
    """A rule on the sizes: as many programs as a GPU has multiprocessors, or half of that where sums are whole."""
    rows = max(16, min(64, triton.next_power_of_2(batch)))
    wide = 32 if outputs >= 2048 else 16
    programs = triton.cdiv(batch, rows) * triton.cdiv(outputs, wide)
    parts = 1 if whole else max(1, min(8, 64 // programs, triton.cdiv(inputs, 128)))
    return Tiles(rows, wide, 128, parts, 4, 4)


def _products(x: Tensor) -> Any:
    """What is multiplied: x's own dtype, but for Triton's interpreter, which has no 16-bit products."""
    return getattr(tl, str(x.dtype).removeprefix("torch.")) if x.is_cuda else tl.float32


def project_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    conv: tuple[Tensor, Tensor | None, Tensor, int] | None,
    whole: bool,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs (B, O), or float32 parts (B, parts, O) of their sums, and residual + outputs if there is a residual."""
    (batch, inputs), outputs = x.shape, weight.shape[0]
    cut = tiles(batch, outputs, inputs, whole) if cut is None else cut
    shape, dtype = ((batch, outputs), x.dtype) if whole else ((batch, cut.parts, outputs), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    total = None if residual is None else torch.empty_like(residual)
    conv_weight, conv_bias, conv_state, first = (x, None, x, 0) if conv is None else conv
    channels, width = (0, 0) if conv is None else conv_weight.shape
    each = triton.cdiv(triton.cdiv(inputs, cut.parts), cut.inputs) * cut.inputs
    grid = (triton.cdiv(outputs, cut.outputs), triton.cdiv(batch, cut.rows), cut.parts)
    _project_rows_kernel[grid](
        x, *(x if t is None else t for t in (norm_weight,)), weight, *(x if t is None else t for t in (bias, residual)),
        y, y if total is None else total, conv_weight, x if conv_bias is None else conv_bias, conv_state,
        batch, outputs, inputs, x.stride(0), first, channels, each,
        eps=eps, HAS_NORM=norm_weight is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        W=width, HAS_CONV_BIAS=conv_bias is not None, BM=cut.rows, BO=cut.outputs, BK=cut.inputs, DOT=_products(x),
        LINE=128 // weight.element_size(), num_warps=cut.warps, num_stages=cut.stages, **dependent_launch(x),
    )  # fmt: skip
    return y, total


def scan_rows(
    low: Tensor, x: Tensor, z: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, state: Tensor,
    rows: int = 16, channels: int = 32, warps: int = 4,
) -> Tensor:  # fmt: skip
    """``scan_step`` with tiles of many rows: their time steps are a matrix product."""
    (batch, inner), (rank, n) = x.shape, (dt_weight.shape[1], A_log.shape[1])
    y = torch.empty(batch, inner, dtype=x.dtype, device=x.device)
    _scan_rows_kernel[(triton.cdiv(inner, channels), triton.cdiv(batch, rows))](
        low, x, z, dt_weight, dt_bias, A_log, D, state, y, batch, inner, low.shape[1], x.stride(0), z.stride(0),
        R=rank, N=n, BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_N=triton.next_power_of_2(n), BM=rows,
        BE=channels, PRECISION="tf32x3" if x.is_cuda else "ieee", num_warps=warps, **dependent_launch(x),
    )  # fmt: skip
    return y
