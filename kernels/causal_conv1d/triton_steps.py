"""Steps of the convolution's GPU kernels that walk along tokens in order; see ``triton_walk.py``.

Places q count the tokens in the order in which they are visited. Tensors are (R, BD): R runs of places by BD channels.

B batch, L tokens, D channels, W conv width.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false
# ruff: noqa: RUF005
# (Triton knows no starred expressions.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(s):
    """1 / (1 + exp(-s)); float32 by two special functions, without the checks that a division needs."""
    if s.dtype == tl.float64:
        value = 1 / (1 + tl.exp(-s))
    else:
        root = tl.rsqrt(1 + tl.exp2(s * -1.4426950408889634))
        value = root * root
    return value


@triton.jit
def tile(L, D, runs, steps, R: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):
    """Batch, number of the block of runs, first place of each run (R, 1), channels (1, BD) and their mask."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    d = (pid % blocks) * BD + tl.arange(0, BD)[None, :]
    part = pid // blocks
    q = ((part % runs) * R + tl.arange(0, R)[:, None]) * (steps * U)
    return (part // runs).to(tl.int64), part.to(tl.int64), q, d, d < D


@triton.jit
def parameters(
    weight_ptr, bias_ptr, d, m_d, W: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):
    """The W taps and the bias, each (1, BD)."""
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + d * W + w, mask=m_d, other=0.0).to(ACC),)
    bias = tl.zeros((1, BD), dtype=ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(ACC)
    return taps, bias


@triton.jit
def offset_of(b, q, L, step_b, step_l, REVERSE: tl.constexpr):
    """Offset of place q (R, 1) and the way from a place to the next one, in int64."""
    step = tl.cast(step_l, tl.int64)
    token = q.to(tl.int64)
    if REVERSE:
        token = L - 1 - token
    offset = b * step_b + token * step
    if REVERSE:
        step = -step
    return offset, step


@triton.jit
def rows_of(ptr, step, q, L, m_d, U: tl.constexpr):
    """The rows of places q, ..., q + U - 1 as they lie in memory, zeros from L on; all are under way at once."""
    rows = ()
    for u in tl.static_range(U):
        rows = rows + (tl.load(ptr + u * step, mask=(q + u < L) & m_d, other=0.0),)
    return rows


@triton.jit
def past_of(
    x_ptr, state_ptr, step, b, q, L, D, d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The inputs at places q - W + 1, ..., q - 1: of the state before place 0."""
    past = ()
    for w in tl.static_range(W - 1):
        value = tl.load(x_ptr + (w - W + 1) * step, mask=(q + w >= W - 1) & (q < L) & m_d, other=0.0).to(ACC)
        if HAS_STATE:
            slot = (b * (W - 1) + q + w) * D
            value += tl.load(state_ptr + slot + d, mask=(q + w < W - 1) & m_d, other=0.0).to(ACC)
        past = past + (value,)
    return past


@triton.jit
def weighted_sum(taps, bias, past, W: tl.constexpr):
    s = bias
    for w in tl.static_range(W):
        s = s + taps[w] * past[w]
    return s


@triton.jit
def slope_of(dy, taps, bias, past, W: tl.constexpr, SILU: tl.constexpr):
    """The gradient g of the sum whose inputs are ``past``."""
    g = dy
    if SILU:
        s = weighted_sum(taps, bias, past, W)
        gate = sigmoid(s)
        g = dy * (gate * (1 + s * (1 - gate)))
    return g
