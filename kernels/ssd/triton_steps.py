"""Device functions that the Triton kernels of ``ssd`` share.

A program walks chunks of Q positions. Where there is a route, packing, or sequence numbers, ``tokens`` holds the entry
of every position: the token, -3 - token where the state restarts, -1 for a padding slot, -2 for none at all (skipped,
or behind the end). Elsewhere the token follows from the position: ``first + sign * position``.

Exponents are powers of two. Their running sums in a chunk are kept in two parts, ``high`` in multiples of 1/256, exact,
and a small ``low``: so the difference of two sums is as good as the sum of what lies between (``EXACT``; bfloat16
products have no use for it). Where no dt is negative, bfloat16 products get in place of ``low`` the sum less log2(dt):
exp2 of a difference then gives decay times dt without a product (``FOLDED``).

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kernels.selective_scan.triton_steps import LOG2E, LOG2E_REST, softplus

FLOOR = tl.constexpr(-160.0)  # 2 ** -160 is zero in float32; below it the sums would only lose digits


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr, plus=None):
    """A matrix product on tensor cores, summed in float32 (float64 for float64), onto ``plus``."""
    if plus is None:
        found = tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)
    else:
        found = tl.dot(a.to(DOT), b.to(DOT), plus, input_precision=PRECISION, out_dtype=plus.dtype)
    return found


@triton.jit
def read_tokens(tokens, c, T, first, sign, Q: tl.constexpr, TABLE: tl.constexpr, NEAR: tl.constexpr):
    """Where the tokens of chunk c are.

    Returns the entry of each position, the token ``origin`` and what to add to it for each position (32 bits with
    ``NEAR``: a tile's addresses then take few registers), whether a token is there, whether the position exists.
    """
    j = tl.arange(0, Q)
    origin = tl.full((), 0, tl.int64)
    if TABLE:
        entry = tl.load(tokens + c * Q + j).to(tl.int64)
        token = tl.where(entry <= -3, -3 - entry, entry)
        there, exists = token >= 0, entry != -2
    else:
        start = origin + c * Q
        there = j < T - start
        if NEAR:
            origin, token = first + sign * start, sign * j
        else:
            token = first + sign * (start + j)
        entry, exists = token, there
    return entry, origin, token, there, exists


@triton.jit
def read_dt(dt, dt_l, dt_h, token, there, exists, bias, head, live, LOW: tl.constexpr, HIGH: tl.constexpr,
            SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):  # fmt: skip
    """Raw dt (heads, Q) with its bias, zero where there is no token; dt before and after the limits, zero where no
    position exists."""
    at = dt + token[None, :] * dt_l + head[:, None] * dt_h
    raw = tl.load(at, mask=there[None, :] & live[:, None], other=0).to(bias.dtype) + bias[:, None]
    free = softplus(raw) if SOFTPLUS else raw
    step = free
    if CLAMP:
        step = tl.minimum(tl.maximum(free, tl.zeros_like(free) + LOW), tl.zeros_like(free) + HIGH)
    return raw, free, tl.where(exists[None, :], step, 0.0)


@triton.jit
def exponents(step, A):
    """log2 of the decays exp(step A), in two parts: multiples of 1/256, whose sums are exact, and a small rest."""
    rate = A * LOG2E
    whole = step * rate
    rest = tl.fma(step, rate, -whole) + step * (tl.fma(A, LOG2E, -rate) + A * LOG2E_REST)
    if whole.dtype == tl.float32:
        rest = tl.where(whole < FLOOR, 0.0, rest)
        whole = tl.maximum(whole, FLOOR)
    high = tl.floor(whole * 256.0 + 0.5) * 0.00390625
    return high, whole - high + rest


@triton.jit
def steps_kernel(dt, A, dt_bias, tokens, steps, ready, sharers, ts, t_b, t_k, per_row, K, H, T, first, sign, plane,
                 blocks, TABLE: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOW: tl.constexpr,
                 HIGH: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr,
                 ADJOINT: tl.constexpr, PDL: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """steps (2 to 4, B, K, H, chunks, Q): dt, the running sum of exponents in each chunk or its ``high``; ``low``; with
    FOLDED, the decay to the chunk's end times dt. The forward, without ADJOINT, reads neither first nor last then; its
    ``sharers`` have not been ``ready`` yet."""
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    tl.store(ready + pid, 0, mask=pid < sharers)
    block, c, k, b = pid % blocks, pid // blocks % per_row, pid // blocks // per_row % K, pid // blocks // per_row // K
    head = block * BH + tl.arange(0, BH)
    live = head < H
    A_h = tl.load(A + k * H + head, mask=live, other=0)
    bias = tl.zeros_like(A_h)
    if HAS_BIAS:
        bias = tl.load(dt_bias + k * H + head, mask=live, other=0)
    _, _, token, there, exists = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, False)
    _, _, step = read_dt(dt + b * ts[0] + k * ts[2], ts[1], ts[3], token, there, exists, bias, head, live,
                         LOW, HIGH, SOFTPLUS, CLAMP)  # fmt: skip
    high, low = exponents(step, A_h[:, None])
    high, low = tl.cumsum(high, 1), tl.cumsum(low, 1)
    to = (((b * K + k) * H + head[:, None]) * per_row + c) * Q + tl.arange(0, Q)[None, :]
    mask = live[:, None] & (to >= 0)
    if ADJOINT or not FOLDED:
        tl.store(steps + to, step, mask=mask)
    if EXACT:
        tl.store(steps + plane + to, high, mask=mask)
        tl.store(steps + 2 * plane + to, low, mask=mask)
    else:
        tl.store(steps + plane + to, high + low, mask=mask)
        if FOLDED:
            folded = high + low - tl.log2(step)
            tl.store(steps + 2 * plane + to, folded, mask=mask)
            if ADJOINT:
                last = tl.sum(tl.where((tl.arange(0, Q) == Q - 1)[None, :], high + low, 0.0), 1)
                tl.store(steps + 3 * plane + to, tl.exp2(last[:, None] - folded), mask=mask)


@triton.jit
def decays(steps, plane, entry, Q: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr, RESTART: tl.constexpr):
    """What a chunk of a head needs of ``steps_kernel``'s results, with ``steps`` at its first position.

    Returns dt, the running sums ``high`` and ``low``, the number ``segment`` of restarts up to each position, and the
    decays: ``enter`` from before the chunk to each position, ``leave`` from each position to the end, ``weight``, that
    times dt, and ``through``.
    """
    j = tl.arange(0, Q)
    step, high = tl.load(steps + j), tl.load(steps + plane + j)
    last_high = tl.load(steps + plane + Q - 1)
    low = high
    if EXACT:
        low, last_low = tl.load(steps + 2 * plane + j), tl.load(steps + 2 * plane + Q - 1)
        enter, leave = tl.exp2(high + low), tl.exp2((last_high - high) + (last_low - low))
        through = tl.exp2(last_high + last_low)
    else:
        enter, leave, through = tl.exp2(high), tl.exp2(last_high - high), tl.exp2(last_high)
    if FOLDED:
        low = tl.load(steps + 2 * plane + j)
        weight = tl.exp2(last_high - low)
    else:
        weight = step * leave
    segment = entry
    if RESTART:
        restart = (entry <= -3).to(tl.int32)
        segment = tl.cumsum(restart, 0)
        last = tl.sum(restart, 0)
        enter = tl.where(segment == 0, enter, 0.0)
        leave, weight = tl.where(segment == last, leave, 0.0), tl.where(segment == last, weight, 0.0)
        through = tl.where(last == 0, through, 0.0)
    return step, high, low, segment, enter, leave, weight, through


@triton.jit
def stored_weight(steps, plane, weight, Q: tl.constexpr, FOLDED: tl.constexpr, RESTART: tl.constexpr):
    """``weight`` of ``decays``, where possible as it is in memory: Triton then reads rows that are multiplied by it as
    the tensor cores want them, without a way through shared memory."""
    return tl.load(steps + 3 * plane + tl.arange(0, Q)) if FOLDED and not RESTART else weight


@triton.jit
def mask(high, low, segment, Q: tl.constexpr, EXACT: tl.constexpr, RESTART: tl.constexpr):
    """The structured mask L (Q, Q): at (i, j) the decay from position j to i >= j, zero across a restart."""
    sums = high[:, None] - high[None, :]
    if EXACT:
        sums = sums + low[:, None] - low[None, :]
    return tl.exp2(tl.where(kept(segment, Q, RESTART), sums, float("-inf")))


@triton.jit
def decay_of_pairs(high, low, segment, Q: tl.constexpr, EXACT: tl.constexpr, RESTART: tl.constexpr):
    """The mask where i >= j; elsewhere some numbers from 0 to 1, which cost less than zeros."""
    sums = high[:, None] - high[None, :]
    if EXACT:
        sums = sums + low[:, None] - low[None, :]
    if RESTART:
        sums = tl.where(segment[:, None] == segment[None, :], sums, float("-inf"))
    return tl.exp2(tl.minimum(sums, 0.0))


@triton.jit
def weighted_pairs(high, low, segment, Q: tl.constexpr, RESTART: tl.constexpr):
    """``decay_of_pairs`` with column j times dt_j, from FOLDED sums: elsewhere it is some finite number."""
    sums = high[:, None] - low[None, :]
    if RESTART:
        sums = tl.where(segment[:, None] == segment[None, :], sums, float("-inf"))
    return tl.exp2(tl.minimum(sums, 126.0))


@triton.jit
def weighted_mask(step, high, low, segment, Q: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr,
                  RESTART: tl.constexpr):  # fmt: skip
    """The mask with column j times dt_j."""
    if FOLDED:
        found = tl.exp2(tl.where(kept(segment, Q, RESTART), high[:, None] - low[None, :], float("-inf")))
    else:
        found = mask(high, low, segment, Q, EXACT, RESTART) * step[None, :]
    return found


@triton.jit
def kept(segment, Q: tl.constexpr, RESTART: tl.constexpr):
    """Whether j may reach i (Q, Q): not after it, and with no restart between."""
    keep = tl.arange(0, Q)[:, None] >= tl.arange(0, Q)[None, :]
    if RESTART:
        keep = keep & (segment[:, None] == segment[None, :])
    return keep


@triton.jit
def read_rows(source, s_l, s_i, origin, token, there, i, live, FULL: tl.constexpr):
    """Rows of tokens, (Q, columns i), zero where there is no token or no column; with FULL all are there."""
    at = source + origin * s_l + (token[:, None] * s_l + i[None, :] * s_i)
    return tl.load(at) if FULL else tl.load(at, mask=there[:, None] & live[None, :], other=0)


@triton.jit
def gates(z, z_l, z_p, origin, token, there, p, live, FULL: tl.constexpr, real: tl.constexpr):
    """The gate z and silu's factor sigmoid(z), (Q, P)."""
    gate = read_rows(z, z_l, z_p, origin, token, there, p, live, FULL).to(real)
    return gate, 1.0 / (1.0 + tl.exp(-gate))


@triton.jit
def skips(D, p, live, WIDE: tl.constexpr):
    """D of a head, to be multiplied by rows (Q, P): one number, or WIDE one a column."""
    return tl.load(D + p, mask=live, other=0)[None, :] if WIDE else tl.load(D)
