"""The decoding ops on GPUs: one pass over a block of weight rows a program, everything around the product fused.

At a batch of one a step reads every weight once and computes next to nothing, so time is launches and latency. A
program loads its rows of the weight to registers before it looks at the input: with programmatic dependent launch
(sm_90) they are on their way while the kernel before still runs. No atomics; addresses are int64.

Legend: as in ``kernels.decode``; O outputs, K inputs of a projection.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import dependent_launch
from kernels.selective_scan.triton_steps import softplus

TILE = 8192  # weights that a program of 4 warps holds: 64 a thread


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _input(
    x_ptr, residual_ptr, gate_ptr, norm, total_ptr, store_total, k, m_k, K,
    eps: tl.constexpr, GROUPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr, GATE_LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The row (BLOCK_K,) that the weights multiply: x + residual, gated and normalised; stores the sum if told to."""
    s = tl.load(x_ptr + k, mask=m_k, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + k, mask=m_k, other=0.0).to(ACC)
        tl.store(total_ptr + k, s, mask=m_k & store_total)
    gate = s
    if HAS_GATE:
        gate = _silu(tl.load(gate_ptr + k, mask=m_k, other=0.0).to(ACC))
        if not GATE_LAST:
            s *= gate
    if HAS_NORM:
        size = K // GROUPS
        rstd = tl.zeros_like(s)
        for g in tl.static_range(GROUPS):
            mine = (k // size == g) & m_k
            square = tl.sum(tl.where(mine, s * s, 0.0), 0) / size
            rstd = tl.where(mine, 1 / tl.sqrt(square + eps), rstd)
        s *= rstd * norm
    if HAS_GATE and GATE_LAST:
        s *= gate
    return s


@triton.jit
def _slots(ptr, step, c, m_c, NUMBER: tl.constexpr):
    """``NUMBER`` rows of channels c, ``step`` apart, as a tuple."""
    rows = ()
    for j in tl.static_range(NUMBER):
        rows = rows + (tl.load(ptr + j * step + c, mask=m_c, other=0.0),)  # noqa: RUF005  Triton has no unpacking
    return rows


@triton.jit
def _conv(value, bias, taps, past, state_ptr, c, m_c, C, W: tl.constexpr, ACC: tl.constexpr):
    """silu of the convolution's output (BLOCK,) for the new input ``value``; the state's slots move by one."""
    y = bias + value * taps[W - 1].to(ACC)
    for j in tl.static_range(W - 1):
        y += past[j].to(ACC) * taps[j].to(ACC)
    tl.debug_barrier()  # where channels are fewer than threads, several have loaded a slot and one stores it
    for j in tl.static_range(1, W - 1):
        tl.store(state_ptr + (j - 1) * C + c, past[j], mask=m_c)
    if W > 1:
        tl.store(state_ptr + (W - 2) * C + c, value, mask=m_c)
    return _silu(y)


@triton.jit
def _project_kernel(
    x_ptr, residual_ptr, gate_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr,
    conv_weight_ptr, conv_bias_ptr, conv_state_ptr, next_ptr, part_ptr,
    B, O, K, sx, sgate, first, C, P, parts,
    eps: tl.constexpr, GROUPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr, GATE_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, W: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of all rows; W = 0 is without a convolution, BLOCK_P = 0 without the projection that follows."""
    pid = tl.program_id(0)
    o = pid * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    m_o, m_k = o < O, k < K
    if PDL:
        gdc_launch_dependents()
    at = o.to(tl.int64)[:, None] * K + k[None, :]
    weight = tl.load(weight_ptr + at, mask=m_o[:, None] & m_k[None, :], other=0.0)
    norm = tl.full((BLOCK_K,), 1.0, ACC)
    bias = tl.zeros((BLOCK_O,), ACC)
    if HAS_NORM:
        norm = tl.load(norm_ptr + k, mask=m_k, other=0.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=m_o, other=0.0).to(ACC)
    c = o - first
    m_c = (c >= 0) & (c < C) & m_o
    conv_bias = tl.zeros((BLOCK_O,), ACC)
    if HAS_CONV_BIAS:
        conv_bias = tl.load(conv_bias_ptr + c, mask=m_c, other=0.0).to(ACC)
    taps = _slots(conv_weight_ptr, 1, c * W, m_c, W)
    if BLOCK_P > 0:
        p = tl.arange(0, BLOCK_P)
        after = tl.load(next_ptr + p[:, None] * C + c[None, :], mask=(p < P)[:, None] & m_c[None, :], other=0.0)
    if PDL:
        gdc_wait()
    for b in range(B):
        row = tl.cast(b, tl.int64)
        state_at = conv_state_ptr + row * (W - 1) * C
        past = _slots(state_at, C, c, m_c, W - 1)
        s = _input(
            x_ptr + row * sx, residual_ptr + row * K, gate_ptr + row * sgate, norm, total_ptr + row * K, pid == 0,
            k, m_k, K, eps, GROUPS, HAS_RESIDUAL, HAS_GATE, HAS_NORM, GATE_LAST, ACC,
        )  # fmt: skip
        y = tl.sum(weight.to(ACC) * s[None, :], 1) + bias
        if W > 0:
            y = y.to(y_ptr.dtype.element_ty).to(ACC)  # the convolution reads what a prompt's would
            y = tl.where(m_c, _conv(y, conv_bias, taps, past, state_at, c, m_c, C, W, ACC), y)
        tl.store(y_ptr + row * O + o, y, mask=m_o)
        if BLOCK_P > 0:
            y = tl.where(m_c, y.to(y_ptr.dtype.element_ty).to(ACC), 0.0)
            part = tl.sum(after.to(ACC) * y[None, :], 1)
            block = pid - first // BLOCK_O
            if (block >= 0) & (block < parts):
                tl.store(part_ptr + (row * parts + block) * P + p, part, mask=p < P)


@triton.jit
def _parts(row, first, parts, r, n, R: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK parts of a row's [dt, B, C]."""
    part = first + tl.arange(0, BLOCK)
    at, m_p = row + part[:, None] * (R + 2 * N), (part < parts)[:, None]
    low = tl.load(at + r[None, :], mask=m_p & (r < R)[None, :], other=0.0)
    B = tl.load(at + R + n[None, :], mask=m_p & (n < N)[None, :], other=0.0)
    C = tl.load(at + R + N + n[None, :], mask=m_p & (n < N)[None, :], other=0.0)
    return low, B, C


@triton.jit
def _scan_kernel(
    part_ptr, x_ptr, z_ptr, dt_weight_ptr, bias_ptr, A_ptr, D_ptr, state_ptr, y_ptr, E, parts, sx, sz,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = exp(dt A) h + dt x B, y = (<C, h> + D x) silu(z), for BLOCK channels of one row."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    m_e, m_n = e < E, n < N
    m_en = m_e[:, None] & m_n[None, :]
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(dt_weight_ptr + e[:, None] * R + r[None, :], mask=m_e[:, None] & (r < R)[None, :], other=0.0)
    bias = tl.load(bias_ptr + e, mask=m_e, other=0.0).to(ACC)
    A = -tl.exp(tl.load(A_ptr + e[:, None] * N + n[None, :], mask=m_en, other=0.0).to(ACC))
    D = tl.load(D_ptr + e, mask=m_e, other=0.0).to(ACC)
    if PDL:
        gdc_wait()
    b = tl.program_id(1).to(tl.int64)
    state_at = state_ptr + (b * E + e[:, None]) * N + n[None, :]
    h = tl.load(state_at, mask=m_en, other=0.0).to(ACC)
    x = tl.load(x_ptr + b * sx + e, mask=m_e, other=0.0).to(ACC)
    z = tl.load(z_ptr + b * sz + e, mask=m_e, other=0.0).to(ACC)
    wide = tl.zeros((BLOCK_PARTS, BLOCK_R), ACC)
    B_wide = tl.zeros((BLOCK_PARTS, BLOCK_N), ACC)
    C_wide = tl.zeros((BLOCK_PARTS, BLOCK_N), ACC)
    row = part_ptr + b * parts * (R + 2 * N)
    for i in range(0, parts, BLOCK_PARTS * UNROLL):
        some = ()
        for u in tl.static_range(UNROLL):  # all on their way before the first is waited for
            some = some + (_parts(row, i + u * BLOCK_PARTS, parts, r, n, R, N, BLOCK_PARTS),)  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            wide += some[u][0].to(ACC)
            B_wide += some[u][1].to(ACC)
            C_wide += some[u][2].to(ACC)
    low, B, C = tl.sum(wide, 0), tl.sum(B_wide, 0), tl.sum(C_wide, 0)
    dt = tl.sum(weight.to(ACC) * low[None, :], 1) + bias
    dt = softplus(dt)
    h = tl.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
    tl.debug_barrier()  # see _conv
    tl.store(state_at, h, mask=m_en)
    y = (tl.sum(h * C[None, :], 1) + D * x) * _silu(z)
    tl.store(y_ptr + b * E + e, y, mask=m_e)


@triton.jit
def _largest_kernel(x_ptr, y_ptr, V, sx, BLOCK: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr):
    """The first of the largest values of a row; NaN counts as infinity."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = x_ptr + tl.program_id(0).to(tl.int64) * sx
    best = tl.full((BLOCK,), float("-inf"), ACC)
    where = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(ACC)
        x = tl.where(x == x, x, float("inf"))
        where = tl.where(x > best, v, where)
        best = tl.maximum(best, x)
    first = tl.min(tl.where(best == tl.max(best, 0), where, V), 0)
    tl.store(y_ptr + tl.program_id(0), first.to(tl.int64))


def _accumulator(t: Tensor) -> Any:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def block_rows(inputs: int, outputs: int) -> tuple[int, int]:
    """Rows of weights a program holds, and its warps."""
    width = int(triton.next_power_of_2(inputs))
    warps = 4 if width <= TILE else 8
    return min(max(1, TILE // width), int(triton.next_power_of_2(outputs))), warps


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    groups: int,
    norm_before_gate: bool,
    eps: float,
    conv: tuple[Tensor, Tensor | None, Tensor, int] | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Outputs (B, O), x + residual if there is one, and the parts of the projection that follows, if there is one."""
    (batch, inputs), outputs = x.shape, weight.shape[0]
    rows, warps = block_rows(inputs, outputs)
    y = torch.empty(batch, outputs, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(residual)
    conv_weight, conv_bias, conv_state, first = (x, None, x, 0) if conv is None else conv
    channels = 0 if conv is None else conv_weight.shape[0]
    width = 0 if conv is None else conv_weight.shape[1]
    part, parts, P = None, 0, 0
    if following is not None:
        parts, P = -(-(first + channels) // rows) - first // rows, following.shape[0]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        part = torch.empty(batch, parts, P, dtype=acc, device=x.device)
    _project_kernel[(-(-outputs // rows),)](
        x, *(x if t is None else t for t in (residual, gate, norm_weight)), weight, x if bias is None else bias, y,
        y if total is None else total, conv_weight, x if conv_bias is None else conv_bias, conv_state,
        x if following is None else following, y if part is None else part,
        batch, outputs, inputs, x.stride(0), 0 if gate is None else gate.stride(0), first, channels, P, parts,
        eps=eps, GROUPS=groups, HAS_RESIDUAL=residual is not None, HAS_GATE=gate is not None,
        HAS_NORM=norm_weight is not None, GATE_LAST=norm_before_gate, HAS_BIAS=bias is not None,
        W=width, HAS_CONV_BIAS=conv_bias is not None,
        BLOCK_P=triton.next_power_of_2(P) if P else 0, BLOCK_O=rows, BLOCK_K=triton.next_power_of_2(inputs),
        ACC=_accumulator(x), num_warps=warps, **dependent_launch(x),
    )  # fmt: skip
    return y, total, part


def scan_step(
    low: Tensor, x: Tensor, z: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """One step of the selective scan (B, E) in x's dtype; the state (B, E, N) is updated."""
    (batch, channels), (rank, n) = x.shape, (dt_weight.shape[1], A_log.shape[1])
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    parts = low.shape[1]
    block, each = 16 if batch < 8 else 32, min(32, triton.next_power_of_2(parts))
    _scan_kernel[(-(-channels // block), batch)](
        low, x, z, dt_weight, dt_bias, A_log, D, state, y, channels, parts, x.stride(0), z.stride(0),
        R=rank, N=n, BLOCK_R=triton.next_power_of_2(rank), BLOCK_N=triton.next_power_of_2(n),
        BLOCK_PARTS=each, UNROLL=min(6, -(-parts // each)), BLOCK=block, ACC=_accumulator(x),
        num_warps=8 if parts > 64 else 4, **dependent_launch(x),  # with two, registers leave room for few programs
    )  # fmt: skip
    return y


def largest(x: Tensor) -> Tensor:
    """Index (B,) of the largest value of each row of (B, V)."""
    y = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    block = min(16384, triton.next_power_of_2(x.shape[1]))
    _largest_kernel[(x.shape[0],)](
        x, y, x.shape[1], x.stride(0), BLOCK=block, ACC=_accumulator(x), num_warps=max(1, min(16, block // 256)),
        **dependent_launch(x),
    )  # fmt: skip
    return y
