"""Device functions that the Triton scans share, and the kernels that lay out steps, B and C in scan order.

``tokens`` holds the entry of every step of every chunk: the token, -3 - token where the state restarts, -1 for a
padding slot, -2 for no step at all (skipped, or behind the end). So the scans know nothing of routes, reversal or
packing. B and C are laid out step by step beside it: they are small next to x, which is never copied.

Tiles are [BD, W]: a lane a channel, a warp a segment of T steps, whose steps are tuples of tiles. The channels come
first because the compiler then puts all tiles in that one layout; the other way round it converts between two.

Complex numbers are pairs of reals; real scans carry a second value that the compiler drops.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences; T steps of a warp's segment,
W segments of a chunk, BD channels of a program.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.selective_scan.problem import CHUNK

CH = tl.constexpr(CHUNK)
LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) as float32 has it,
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)  # and what is missing
LN2 = tl.constexpr(0.6931471805599453)
LN2_HEAD = tl.constexpr(0.693359375)  # 9 bits: its product with an integer is exact
LN2_TAIL = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def tokens_kernel(route, code, cu_seqlens, tokens, P, K, per_row, sequences, rounds,
                  ROUTE: tl.constexpr, CODE: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """tokens (B or 1, K, per_row chunks, CHUNK): the entry of each step. One program a chunk."""
    pid = tl.program_id(0).to(tl.int64)
    slot, k, b = pid % per_row, pid // per_row % K, pid // per_row // K
    j = tl.arange(0, CH)
    start, end, first = slot * 0, slot * 0 + P, slot * 0
    if PACKED:  # the last sequence whose first slot is not behind this one
        low, high = slot * 0, slot * 0 + sequences
        for _ in range(rounds):
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle) // CH + middle <= slot
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        start, end = tl.load(cu_seqlens + low).to(tl.int64), tl.load(cu_seqlens + low + 1).to(tl.int64)
        first = start // CH + low
    step = (slot - first) * CH + j
    ok = step < end - start
    place = end - 1 - step if REVERSE else start + step
    token = place
    if ROUTE:
        token = tl.load(route + k * P + place, mask=ok, other=-1).to(tl.int64)
    if CODE:
        kind = tl.load(code + (b * K + k) * P + place, mask=ok, other=2)
        token = tl.where(kind == 1, -3 - token, tl.where(kind == 2, -2, token))
    tl.store(tokens + pid * CH + j, tl.where(ok, token, -2).to(tl.int32))


@triton.jit
def by_step_kernel(source, tokens, out, s_b, s_l, s_k, s_g, s_n, t_b, t_k, per_row, K, G, N, first, sign,
                   AT_TOKEN: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """out (slots, K, G, N, CHUNK): rows of B or C (B, L, K, G, N) in scan order, zero where there is no token."""
    pid = tl.program_id(0).to(tl.int64)
    g, k, slot = pid % G, pid // G % K, pid // G // K
    b, c = slot // per_row, slot % per_row
    n, j = tl.program_id(1) * BN + tl.arange(0, BN)[:, None], tl.arange(0, CH)[None, :]
    entry = tl.load(tokens + b * t_b + k * t_k + c * CH + j).to(tl.int64)
    token = tl.where(entry <= -3, -3 - entry, entry)
    row = token if AT_TOKEN else first + sign * (c * CH + j)
    mask = (token >= 0) & (n < N)
    value = tl.load(source + b * s_b + row * s_l + k * s_k + g * s_g + n * s_n, mask=mask, other=0)
    tl.store(out + (pid * N + n) * CH + j, value, mask=(j >= 0) & (n < N))


@triton.jit
def load_number(pointer, offset, mask, COMPLEX: tl.constexpr):
    """A real number twice, or the two parts of a complex one."""
    if COMPLEX:
        re = tl.load(pointer + 2 * offset, mask=mask, other=0)
        im = tl.load(pointer + 2 * offset + 1, mask=mask, other=0)
    else:
        re = tl.load(pointer + offset, mask=mask, other=0)
        im = re
    return re, im


@triton.jit
def store_number(pointer, offset, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(pointer + 2 * offset, re, mask=mask)
        tl.store(pointer + 2 * offset + 1, im, mask=mask)
    else:
        tl.store(pointer + offset, re, mask=mask)


@triton.jit
def load_step(pointer, n, j, like, COMPLEX: tl.constexpr):
    """State n of B or C at step j of a chunk (CH values a state, or a state's part), from ``by_step_kernel``."""
    if COMPLEX:
        re, im = tl.load(pointer + 2 * n * CH + j).to(like), tl.load(pointer + (2 * n + 1) * CH + j).to(like)
    else:
        re = tl.load(pointer + n * CH + j).to(like)
        im = re
    return re, im


@triton.jit
def times(ar, ai, br, bi, COMPLEX: tl.constexpr):
    if COMPLEX:
        re, im = ar * br - ai * bi, ar * bi + ai * br
    else:
        re, im = ar * br, ai
    return re, im


@triton.jit
def exp2_of_product(v, rate, rest):
    """2 ** (v (rate + rest)), the exponent exact to twice the precision.

    The rounding of v * rate alone is an error of |exponent| units in the last place; a rate rounded once is off by the
    same amount at every step, and the gradient of A would add that up. So would the error of the GPU's own float32
    exponential, up to two units: it is taken of an integer only, and a polynomial of the rest.
    """
    high = v * rate
    if v.dtype == tl.float64:
        power = tl.exp2(high) * tl.fma(tl.fma(v, rest, tl.fma(v, rate, -high)), LN2, 1.0)
    else:
        n = tl.floor(high + 0.5)
        f = tl.fma(v, rest, tl.fma(v, rate, -n))
        p = tl.fma(f, 1.535336188319500e-4, 1.339887440266574e-3)
        p = tl.fma(p, f, 9.618437357674640e-3)
        p = tl.fma(p, f, 5.550332471162809e-2)
        p = tl.fma(p, f, 2.402264791363012e-1)
        p = tl.fma(p, f, 6.931472028550421e-1)
        power = tl.where(high < -150.0, 0.0, tl.fma(p, f, 1.0) * tl.exp2(n))
    return power


@triton.jit
def decay(dt, Ar, Ai, entry, RESTART: tl.constexpr, COMPLEX: tl.constexpr):
    """a_t = exp(dt A), zero where the state restarts."""
    rate = Ar * LOG2E
    re = exp2_of_product(dt, rate, tl.fma(Ar, LOG2E, -rate) + Ar * LOG2E_REST)
    if RESTART:
        re = tl.where(entry <= -3, 0.0, re)
    im = re
    if COMPLEX:
        im = re * tl.sin(dt * Ai)
        re = re * tl.cos(dt * Ai)
    return re, im


@triton.jit
def exp_of_minus(v):
    """exp(-|v|), to the last place: 2 ** n exp(-|v| - n log 2), exact where exp(v) would round v log2(e)."""
    small = -tl.minimum(tl.abs(v), 2000.0)
    n = tl.floor(small * LOG2E + 0.5)
    return tl.exp2(n) * tl.exp((small - n * LN2_HEAD) - n * LN2_TAIL)


@triton.jit
def softplus(v):
    """log(1 + exp(v)), accurate for small results; v itself beyond 20, as PyTorch's."""
    e = exp_of_minus(v)
    u = 1.0 + e
    rounded = u - 1.0
    log1p = tl.where(rounded > 0.0, tl.log(u) * (e / tl.where(rounded > 0.0, rounded, 1.0)), e)
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + log1p)


