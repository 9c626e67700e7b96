"""The causal convolution on GPUs: one Triton kernel forward, two backward, deterministic (partial sums, no atomics).

    s_q = bias + sum_w weight_w in_{q - W + 1 + w}      in_j: the input at place j, older state before the start
    y at token(q) = silu(s_q)

    g_q  = dy at token(q) * silu'(s_q),   silu'(s) = sigmoid(s) (1 + s (1 - sigmoid(s)))
    dx at token(q) = sum_w weight_w g_{q + W - 1 - w}   over the places of the same sequence
    dweight_w = sum_q g_q in_{q - W + 1 + w},   dbias = sum_q g_q

A program holds a tile of places (or tokens) by channels. Addresses are int64.

B batch, L tokens, D channels, K routes, P places, W conv width, S sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.causal_conv1d.order import Order, inverse
from kernels.causal_conv1d.problem import Problem
from kernels.plans import on_device


@triton.jit
def _tile(P, D, K, BP: tl.constexpr, BD: tl.constexpr):
    """This program's batch, route, places, channels (with masks) and block of places."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(D, BD)
    blocks_p = tl.cdiv(P, BP)
    d = (pid % blocks_d) * BD + tl.arange(0, BD)
    pid = pid // blocks_d
    block = pid % blocks_p
    q = block * BP + tl.arange(0, BP)
    pid = pid // blocks_p
    return pid // K, pid % K, q, q < P, d, d < D, block


@triton.jit
def _starts(start_ptr, row_ptr, b, q, m_q, HAS_START: tl.constexpr):
    """First place of each place's sequence and the row of the state that enters it; the tables begin at (b, k)."""
    if HAS_START:
        start = tl.load(start_ptr + q, mask=m_q, other=0).to(tl.int64)
        row = tl.load(row_ptr + q, mask=m_q, other=-1).to(tl.int64)
    else:
        start = q * 0
        row = q * 0 + b
    return start, row


