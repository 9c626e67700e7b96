"""The scan's step on GPUs for many rows: the projections in front of it are products on tensor cores.

Weights and states are asked for in L2 before the kernel in front is waited for. Parts of sums go in a fixed order;
addresses are int64.

Legend: as in ``kernels.decode``; a tile is BM rows of BO outputs, over BK inputs at a time.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import dependent_launch
from kernels.early import prefetch
from kernels.selective_scan.triton_steps import softplus

INPUTS, OUTPUTS = 64, 16  # of a tile of ``_parts_kernel``
ROWS, CHANNELS = 16, 64  # of a tile of ``_scan_rows_kernel``


@triton.jit
def _parts_kernel(
    x_ptr, weight_ptr, y_ptr, B, O, K, sx, each,
    BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows, part of the inputs): its share of y (B, parts, O)."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    b = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, K)
    m_b = (b < B)[:, None]
    weights = weight_ptr + tl.minimum(o, O - 1).to(tl.int64) * K
    if PDL:
        gdc_launch_dependents()
        for line in range(begin, end, LINE):
            prefetch(weights + line)
        gdc_wait()
    acc = tl.zeros((BM, BO), tl.float32)
    for start in range(begin, end, BK):
        k = start + tl.arange(0, BK)
        m_k = k < end
        s = tl.load(x_ptr + b[:, None] * sx + k[None, :], mask=m_b & m_k[None, :], other=0.0)
        w = tl.load(weights[None, :] + k[:, None], mask=m_k[:, None], other=0.0)
        acc = tl.dot(s.to(DOT), w.to(DOT), acc, input_precision="ieee")
    parts = tl.num_programs(2)
    tl.store(y_ptr + (b[:, None] * parts + tl.program_id(2)) * O + o[None, :], acc, mask=m_b & (o < O)[None, :])


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
    y = (tl.sum(h * queries[:, None, :], 2) + D[None, :] * x) * z / (1 + tl.exp(-z))
    tl.store(y_ptr + b[:, None] * E + e[None, :], y, mask=m_be)


def project_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 parts (B, parts, O) of the products, so many that they fill half of a GPU."""
    (batch, inputs), outputs = x.shape, weight.shape[0]
    rows = max(16, min(64, triton.next_power_of_2(batch)))
    programs = triton.cdiv(batch, rows) * triton.cdiv(outputs, OUTPUTS)
    parts = max(1, min(8, 64 // programs, triton.cdiv(inputs, 2 * INPUTS)))
    each = triton.cdiv(triton.cdiv(inputs, parts), INPUTS) * INPUTS
    y = torch.empty((batch, triton.cdiv(inputs, each), outputs), dtype=torch.float32, device=x.device)
    # Triton's interpreter has no 16-bit products.
    dtype = getattr(tl, str(x.dtype).removeprefix("torch.")) if x.is_cuda else tl.float32
    _parts_kernel[(triton.cdiv(outputs, OUTPUTS), triton.cdiv(batch, rows), y.shape[1])](
        x, weight, y, batch, outputs, inputs, x.stride(0), each, BM=rows, BO=OUTPUTS, BK=INPUTS, DOT=dtype,
        LINE=128 // weight.element_size(), num_warps=4, num_stages=4, **dependent_launch(x),
    )  # fmt: skip
    return y


def scan_rows(
    low: Tensor, x: Tensor, z: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """``scan_step`` with tiles of many rows: their time steps are a matrix product."""
    (batch, inner), (rank, n) = x.shape, (dt_weight.shape[1], A_log.shape[1])
    y = torch.empty(batch, inner, dtype=x.dtype, device=x.device)
    channels = CHANNELS if n <= 16 else 16
    _scan_rows_kernel[(triton.cdiv(inner, channels), triton.cdiv(batch, ROWS))](
        low, x, z, dt_weight, dt_bias, A_log, D, state, y, batch, inner, low.shape[1], x.stride(0), z.stride(0),
        R=rank, N=n, BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_N=triton.next_power_of_2(n), BM=ROWS,
        BE=channels, PRECISION="tf32x3" if x.is_cuda else "ieee", num_warps=8, **dependent_launch(x),
    )  # fmt: skip
    return y