@triton.jit
def softplus_slope(v):
    """The derivative of ``softplus``, 1 / (1 + exp(-v)), accurate for small results; 1 beyond 20."""
    e = exp_of_minus(v)
    return tl.where(v > 20.0, 1.0, tl.where(v > 0.0, 1.0, e) / (1.0 + e))


@triton.jit
def read_step(x, dt, tokens, x_l, dt_l, x_off, dt_off, bias, place, live, j,
              AT_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """Entry, token, x, raw dt (bias added) and dt of step j; x and the raw dt are zero where there is no token."""
    entry = tl.load(tokens + j)
    token = tl.where(entry <= -3, -3 - entry, entry).to(tl.int64)
    row = token if AT_TOKEN else place
    mask = live & (token >= 0)
    xv = tl.load(x + x_off + token * x_l, mask=mask, other=0).to(bias.dtype)
    raw = tl.load(dt + dt_off + row * dt_l, mask=mask, other=0).to(bias.dtype) + bias
    step = softplus(raw) if SOFTPLUS else raw
    return entry, token, xv, raw, tl.where(live & (entry != -2), step, 0.0)


@triton.jit
def read_dy(dy, z, dy_off, z_off, mask, real: tl.constexpr, HAS_Z: tl.constexpr):
    """The gradient before the gate; the gradient after it, z and silu's factor sigmoid(z) for the gradient of z."""
    after = tl.load(dy + dy_off, mask=mask, other=0).to(real)
    before, gate, sigmoid = after, after, after
    if HAS_Z:
        gate = tl.load(z + z_off, mask=mask, other=0).to(real)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        before = after * gate * sigmoid
    return before, after, gate, sigmoid


@triton.jit
def feedback(dy, Cr, Ci, COMPLEX: tl.constexpr):
    """What y_t = <C, h> (twice the real part) hands to the gradient of h: dy conj(C)."""
    if COMPLEX:
        dy = 2.0 * dy
    return dy * Cr, -dy * Ci


@triton.jit
def times_plus(ar, ai, br, bi, cr, ci, COMPLEX: tl.constexpr):
    """a b + c."""
    re, im = times(ar, ai, br, bi, COMPLEX)
    return re + cr, im + ci


@triton.jit
def compose(a1, h1, b1, c1, a2, h2, b2, c2):
    """One stretch of steps after another: a h + h' leaves it, b h + c enters its last segment, where h entered it."""
    return a1 * a2, a2 * h1 + h2, a1 * b2, b2 * h1 + c2


@triton.jit
def compose_complex(a1r, a1i, h1r, h1i, b1r, b1i, c1r, c1i, a2r, a2i, h2r, h2i, b2r, b2i, c2r, c2i):
    return (a1r * a2r - a1i * a2i, a1r * a2i + a1i * a2r,
            a2r * h1r - a2i * h1i + h2r, a2r * h1i + a2i * h1r + h2i,
            a1r * b2r - a1i * b2i, a1r * b2i + a1i * b2r,
            b2r * h1r - b2i * h1i + c2r, b2r * h1i + b2i * h1r + c2i)  # fmt: skip


@triton.jit
def scan_segments(ar, ai, hr, hi, COMPLEX: tl.constexpr):
    """From the first to each segment (axis 1) of decays a and end states h from zero: decay, end state; then b, c with
    b e + c what enters the segment when e enters the first. So nothing has to be shifted between warps."""
    one, zero = tl.full(ar.shape, 1.0, ar.dtype), tl.zeros_like(ar)
    if COMPLEX:
        numbers = (ar, ai, hr, hi, one, zero, zero, zero)
        ar, ai, hr, hi, br, bi, cr, ci = tl.associative_scan(numbers, 1, compose_complex)
    else:
        ar, hr, br, cr = tl.associative_scan((ar, hr, one, zero), 1, compose)
        bi, ci = br, cr
    return ar, ai, hr, hi, br, bi, cr, ci


@triton.jit
def join(ar, ai, hr, hi, er, ei, COMPLEX: tl.constexpr):
    """What leaves and what enters each segment where e enters the first."""
    ar, ai, hr, hi, br, bi, cr, ci = scan_segments(ar, ai, hr, hi, COMPLEX)
    hr, hi = times_plus(ar, ai, er, ei, hr, hi, COMPLEX)
    cr, ci = times_plus(br, bi, er, ei, cr, ci, COMPLEX)
    return hr, hi, cr, ci
