"""The norms on GPUs: a Triton kernel forward, two backward, deterministic (partial sums, no atomics).

    u = s, or s gate with the gate first;   n = (u - mean) rstd;   o = n weight + bias;   y = o, or o gate
    do = dy, or dy gate;   dn = do weight;   du = rstd (dn - mean(dn) - n mean(dn n)), without mean(dn) for RMSNorm
    dweight = sum do n,   dbias = sum do,   ds = du, or du gate;   dgate = dy o, or du s;   gate = silu(z)

A program holds the weights of one whole group of channels and takes one tile of rows after the other; the rows of the
next tile are on their way while this one is computed. Addresses are int64.

D channels, M rows, G groups of D / G channels.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.norm.problem import Problem
from kernels.norm.triton_shape import Shape, shape_of
from kernels.plans import launch, on_device

COLUMNS = 8  # of a program that sums the parts: few, so that all of the GPU takes part


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)); float32 by two special functions, without the checks that a division needs."""
    if z.dtype == tl.float64:
        value = 1 / (1 + tl.exp(-z))
    else:
        root = tl.rsqrt(1 + tl.exp2(z * -1.4426950408889634))
        value = root * root
    return value


@triton.jit
def _load(ptr, tile, step, M, d, m_d, ROWS: tl.constexpr):
    """A tile (ROWS, BLOCK) of rows ``step`` apart, zeros beyond the last row."""
    m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return tl.load(ptr + m * step + d, mask=(m < M) & m_d, other=0.0)


@triton.jit
def _store(ptr, value, tile, M, D, d, m_d, ROWS: tl.constexpr):
    m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(ptr + m * D + d, value, mask=(m < M) & m_d)