@triton.jit
def _input(
    x_ptr, state_ptr, token_ptr, place, start, row, m_q, d, m_d, sx_l, k, K, D, W: tl.constexpr,
    HAS_TOKEN: tl.constexpr, HAS_STATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The inputs (BP, BD) at ``place``: x from the start of the sequence on, the state before; x begins at (b, k)."""
    m_x = m_q & (place >= start)
    token = place
    if HAS_TOKEN:
        token = tl.load(token_ptr + place, mask=m_x, other=-1).to(tl.int64)
        m_x = m_x & (token >= 0)
    value = tl.load(x_ptr + token[:, None] * sx_l + d[None, :], mask=m_x[:, None] & m_d[None, :], other=0.0).to(ACC)
    if HAS_STATE:
        m_s = m_q & (place < start) & (row >= 0)
        slot = (row * K + k) * (W - 1) + place - start + W - 1
        mask = m_s[:, None] & m_d[None, :]
        value += tl.load(state_ptr + slot[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
    return value


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, token_ptr, start_ptr, row_ptr, y_ptr,
    P, L, D, K, sx_b, sx_l, sx_k, st_b, st_k, ss_b, ss_k,
    W: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_TOKEN: tl.constexpr, HAS_START: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, k, q, m_q, d, m_d, _ = _tile(P, D, K, BP, BD)
    x_ptr += b * sx_b + k * sx_k
    token_ptr += b * st_b + k * st_k
    start, row = _starts(start_ptr + b * ss_b + k * ss_k, row_ptr + b * ss_b + k * ss_k, b, q, m_q, HAS_START)
    acc = tl.zeros((BP, BD), dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k * D + d, mask=m_d, other=0.0).to(ACC)[None, :]
    for w in range(W):
        weight = tl.load(weight_ptr + (k * D + d) * W + w, mask=m_d, other=0.0).to(ACC)
        acc += weight[None, :] * _input(
            x_ptr, state_ptr, token_ptr, q - (W - 1 - w), start, row, m_q, d, m_d, sx_l, k, K, D, W,
            HAS_TOKEN, HAS_STATE, ACC,
        )  # fmt: skip
    if SILU:
        acc = acc / (1 + tl.exp(-acc))
    token = q
    if HAS_TOKEN:
        token = tl.load(token_ptr + q, mask=m_q, other=-1).to(tl.int64)
        m_q = m_q & (token >= 0)
    at = ((b * L + token) * K + k) * D
    tl.store(y_ptr + at[:, None] + d[None, :], acc, mask=m_q[:, None] & m_d[None, :])


@triton.jit
def _slope_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, token_ptr, start_ptr, row_ptr, g_ptr, dweight_ptr, dbias_ptr,
    P, L, D, K, sx_b, sx_l, sx_k, st_b, st_k, ss_b, ss_k,
    W: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_TOKEN: tl.constexpr, HAS_START: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g at the places, and this tile's part of dweight and dbias."""
    b, k, q, m_q, d, m_d, block = _tile(P, D, K, BP, BD)
    x_ptr += b * sx_b + k * sx_k
    token_ptr += b * st_b + k * st_k
    start, row = _starts(start_ptr + b * ss_b + k * ss_k, row_ptr + b * ss_b + k * ss_k, b, q, m_q, HAS_START)
    token = q
    m_y = m_q
    if HAS_TOKEN:
        token = tl.load(token_ptr + q, mask=m_q, other=-1).to(tl.int64)
        m_y = m_q & (token >= 0)
    at = ((b * L + token) * K + k) * D
    g = tl.load(dy_ptr + at[:, None] + d[None, :], mask=m_y[:, None] & m_d[None, :], other=0.0).to(ACC)
    if SILU:
        s = tl.zeros((BP, BD), dtype=ACC)
        if HAS_BIAS:
            s += tl.load(bias_ptr + k * D + d, mask=m_d, other=0.0).to(ACC)[None, :]
        for w in range(W):
            weight = tl.load(weight_ptr + (k * D + d) * W + w, mask=m_d, other=0.0).to(ACC)
            s += weight[None, :] * _input(
                x_ptr, state_ptr, token_ptr, q - (W - 1 - w), start, row, m_q, d, m_d, sx_l, k, K, D, W,
                HAS_TOKEN, HAS_STATE, ACC,
            )  # fmt: skip
        sigmoid = 1 / (1 + tl.exp(-s))
        g *= sigmoid * (1 + s * (1 - sigmoid))
    at = ((b * K + k) * P + q) * D
    tl.store(g_ptr + at[:, None] + d[None, :], g, mask=m_q[:, None] & m_d[None, :])
    part = (b * tl.cdiv(P, BP) + block) * K + k
    for w in range(W):
        value = _input(
            x_ptr, state_ptr, token_ptr, q - (W - 1 - w), start, row, m_q, d, m_d, sx_l, k, K, D, W,
            HAS_TOKEN, HAS_STATE, ACC,
        )  # fmt: skip
        tl.store(dweight_ptr + (part * D + d) * W + w, tl.sum(g * value, 0), mask=m_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + part * D + d, tl.sum(g, 0), mask=m_d)


@triton.jit
def _input_gradient_kernel(
    g_ptr, weight_ptr, place_ptr, start_ptr, dx_ptr, P, L, D, columns, st_b, st_k, ss_b, ss_k,
    K: tl.constexpr, SUMMED: tl.constexpr, W: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    HAS_TOKEN: tl.constexpr, HAS_START: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx at a tile of tokens: of one route where x has a column for each, else the sum over SUMMED = K routes."""
    b, column, t, m_t, d, m_d, _ = _tile(L, D, columns, BL, BD)
    acc = tl.zeros((BL, BD), dtype=ACC)
    for i in range(SUMMED):
        k = column + i
        q = t
        m_q = m_t
        if HAS_TOKEN:
            q = tl.load(place_ptr + b * st_b + k * st_k + t, mask=m_t, other=-1).to(tl.int64)
            m_q = m_t & (q >= 0)
        for w in range(W):
            j = q + (W - 1 - w)
            m_j = m_q & (j < P)
            if HAS_START:
                start = tl.load(start_ptr + b * ss_b + k * ss_k + j, mask=m_j, other=0).to(tl.int64)
                m_j = m_j & (start <= q)
            weight = tl.load(weight_ptr + (k * D + d) * W + w, mask=m_d, other=0.0).to(ACC)
            at = ((b * K + k) * P + j) * D
            g = tl.load(g_ptr + at[:, None] + d[None, :], mask=m_j[:, None] & m_d[None, :], other=0.0)
            acc += weight[None, :] * g
    at = ((b * L + t) * columns + column) * D
    tl.store(dx_ptr + at[:, None] + d[None, :], acc, mask=m_t[:, None] & m_d[None, :])


def forward(p: Problem, o: Order) -> Tensor:
    """y ``(B, L, K, D)`` in x's dtype."""
    make = torch.empty if o.token is None else torch.zeros
    y = make((p.batch, p.length, p.routes, p.channels), dtype=p.x.dtype, device=p.x.device)
    if p.x.numel() and p.positions:
        tensors, sizes, flags, tiles = _arguments(p, o)
        with on_device(p.x):
            _forward_kernel[(tiles * p.batch * p.routes,)](*tensors, y, *sizes, **flags)
    return y


def backward(p: Problem, o: Order, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """dx ``(B, L, K or 1, D)`` in x's dtype, dweight, dbias, and g ``(B, K, P, D)``, the gradient of the sums."""
    tensors, sizes, flags, tiles = _arguments(p, o)
    new = {"dtype": p.dtype, "device": p.x.device}
    parts = p.batch * -(-p.positions // flags["BP"])
    g = torch.empty(p.batch, p.routes, p.positions, p.channels, **new)
    dweight = torch.empty(parts, *p.weight.shape, **new)
    dbias = None if p.bias is None else torch.empty(parts, p.routes, p.channels, **new)
    dx = torch.zeros(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    if p.x.numel() and p.positions:
        place = None if o.token is None else inverse(o.token, p.length)
        columns = p.x.shape[2]
        blocks = triton.cdiv(p.length, flags["BP"]) * triton.cdiv(p.channels, flags["BD"])
        shared = {n: flags[n] for n in ("W", "BD", "HAS_TOKEN", "HAS_START", "ACC")}
        with on_device(p.x):
            _slope_kernel[(tiles * p.batch * p.routes,)](
                dy, *tensors, g, dweight, g if dbias is None else dbias, *sizes, **flags
            )
            _input_gradient_kernel[(blocks * p.batch * columns,)](
                g, tensors[1], g if place is None else place, tensors[5], dx,
                p.positions, p.length, p.channels, columns, *_table_steps(place), *_table_steps(o.start),
                K=p.routes, SUMMED=p.routes // columns, BL=flags["BP"], **shared,
            )  # fmt: skip
    return dx, dweight.sum(0), None if dbias is None else dbias.sum(0), g


def _arguments(p: Problem, o: Order) -> tuple[list[Tensor], list[int], dict[str, Any], int]:
    """Tensors up to the tables, sizes and strides, compile-time flags, and the tiles of one batch and route."""
    x = p.x if p.x.stride(3) == 1 else p.x.contiguous()
    state = p.initial_state if p.width > 1 else None
    tensors = [x if t is None else t.contiguous() for t in (p.bias, state, o.token, o.start, o.row)]
    sx_k = x.stride(2) if x.shape[2] > 1 else 0
    sizes = [p.positions, p.length, p.channels, p.routes, x.stride(0), x.stride(1), sx_k]
    bp = min(32, int(triton.next_power_of_2(max(p.positions, 1))))
    bd = min(128, int(triton.next_power_of_2(p.channels)))
    flags: dict[str, Any] = {
        "W": p.width,
        "BP": bp,
        "BD": bd,
        "HAS_BIAS": p.bias is not None,
        "HAS_STATE": state is not None,
        "HAS_TOKEN": o.token is not None,
        "HAS_START": o.start is not None,
        "SILU": p.silu,
        "ACC": tl.float64 if p.dtype == torch.float64 else tl.float32,
    }
    tiles = -(-p.positions // bp) * -(-p.channels // bd)
    return [x, p.weight.contiguous(), *tensors], sizes + _table_steps(o.token) + _table_steps(o.start), flags, tiles


def _table_steps(t: Tensor | None) -> list[int]:
    """Strides over batch and route, 0 where an axis is shared."""
    if t is None:
        return [0, 0]
    return [t.stride(0) if t.shape[0] > 1 else 0, t.stride(1) if t.shape[1] > 1 else 0]
