"""The last kernels of ``ssd``'s backward on GPUs, in plain Triton: gradients of dt, and by chunks of A, D and dt_bias;
the sums over chunks of these; dB and dC from their shares.

The first reads what ``inner`` and ``outer`` leave for each position; ``triton_gradients.py`` has the formulas.

B batch, L tokens, H heads, P head dim, G groups, K routes, T scan positions, Q positions of a chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import triton
import triton.language as tl

from kernels.selective_scan.triton_steps import softplus_slope
from kernels.ssd.triton_steps import read_dt, read_tokens


@triton.jit
def append(before, last, more, new_last):
    """Two stretches, each as the sum of all but its last number and that number, joined."""
    return before + last + more, new_last


@triton.jit
def before_each(t):
    """What comes before each number of a row, added up; a running sum less the number itself would lose digits."""
    return tl.associative_scan((tl.zeros_like(t), t), 1, append)[0]


@triton.jit
def ddt_kernel(dt, A, dt_bias, tokens, vectors, h_to_g, ddt, dA, dbias, dD, ts, t_b, t_k, per_row, K, H, L, T, first,
               sign, plane, blocks, TABLE: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
               LOW: tl.constexpr, HIGH: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
               FOLDED: tl.constexpr, HAS_D: tl.constexpr, PIECES: tl.constexpr, WEIGHED: tl.constexpr, Q: tl.constexpr,
               BH: tl.constexpr):  # fmt: skip
    """ddt (B, L, K, H); dA, dbias and dD chunk by chunk, (chunks, K, H)."""
    pid = tl.program_id(0).to(tl.int64)
    block, c, k, b = pid % blocks, pid // blocks % per_row, pid // blocks // per_row % K, pid // blocks // per_row // K
    head = block * BH + tl.arange(0, BH)
    live = head < H
    A_h = tl.load(A + k * H + head, mask=live, other=0)
    bias = tl.zeros_like(A_h)
    if HAS_BIAS:
        bias = tl.load(dt_bias + k * H + head, mask=live, other=0)
    _, _, token, there, exists = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, False)
    raw, free, step = read_dt(dt + b * ts[0] + k * ts[2], ts[1], ts[3], token, there, exists, bias, head, live,
                              LOW, HIGH, SOFTPLUS, CLAMP)  # fmt: skip
    at = (((b * K + k) * H + head[:, None]) * per_row + c) * Q + tl.arange(0, Q)[None, :]
    known = live[:, None] & (at >= 0)
    four, ends = vectors + PIECES * plane + 4 * at, tl.zeros_like(step)
    for piece in tl.static_range(PIECES):
        ends += tl.load(vectors + piece * plane + at, mask=known, other=0)
    own, pairs = tl.load(four, mask=known, other=0), tl.load(four + 1, mask=known, other=0)
    end = tl.load(four + 2, mask=known, other=0)
    to_g, through_u = end, own + end
    if WEIGHED:  # dt can be too small for float32
        through_u = tl.where(step > 0, through_u / step, 0.0)
    else:
        to_g, own = step * end, step * own
    chunk = ((b * per_row + c) * K + k) * H + head
    if not EXACT:
        ends += pairs - own
    da = tl.cumsum(ends, 1, reverse=True)
    da += before_each(to_g)
    for piece in tl.static_range(PIECES):
        da += tl.load(h_to_g + chunk * PIECES + piece, mask=live, other=0)[:, None]
    if EXACT:
        da += pairs
    slope = through_u + A_h[:, None] * da
    if CLAMP:
        inside = (free >= tl.zeros_like(free) + LOW) & (free <= tl.zeros_like(free) + HIGH)
        slope = tl.where(inside, slope, 0.0)
    if SOFTPLUS:
        slope = slope * softplus_slope(raw)
    slope = tl.where(exists[None, :], slope, 0.0)
    tl.store(ddt + ((b * L + token[None, :]) * K + k) * H + head[:, None], slope, mask=live[:, None] & there[None, :])
    tl.store(dA + chunk, tl.sum(step * da, 1), mask=live)
    if HAS_BIAS:
        tl.store(dbias + chunk, tl.sum(slope, 1), mask=live)
    if HAS_D:
        tl.store(dD + chunk, tl.sum(tl.load(four + 3, mask=known, other=0), 1), mask=live)


@triton.jit
def join_kernel(shares, tokens, dB, dC, t_b, t_k, per_row, first_chunk, K, G, L, T, first, sign, N, parts, half,
                slices, TABLE: tl.constexpr, NEAR: tl.constexpr, Q: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """dB and dC (B, L, K, G, N), the sums of their shares, in their order. One program a chunk, route, group, BS
    columns, for each of the two."""
    pid = tl.program_id(0).to(tl.int64)
    piece, unit = pid % slices, pid // slices
    group, k, local = unit % G, unit // G % K, unit // G // K
    b, c = (first_chunk + local) // per_row, (first_chunk + local) % per_row
    _, origin, token, there, _ = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, NEAR)
    n = piece * BS + tl.arange(0, BS)
    live = there[:, None] & (n < N)[None, :]
    source = shares + (unit * parts * Q + tl.arange(0, Q)[:, None]) * N + n[None, :]
    if tl.program_id(1) == 0:
        source += half
    total = tl.load(source, mask=live, other=0) + tl.load(source + 2 * half, mask=live, other=0)
    for part in range(1, parts):
        total += tl.load(source + part * Q * N, mask=live, other=0)
        total += tl.load(source + part * Q * N + 2 * half, mask=live, other=0)
    to = ((b * L + origin) * K + k) * G * N + group * N + (token[:, None] * (K * G * N) + n[None, :])
    if tl.program_id(1) == 0:
        tl.store(dB + to, total, mask=live)
    else:
        tl.store(dC + to, total, mask=live)


@triton.jit
def sums_kernel(by_chunk, first, second, third, chunks, heads, BC: tl.constexpr):
    """Adds up gradients by chunks (1 to 3, chunks, heads), each into memory of its own. One program a head and each."""
    head, which = tl.program_id(0), tl.program_id(1)
    source = by_chunk + which.to(tl.int64) * chunks * heads + head
    total = tl.zeros([BC], by_chunk.dtype.element_ty)
    for start in range(0, chunks, BC):
        c = start + tl.arange(0, BC)
        total += tl.load(source + c.to(tl.int64) * heads, mask=c < chunks, other=0)
    found = tl.sum(total, 0)
    if which == 0:
        tl.store(first + head, found)
    elif which == 1:
        tl.store(second + head, found)
    else:
        tl.store(third + head, found)
