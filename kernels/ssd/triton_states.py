"""The states between chunks on GPUs: one walk over the chunks, forwards for the state, backwards for its gradient.

    forwards    h' = (decay through the chunk) h + sum_j (decay from j to its end) dt_j x_j B_j^T
    backwards   g  = (decay through the chunk) g' + sum_i (decay from its start to i) dy_i C_i^T

(Dao & Gu 2024, section 6, steps 2 and 3, in one.) Where rows and heads are few, a row is cut into segments that are
walked at the same time: first from zero to their ends (``STORE`` off), from where on anything is left there, then
``carry_kernel`` joins them.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences, BP rows of the state that a program holds.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
# ruff: noqa: RUF005  Triton grows tuples by +, it has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl

from kernels.ssd.triton_steps import decays, product, read_rows, read_tokens

GONE = tl.constexpr(150.0)  # what has decayed by two to this is less than the smallest float32
LOOK = tl.constexpr(64)  # chunks whose decays are looked at together


@triton.jit
def remembered(steps, plane, begin, stop, ADJOINT: tl.constexpr, Q: tl.constexpr):
    """The first step of a walk over the chunks begin to stop of which something is left at its end, and what is left
    of the state before it: 0 where it is not the first of all."""
    real: tl.constexpr = steps.dtype.element_ty
    since, total = begin, tl.zeros((), real)
    for number in range(tl.cdiv(stop - begin, LOOK)):
        back = stop - 1 - (number * LOOK + tl.arange(0, LOOK))
        inside = back >= begin
        c = begin + stop - 1 - back if ADJOINT else back
        exponents = tl.load(steps + plane + c * Q + Q - 1, mask=inside, other=0)
        gone = inside & (total + tl.cumsum(exponents, 0) <= -GONE)
        since = tl.maximum(since, tl.max(tl.where(gone, back, begin), 0))
        total += tl.sum(exponents, 0)
    return since, tl.where(since > begin, 0.0, 1.0).to(real)


@triton.jit
def keep(h, wanted, c, out, out_box, from_line, lines, chunk_stride, tile, live, FULL: tl.constexpr, TMA: tl.constexpr,
         DOT: tl.constexpr):  # fmt: skip
    """Writes a tile of the state, if ``wanted``, as what enters chunk c, counted as those of ``out`` are."""
    if wanted:
        if TMA:
            out_box.store([(c * lines + from_line).to(tl.int32), 0], h.to(DOT))
        elif FULL:
            tl.store(out + c * chunk_stride + tile, h)
        else:
            tl.store(out + c * chunk_stride + tile, h, mask=live)


@triton.jit
def walk(rows, r_l, r_p, rows_box, columns, keys, k_l, k_n, keys_box, group, line, steps, plane, tokens,
         owner, enter_from, start, end, out, out_box, from_line, lines, per_token, totals, total_decay, begin, stop,
         chunk_stride, first_chunk, T, first, sign, P, N, p, n, TABLE: tl.constexpr, NEAR: tl.constexpr,
         RESTART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr, FULL: tl.constexpr,
         TMA: tl.constexpr, HAS_ENTER: tl.constexpr, HAS_START: tl.constexpr,
         HAS_END: tl.constexpr, STORE: tl.constexpr, ADJOINT: tl.constexpr, DOT: tl.constexpr,
         PRECISION: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Walks the chunks begin to stop with a (P, N) tile of the state.

    STORE keeps in ``out`` what enters each chunk (ADJOINT: what comes back to its end) and in ``end`` what leaves each
    sequence; else ``totals`` gets what leaves the last chunk and ``total_decay`` the decay over all.
    """
    live = (p < P)[:, None] & (n < N)[None, :]
    tile = p[:, None] * N + n[None, :]
    real: tl.constexpr = steps.dtype.element_ty
    h = tl.zeros(tile.shape, real)
    if HAS_ENTER:
        h = tl.load(enter_from + tile, mask=live, other=0)
    since, left = begin, tl.full((), 1.0, real)
    if not STORE and not PACKED and FOLDED:  # folded: no step is negative, and all exponents of a head have one sign
        since, left = remembered(steps, plane, begin, stop, ADJOINT, Q)
    if STORE and not PACKED:
        c = (stop - 1 if ADJOINT else begin) - first_chunk
        keep(h, begin < stop, c, out, out_box, from_line, lines, chunk_stride, tile, live, FULL, TMA, DOT)
    for step_number in range(since, stop):
        c = begin + stop - 1 - step_number if ADJOINT else step_number
        if PACKED:
            s = tl.load(owner + 1 + c)
            before, after = tl.load(owner + c), tl.load(owner + 2 + c)
            border = (s >= 0) & (s != (after if ADJOINT else before))
            fresh = tl.zeros_like(h)
            if HAS_START:
                fresh = tl.load(start + s * per_token + tile, mask=live & border, other=0)
            h, left = tl.where(border, fresh, h), tl.where(border, 0.0, left)
            if STORE:
                keep(h, True, c - first_chunk, out, out_box, from_line, lines, chunk_stride, tile, live, FULL, TMA, DOT)
        entry, origin, token, there, _ = read_tokens(tokens, c, T, first, sign, Q, TABLE, NEAR)
        _, _, _, _, enter, _, weight, through = decays(steps + c * Q, plane, entry, Q, EXACT, FOLDED, RESTART)
        at = (line + c * Q).to(tl.int32)
        if TMA:
            value = rows_box.load([at, columns]).to(real)
        else:
            value = read_rows(rows, r_l, r_p, origin, token, there, p, p < P, FULL).to(real)
        value = value * (enter if ADJOINT else weight)[:, None]
        if TMA:
            key = keys_box.load([at, (group * N).to(tl.int32)])
        else:
            key = read_rows(keys, k_l, k_n, origin, token, there, n, n < N, FULL)
        h = product(tl.trans(value.to(DOT)), key, DOT, PRECISION, h * through)
        left = left * through
        if STORE and not PACKED:
            # In a condition, and so, as Triton orders it, when the next chunk's copies are under way.
            following, more = c - 1 if ADJOINT else c + 1, step_number + 1 < stop
            keep(h, more, following - first_chunk, out, out_box, from_line, lines, chunk_stride, tile, live, FULL, TMA,
                 DOT)  # fmt: skip
        if STORE and HAS_END and PACKED:
            leaves = (s >= 0) & (s != (before if ADJOINT else after))
            tl.store(end + s * per_token + tile, h, mask=live & leaves)
    if not STORE:
        tl.store(totals + tile, h, mask=live)
        tl.store(total_decay, left)
    return h


