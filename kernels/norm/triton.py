"""The norms on GPUs: one Triton kernel forward, one backward, deterministic (partial sums, no atomics).

    u = s, or s gate with the gate first;   n = (u - mean) rstd;   o = n weight + bias;   y = o, or o gate
    do = dy, or dy gate;   dn = do weight;   du = rstd (dn - mean(dn) - n mean(dn n)), without mean(dn) for RMSNorm
    dweight = sum do n,   dbias = sum do,   ds = du, or du gate;   dgate = dy o, or du s;   gate = silu(z)

A program holds a tile of rows by one whole group of channels. Addresses are int64.

D channels, M rows, G groups of D / G channels.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.norm.problem import Problem

STRIPS = 512  # programs that share the rows of a backward: enough for the largest GPUs, few partial sums


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, z_ptr, weight_ptr, bias_ptr, s_ptr, y_ptr, mean_ptr, rstd_ptr, M, D, G, size, sx, sr, sz,
    eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LAYER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_Z: tl.constexpr, GATE_LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y, the sum s and the statistics; eps is constexpr because numbers reach a kernel as float32."""
    pid = tl.program_id(0).to(tl.int64)
    group = pid % G
    m = (pid // G) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    d = group * size + c
    m_d = c < size
    mask = (m < M)[:, None] & m_d[None, :]
    s = tl.load(x_ptr + m[:, None] * sx + d[None, :], mask=mask, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + m[:, None] * sr + d[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(s_ptr + m[:, None] * D + d[None, :], s, mask=mask)
    if HAS_Z:
        z = tl.load(z_ptr + m[:, None] * sz + d[None, :], mask=mask, other=0.0).to(ACC)
        gate = z / (1 + tl.exp(-z))
        if not GATE_LAST:
            s *= gate
    if LAYER:
        mean = tl.sum(s, 1) / size
        s = tl.where(mask, s - mean[:, None], 0.0)
    else:
        mean = tl.zeros((ROWS,), dtype=ACC)
    rstd = 1 / tl.sqrt(tl.sum(s * s, 1) / size + eps)
    tl.store(mean_ptr + m * G + group, mean, mask=m < M)
    tl.store(rstd_ptr + m * G + group, rstd, mask=m < M)
    y = s * rstd[:, None] * tl.load(weight_ptr + d, mask=m_d, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=m_d, other=0.0).to(ACC)[None, :]
    if HAS_Z and GATE_LAST:
        y *= gate
    tl.store(y_ptr + m[:, None] * D + d[None, :], y, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, add_ptr, x_ptr, residual_ptr, z_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    ds_ptr, dz_ptr, dweight_ptr, dbias_ptr, M, D, G, size, sx, sr, sz, tiles, strips,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr, GATE_LAST: tl.constexpr, HAS_ADD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (strip, group) takes every ``strips``-th tile of rows and sums its part of dweight and dbias."""
    pid = tl.program_id(0).to(tl.int64)
    group, strip = pid % G, pid // G
    c = tl.arange(0, BLOCK)
    d = group * size + c
    m_d = c < size
    weight = tl.load(weight_ptr + d, mask=m_d, other=0.0).to(ACC)[None, :]
    bias = tl.zeros((1, BLOCK), dtype=ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=m_d, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros((BLOCK,), dtype=ACC)
    dbias = tl.zeros((BLOCK,), dtype=ACC)
    for i in range(tl.cdiv(tiles, strips)):
        m = (strip + i * strips) * ROWS + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & m_d[None, :]
        s = tl.load(x_ptr + m[:, None] * sx + d[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_RESIDUAL:
            s += tl.load(residual_ptr + m[:, None] * sr + d[None, :], mask=mask, other=0.0).to(ACC)
        do = tl.load(dy_ptr + m[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + m * G + group, mask=m < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + m * G + group, mask=m < M, other=0.0)[:, None]
        u = s
        if HAS_Z:
            z = tl.load(z_ptr + m[:, None] * sz + d[None, :], mask=mask, other=0.0).to(ACC)
            sigmoid = 1 / (1 + tl.exp(-z))
            gate = z * sigmoid
            slope = sigmoid * (1 + z * (1 - sigmoid))
            if not GATE_LAST:
                u = s * gate
        n = tl.where(mask, (u - mean) * rstd, 0.0)
        if HAS_Z and GATE_LAST:
            tl.store(dz_ptr + m[:, None] * D + d[None, :], do * (n * weight + bias) * slope, mask=mask)
            do *= gate
        dweight += tl.sum(do * n, 0)
        dbias += tl.sum(do, 0)
        dn = do * weight
        du = dn - n * (tl.sum(dn * n, 1) / size)[:, None]
        if LAYER:
            du -= (tl.sum(dn, 1) / size)[:, None]
        du *= rstd
        if HAS_Z and not GATE_LAST:
            tl.store(dz_ptr + m[:, None] * D + d[None, :], du * s * slope, mask=mask)
            du *= gate
        if HAS_ADD:
            du += tl.load(add_ptr + m[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(ds_ptr + m[:, None] * D + d[None, :], du, mask=mask)
    tl.store(dweight_ptr + strip * D + d, dweight, mask=m_d)
    tl.store(dbias_ptr + strip * D + d, dbias, mask=m_d)


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in x's dtype, x + residual (empty without a residual), mean and rstd ``(..., G)``."""
    y = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    size = 0 if p.residual is None else p.x.shape
    s = torch.empty(size, dtype=p.residual_dtype, device=p.x.device)
    mean = torch.empty(p.stats_shape, dtype=p.dtype, device=p.x.device)
    rstd = torch.empty_like(mean)
    if p.x.numel():
        tensors, steps, sizes, flags = _arguments(p)
        tiles = triton.cdiv(sizes[0], flags["ROWS"])
        with _on(p.x):
            _forward_kernel[(tiles * p.groups,)](*tensors, s, y, mean, rstd, *sizes, *steps, eps=p.eps, **flags)
    return y, s, mean, rstd


def backward(
    p: Problem, dy: Tensor, ds: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of s (the sum x + residual), weight, bias and z; ``ds`` is what arrives at s from elsewhere."""
    tensors, steps, sizes, flags = _arguments(p)
    tiles = -(-sizes[0] // flags["ROWS"])
    strips = min(tiles, STRIPS)
    dtype = p.x.dtype if p.residual is None else torch.promote_types(p.x.dtype, p.residual.dtype)
    out = torch.empty(p.x.shape, dtype=dtype, device=p.x.device)
    dz = None if p.z is None else torch.empty(p.x.shape, dtype=p.z.dtype, device=p.x.device)
    dweight = torch.zeros(strips, p.channels, dtype=p.dtype, device=p.x.device)
    dbias = torch.zeros_like(dweight)
    if p.x.numel():
        dy = dy.contiguous()
        with _on(p.x):
            _backward_kernel[(strips * p.groups,)](
                dy, dy if ds is None else ds.contiguous(), tensors[0], *tensors[1:], mean, rstd,
                out, out if dz is None else dz, dweight, dbias, *sizes, *steps, tiles, strips,
                HAS_ADD=ds is not None, **flags,
            )  # fmt: skip
    return out, dweight.sum(0), dbias.sum(0), dz


def _arguments(p: Problem) -> tuple[list[Tensor], list[int], list[int], dict[str, Any]]:
    """Inputs as rows, their row strides, the sizes M, D, G, D / G, and compile-time flags."""
    x = _as_rows(p.x)
    rows = [x, *(None if t is None else _as_rows(t) for t in (p.residual, p.z))]
    tensors = [x if t is None else t for t in (*rows, p.weight.contiguous(), p.bias)]
    size = p.channels // p.groups
    block = triton.next_power_of_2(size)
    tile = max(1, min(16, 2048 // block))
    flags: dict[str, Any] = {
        "ROWS": tile,
        "BLOCK": block,
        "LAYER": p.layer,
        "HAS_BIAS": p.bias is not None,
        "HAS_RESIDUAL": p.residual is not None,
        "HAS_Z": p.z is not None,
        "GATE_LAST": p.norm_before_gate,
        "ACC": tl.float64 if p.dtype == torch.float64 else tl.float32,
        "num_warps": max(1, min(16, tile * block // 512)),
    }
    steps = [0 if t is None else t.stride(0) for t in rows]
    sizes = [x.shape[0], p.channels, p.groups, size]
    return [t.contiguous() if t.ndim == 1 else t for t in tensors], steps, sizes, flags


def _as_rows(t: Tensor) -> Tensor:
    """``(M, D)``, a view where channels are contiguous and the rows evenly spaced."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _on(x: Tensor) -> torch.device | torch.cuda.device:
    """Makes the device of ``x`` the current one while kernels are launched."""
    return torch.get_device_module(x.device).device(x.device) if x.device.type != "cpu" else torch.device("cpu")