@triton.jit
def _inputs(
    x_ptr, residual_ptr, z_ptr, sx, sr, sz, tile, M, d, m_d,
    ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """x, the residual and z of a tile as they lie in memory; x stands for absent ones."""
    x = _load(x_ptr, tile, sx, M, d, m_d, ROWS)
    residual, z = x, x
    if HAS_RESIDUAL:
        residual = _load(residual_ptr, tile, sr, M, d, m_d, ROWS)
    if HAS_Z:
        z = _load(z_ptr, tile, sz, M, d, m_d, ROWS)
    return x, residual, z


@triton.jit
def _group(D, G, size, BLOCK: tl.constexpr):
    """This program's strip, group, channels (1, BLOCK) and their mask."""
    pid = tl.program_id(0)
    group = pid % G
    c = tl.arange(0, BLOCK)[None, :]
    return pid // G, group, group * size + c, c < size


@triton.jit(do_not_specialize=["strips", "steps"])
def _forward_kernel(
    x_ptr, residual_ptr, z_ptr, weight_ptr, bias_ptr, s_ptr, y_ptr, mean_ptr, rstd_ptr,
    M, D, G, size, sx, sr, sz, strips, steps, eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_Z: tl.constexpr,
    GATE_LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y, the sum s and the statistics; eps is constexpr because numbers reach a kernel as float32."""
    tile, group, d, m_d = _group(D, G, size, BLOCK)
    ahead = _inputs(x_ptr, residual_ptr, z_ptr, sx, sr, sz, tile, M, d, m_d, ROWS, HAS_RESIDUAL, HAS_Z)
    weight = tl.load(weight_ptr + d, mask=m_d, other=0.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(ACC)
    for _ in range(steps):
        x, residual, z = ahead
        ahead = _inputs(x_ptr, residual_ptr, z_ptr, sx, sr, sz, tile + strips, M, d, m_d, ROWS, HAS_RESIDUAL, HAS_Z)
        s = x.to(ACC)
        if HAS_RESIDUAL:
            s += residual.to(ACC)
            _store(s_ptr, s, tile, M, D, d, m_d, ROWS)
        if HAS_Z:
            gate = z.to(ACC)
            gate *= _sigmoid(gate)
            if not GATE_LAST:
                s *= gate
        m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mean = tl.zeros((ROWS,), dtype=ACC)
        if LAYER:
            mean = tl.sum(s, 1) / size
            s = tl.where(m_d, s - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(s * s, 1) / size + eps)
        tl.store(mean_ptr + m * G + group, mean, mask=m < M)
        tl.store(rstd_ptr + m * G + group, rstd, mask=m < M)
        y = s * rstd[:, None] * weight
        if HAS_BIAS:
            y += bias
        if HAS_Z and GATE_LAST:
            y *= gate
        _store(y_ptr, y, tile, M, D, d, m_d, ROWS)
        tile += strips


@triton.jit(do_not_specialize=["strips", "steps"])
def _backward_kernel(
    dy_ptr, add_ptr, x_ptr, residual_ptr, z_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dz_ptr, part_ptr, M, D, G, size, sx, sr, sz, strips, steps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr, GATE_LAST: tl.constexpr, ACC: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Program (strip, group) takes every ``strips``-th tile of rows and sums its part of dweight and dbias."""
    strip, group, d, m_d = _group(D, G, size, BLOCK)
    tile = strip
    ahead = _inputs(x_ptr, residual_ptr, z_ptr, sx, sr, sz, tile, M, d, m_d, ROWS, HAS_RESIDUAL, HAS_Z)
    ahead_dy = _load(dy_ptr, tile, D, M, d, m_d, ROWS)
    weight = tl.load(weight_ptr + d, mask=m_d, other=0.0).to(ACC)
    bias = tl.zeros((1, BLOCK), dtype=ACC)
    if HAS_BIAS and HAS_Z:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(ACC)
    dweight = tl.zeros((SPREAD, BLOCK), dtype=ACC)
    dbias = tl.zeros((SPREAD, BLOCK), dtype=ACC)
    for _ in range(steps):
        x, residual, z = ahead
        dy = ahead_dy
        ahead = _inputs(x_ptr, residual_ptr, z_ptr, sx, sr, sz, tile + strips, M, d, m_d, ROWS, HAS_RESIDUAL, HAS_Z)
        ahead_dy = _load(dy_ptr, tile + strips, D, M, d, m_d, ROWS)
        m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        rstd = tl.load(rstd_ptr + m * G + group, mask=m < M, other=0.0)[:, None]
        s = x.to(ACC)
        if HAS_RESIDUAL:
            s += residual.to(ACC)
        do = dy.to(ACC)
        u = s
        if HAS_Z:
            z = z.to(ACC)
            sigmoid = _sigmoid(z)
            gate = z * sigmoid
            slope = sigmoid * (1 + z * (1 - sigmoid))
            if not GATE_LAST:
                u = s * gate
        if LAYER:
            mean = tl.load(mean_ptr + m * G + group, mask=m < M, other=0.0)[:, None]
            u = tl.where(m_d, u - mean, 0.0)
        n = u * rstd
        if HAS_Z and GATE_LAST:
            _store(dz_ptr, do * (n * weight + bias) * slope, tile, M, D, d, m_d, ROWS)
            do *= gate
        dweight += tl.sum(tl.reshape(do * n, (ROWS // SPREAD, SPREAD, BLOCK)), 0)
        if HAS_BIAS:
            dbias += tl.sum(tl.reshape(do, (ROWS // SPREAD, SPREAD, BLOCK)), 0)
        dn = do * weight
        du = dn - n * (tl.sum(dn * n, 1) / size)[:, None]
        if LAYER:
            du -= (tl.sum(dn, 1) / size)[:, None]
        du *= rstd
        if HAS_Z and not GATE_LAST:
            _store(dz_ptr, du * s * slope, tile, M, D, d, m_d, ROWS)
            du *= gate
        if HAS_ADD:
            du += _load(add_ptr, tile, D, M, d, m_d, ROWS).to(ACC)
        _store(dx_ptr, du, tile, M, D, d, m_d, ROWS)
        if HAS_DRESIDUAL:
            _store(dresidual_ptr, du, tile, M, D, d, m_d, ROWS)
        tile += strips
    part_ptr += strip.to(tl.int64) * (1 + HAS_BIAS) * D + d
    tl.store(part_ptr, tl.sum(dweight, 0)[None, :], mask=m_d)
    if HAS_BIAS:
        tl.store(part_ptr + D, tl.sum(dbias, 0)[None, :], mask=m_d)


@triton.jit(do_not_specialize=["parts"])
def _parameter_kernel(
    part_ptr, dweight_ptr, dbias_ptr, parts, D, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums the parts (parts, D), or (parts, 2, D) with a bias, into dweight and dbias."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width = D * (1 + HAS_BIAS)
    acc = tl.zeros((ROWS, COLUMNS), dtype=part_ptr.dtype.element_ty)
    for i in range(tl.cdiv(parts, ROWS)):
        row = i * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * width + c[None, :]
        acc += tl.load(part_ptr + at, mask=(row < parts)[:, None] & (c < width)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    tl.store(dweight_ptr + c, total, mask=c < D)
    if HAS_BIAS:
        tl.store(dbias_ptr + c - D, total, mask=(c >= D) & (c < width))


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in x's dtype, x + residual (empty without a residual), mean and rstd ``(..., G)``."""
    x, device = p.x, p.x.device
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    s = torch.empty(0 if p.residual is None else x.shape, dtype=p.residual_dtype, device=device)
    stats = p.stats_shape
    mean = torch.empty(stats, dtype=p.dtype, device=device)
    rstd = torch.empty(stats, dtype=p.dtype, device=device)
    if x.numel():
        cut = _cut(p, backward=False, plain=p.residual is None and p.z is None)
        with on_device(x):
            arguments = (*_inputs_of(p), s, y, mean, rstd, *cut.sizes)
            launch(p.plan, _forward_kernel, cut.blocks, arguments, {"eps": p.eps, **cut.constants})
    return y, s, mean, rstd


def backward(
    p: Problem, dy: Tensor, ds: Tensor | None, mean: Tensor, rstd: Tensor, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (in dy's dtype), weight, bias, the residual (in ``residual_dtype`` if there is one) and z.

    Args:
        p: The problem; its x may be the sum of x and a residual.
        dy: Gradient of y.
        ds: What arrives at the sum from elsewhere.
        mean: Of the forward.
        rstd: Of the forward.
        residual_dtype: Of the residual, None without one.
    """
    new: dict[str, Any] = {"device": p.x.device}
    dx = torch.empty(p.x.shape, dtype=dy.dtype, **new)
    dresidual = None if residual_dtype is None else torch.empty(p.x.shape, dtype=residual_dtype, **new)
    dz = None if p.z is None else torch.empty(p.x.shape, dtype=p.z.dtype, **new)
    make = torch.empty if p.x.numel() else torch.zeros
    dweight = make(p.channels, dtype=p.weight.dtype, **new)
    dbias = None if p.bias is None else make(p.channels, dtype=p.bias.dtype, **new)
    if p.x.numel():
        cut = _cut(p, backward=True, plain=residual_dtype is None and p.z is None)
        strips, spread = cut.shape.strips, cut.shape.spread
        rows = 1 if dbias is None else 2
        part = torch.empty(strips, rows, p.channels, dtype=p.dtype, **new)
        dy = dy.contiguous()
        given = (dy, dy if ds is None else ds.contiguous(), *_inputs_of(p), mean, rstd)
        outputs = (dx, dx if dresidual is None else dresidual, dx if dz is None else dz)
        flags = {"HAS_ADD": ds is not None, "HAS_DRESIDUAL": dresidual is not None, "SPREAD": spread}
        with on_device(p.x):
            arguments = (*given, *outputs, part, *cut.sizes)
            launch(p.plan, _backward_kernel, cut.blocks, arguments, {**cut.constants, **flags})
            sums = (part, dweight, dweight if dbias is None else dbias, strips, p.channels)
            constants = {"HAS_BIAS": dbias is not None, "ROWS": cut.parts, "COLUMNS": COLUMNS, "num_warps": 8}
            launch(p.plan, _parameter_kernel, -(-rows * p.channels // COLUMNS), sums, constants)
    return dx, dweight, dbias, dresidual, dz


class Cut(NamedTuple):
    """How a problem is cut, in the kernels' arguments.

    Attributes:
        shape: The shape.
        blocks: Programs.
        sizes: M, D, G, D / G, the steps from row to row of x, residual and z, then strips and their steps.
        constants: What the kernels are compiled for.
        parts: ROWS of the kernel that sums the parts.
    """

    shape: Shape
    blocks: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    parts: int


def _cut(p: Problem, backward: bool, plain: bool) -> Cut:
    """The cut of a problem, made once for each plan; a plan is of a forward or of a backward."""
    found = p.plan.get("cut")
    if found is None:
        shape = shape_of(p, backward, plain)
        x, *others = _rows_of(p)
        sizes = [x.shape[0], p.channels, p.groups, p.channels // p.groups, *(t.stride(0) for t in (x, *others))]
        constants = {
            "ROWS": shape.rows, "BLOCK": shape.block, "LAYER": p.layer, "HAS_BIAS": p.bias is not None,
            "HAS_RESIDUAL": p.residual is not None, "HAS_Z": p.z is not None, "GATE_LAST": p.norm_before_gate,
            "ACC": tl.float64 if p.dtype == torch.float64 else tl.float32, "num_warps": shape.warps,
        }  # fmt: skip
        parts = min(512, triton.next_power_of_2(shape.strips))
        found = Cut(shape, shape.strips * p.groups, (*sizes, shape.strips, shape.steps), constants, parts)
        p.plan["cut"] = found
    return found


def _inputs_of(p: Problem) -> tuple[Tensor, ...]:
    """x, residual, z, weight and bias as the kernels read them; x stands for absent ones."""
    x, residual, z = _rows_of(p)
    return x, residual, z, p.weight.contiguous(), x if p.bias is None else p.bias.contiguous()


def _rows_of(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    x = _as_rows(p.x)
    return x, x if p.residual is None else _as_rows(p.residual), x if p.z is None else _as_rows(p.z)


def _as_rows(t: Tensor) -> Tensor:
    """``(M, D)``, a view where channels are contiguous and the rows evenly spaced."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()