@triton.jit
def states_kernel(x, dy, B, C, x_box, dy_box, B_box, C_box, h_box, g_box, steps, tokens, owner, initial, dfinal,
                  dinitial, h_enter, g_enter, h_out, g_out, h_total, g_total, h_decay, g_decay, xs, ys, Bs, Cs,
                  t_b, t_k, segments, first_segment, length, per_row, first_chunk, plane, K, H, G, L, T, first, sign,
                  P, N, blocks,
                  TABLE: tl.constexpr, NEAR: tl.constexpr, RESTART: tl.constexpr, PACKED: tl.constexpr,
                  EXACT: tl.constexpr, FOLDED: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
                  HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, FROM_H: tl.constexpr,
                  FROM_G: tl.constexpr, STORE: tl.constexpr, BOTH: tl.constexpr, DOT: tl.constexpr,
                  PRECISION: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program a segment, route, head and block of P; with BOTH as many more walk backwards."""
    pid = tl.program_id(0).to(tl.int64)
    block, head, k = pid % blocks, pid // blocks % H, pid // blocks // H % K
    segment = first_segment + pid // blocks // H // K
    b, s = segment // segments, segment % segments
    begin = s * length
    stop = tl.minimum(begin + length, per_row)
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    matrix, heads = (k * H + head) * P * N, K * H * P * N  # of this head, of all heads
    number = segment * K * H + k * H + head
    steps_at, tokens_at = steps + ((b * K + k) * H + head) * per_row * Q, tokens + b * t_b + k * t_k
    group = head // (H // G)
    chunk = first_chunk - b * per_row  # the chunks of h_out and g_out are counted over all rows, from first_chunk
    line, columns = b * L, (head * P + block * BP).to(tl.int32)
    from_line, lines = matrix // N + block * BP, heads // N
    if tl.program_id(1) == 0:
        walk(x + b * xs[0] + k * xs[2] + head * xs[3], xs[1], xs[4], x_box, columns,
             B + b * Bs[0] + k * Bs[2] + group * Bs[3], Bs[1], Bs[4], B_box, group, line, steps_at, plane, tokens_at,
             owner, h_enter + number * P * N, initial + matrix if HAS_INITIAL else initial, dinitial, h_out + matrix,
             h_box, from_line, lines, heads, h_total + number * P * N, h_decay + number, begin, stop, heads, chunk, T,
             first, sign, P, N, p, n, TABLE, NEAR, RESTART, PACKED, EXACT, FOLDED, FULL, TMA, FROM_H,
             HAS_INITIAL, False, STORE, False, DOT, PRECISION, Q)  # fmt: skip
    elif BOTH:
        g = walk(dy + b * ys[0] + k * ys[2] + head * ys[3], ys[1], ys[4], dy_box, columns,
                 C + b * Cs[0] + k * Cs[2] + group * Cs[3], Cs[1], Cs[4], C_box, group, line, steps_at, plane,
                 tokens_at, owner, g_enter + number * P * N, dfinal + matrix if HAS_DFINAL else dfinal,
                 dinitial + matrix if HAS_INITIAL else dinitial, g_out + matrix, g_box, from_line, lines, heads,
                 g_total + number * P * N, g_decay + number, begin, stop, heads, chunk, T, first, sign, P, N, p, n,
                 TABLE, NEAR, RESTART, PACKED, EXACT, FOLDED, FULL, TMA, FROM_G, HAS_DFINAL, HAS_INITIAL,
                 STORE, True, DOT, PRECISION, Q)  # fmt: skip
        if STORE and HAS_INITIAL and not PACKED:
            here = (p < P)[:, None] & (n < N)[None, :] & (s == 0)
            tl.store(dinitial + b * heads + matrix + p[:, None] * N + n[None, :], g, mask=here)


@triton.jit
def carry(totals, decays_over, start, row, e, live, segments, size, head, KH, HAS_START: tl.constexpr,
          ADJOINT: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Puts what enters each segment in the place of its total; loads UNROLL segments before it waits for the first."""
    h = (live * 0).to(totals.dtype.element_ty)
    if HAS_START:
        h = tl.load(start + row * size + e, mask=live, other=0)
    for step in range(0, segments, UNROLL):
        ends, decays_of = (), ()
        for u in tl.static_range(UNROLL):
            s = segments - 1 - step - u if ADJOINT else step + u
            inside = live & (step + u < segments)
            ends = ends + (tl.load(totals + (row * segments + s) * size + e, mask=inside, other=0),)
            decays_of = decays_of + (tl.load(decays_over + (row * segments + s) * KH + head, mask=inside, other=0),)
        for u in tl.static_range(UNROLL):
            s = segments - 1 - step - u if ADJOINT else step + u
            tl.store(totals + (row * segments + s) * size + e, h, mask=live & (step + u < segments))
            h = h * decays_of[u] + ends[u]


@triton.jit
def carry_kernel(h_total, g_total, h_decay, g_decay, initial, dfinal, segments, size, each, KH,
                 HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, BOTH: tl.constexpr, UNROLL: tl.constexpr,
                 BE: tl.constexpr):  # fmt: skip
    """What enters each segment of a row, from the segments' totals (rows, segments, K, H, P, N), in their place."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1).to(tl.int64) * BE + tl.arange(0, BE)
    live, head = e < size, e // each
    if tl.program_id(2) == 0:
        carry(h_total, h_decay, initial, row, e, live, segments, size, head, KH, HAS_INITIAL, False, UNROLL)
    elif BOTH:
        carry(g_total, g_decay, dfinal, row, e, live, segments, size, head, KH, HAS_DFINAL, True, UNROLL)
