"""The kernels of ``ssd``'s backward on GPUs, in plain Triton; ``triton_backward.py`` launches them.

With S_ij = <C_i, B_j>, M the structured mask, E_ij = <dy_i, x_j>, h what enters a chunk, g what its end gets back:

    dx_j  = dt_j u_j + D dy_j,   u_j = sum_i S_ij M_ij dy_i + leave_j g B_j
    dB_j  = sum over heads of (sum_i T_ij C_i + dt_j leave_j g^T x_j),   T_ij = E_ij M_ij dt_j
    dC_i  = sum over heads of (sum_j T_ij B_j + enter_i h^T dy_i)
    ddt_t = <x_t, u_t> + A da_t,   dA = sum_t dt_t da_t

    da_t  = sum over j < t <= i of W_ij,  W = S o T,  + what passes t from h, to g, and from h to g

da is a direct sum over the pairs that a decay lies between: the shorter sum_i <dy_i, y_i> - <dx_i, x_i> would subtract
large numbers.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import triton
import triton.language as tl

from kernels.early import prefetch
from kernels.ssd.triton_boxes import state_tile, tile_rows
from kernels.ssd.triton_steps import (
    decay_of_pairs,
    decays,
    product,
    read_tokens,
    skips,
    stored_weight,
    weighted_pairs,
)


@triton.jit
def pair_sums(S, EM, SM, E, step, i, j, EXACT: tl.constexpr, WEIGHED: tl.constexpr, DOT: tl.constexpr,
              real: tl.constexpr):  # fmt: skip
    """What a head's pairs (i, j) add to da: EXACT, for each t the sum over j < t <= i; else for each i that over j."""
    if EXACT:
        crossing = (i <= j).to(real)  # at (t, i): i >= t
        crossed = product(crossing, S * EM, DOT, "ieee")  # tensor cores cut sums off
        pairs = tl.sum(tl.where(j < i, crossed, 0.0), 1)
    else:  # with the numbers that <x, u> is from, so that their sums over all pairs cancel
        pairs = E * SM.to(DOT).to(real)
        pairs = tl.sum(pairs if WEIGHED else pairs * step[None, :], 1)
    return pairs


@triton.jit
def gradient_of_x(SM, dyv, back, xf, EXACT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """u (Q, P), of which ``back`` comes from g, and <x, u>; EXACT, the latter without what comes from g."""
    if EXACT:
        u = product(tl.trans(SM.to(DOT)), dyv, DOT, PRECISION)
        own = tl.sum(xf * u, 1)
        u += back
    else:  # onto it, which spares registers
        u = product(tl.trans(SM.to(DOT)), dyv, DOT, PRECISION, back)
        own = tl.sum(xf * u, 1)
    return u, own


@triton.jit
def store_four(to, first, second, third, fourth, Q: tl.constexpr):
    """Writes four numbers a position, side by side, in one store: each has to change its layout."""
    four = tl.join(tl.join(first, second), tl.join(third, fourth))
    one, other = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
    tl.store(to + 4 * tl.arange(0, Q)[:, None, None] + 2 * one + other, four)


@triton.jit
def inner(pid, x, dy, B, C, D, x_box, B_box, C_box, dy_box, g_box, steps, tokens, g_in,
          dx, shares, dD, vectors, xs, ys, Bs, Cs, t_b, t_k, d_h, per_row, first_chunk, plane, K, H, G,
          L, T, first, sign, P, N, parts, heads_each, half, TABLE: tl.constexpr, NEAR: tl.constexpr,
          RESTART: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr,
          FULL: tl.constexpr, TMA: tl.constexpr, HAS_D: tl.constexpr, WIDE_D: tl.constexpr,
          DOT: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
          BLOCKS: tl.constexpr, PIECES: tl.constexpr, WEIGHED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """What pairs of a chunk's positions bring about, and dx (B, L, K, H, P), and their shares of dC and dB, the
    first two of ``shares`` (4, programs, Q, N). One program a chunk, route, group, part of its heads.

    vectors is for ``ddt_kernel``: after what ``outer`` leaves, four numbers a position: the chunk's own <x, u>;
    da's sum over pairs (EXACT; else their sum over j, from which it follows with the first); <x, u> from g; the
    gradient of one D a head. WEIGHED says that <x, u> is times dt. A wide dD is (chunks, K, H, P).
    """
    part, group, k = pid % parts, pid // parts % G, pid // parts // G % K
    local = pid // parts // G // K
    b, c = (first_chunk + local) // per_row, (first_chunk + local) % per_row
    entry, origin, token, there, _exists = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, NEAR)
    B_at, C_at = B + b * Bs[0] + k * Bs[2] + group * Bs[3], C + b * Cs[0] + k * Cs[2] + group * Cs[3]
    begin = group * (H // G) + part * heads_each
    stop = tl.minimum(begin + heads_each, (group + 1) * (H // G))
    vector, each, number = ((b * K + k) * H * per_row + c) * Q, per_row * Q, (local * K + k) * H
    x, dy = x + b * xs[0] + k * xs[2], dy + b * ys[0] + k * ys[2]
    rows = (b * L * K + k) * H * P
    chunk, skip_at = ((first_chunk + local) * K + k) * H, k * H * d_h
    line, key = (b * L + c * Q).to(tl.int32), (group * N).to(tl.int32)
    dx, four_at = dx + rows, vectors + PIECES * plane
    n = tl.arange(0, BN)
    real: tl.constexpr = steps.dtype.element_ty
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    Bv = tile_rows(B_at, Bs, B_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    Cv = tile_rows(C_at, Cs, C_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    S = tl.where(i >= j, product(Cv, tl.trans(Bv), DOT, PRECISION), 0.0)
    T_sum = tl.zeros([Q, Q], real)
    for head in tl.range(begin, stop, num_stages=STAGES):
        step, high, low, segment, _enter, leave, weight, _through = decays(
            steps + vector + head * each, plane, entry, Q, EXACT, FOLDED, RESTART
        )
        weight = stored_weight(steps + vector + head * each, plane, weight, Q, FOLDED, RESTART)
        x_at, dy_at = x + head * xs[3], dy + head * ys[3]
        E = tl.zeros([Q, Q], real)
        for block in tl.static_range(BLOCKS):  # unrolled, so that the loop over heads is the innermost
            p = block * BP + tl.arange(0, BP)
            column = (head * P + block * BP).to(tl.int32)
            xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, p < P, FULL, TMA)
            dyv = tile_rows(dy_at, ys, dy_box, line, column, origin, token, there, p, p < P, FULL, TMA)
            E = product(dyv, tl.trans(xv), DOT, PRECISION, E)
        # S is zero above the diagonal, and T_sum will be.
        if WEIGHED:  # all that starts at j is times dt_j: u, and so <x, u> and dx
            M = weighted_pairs(high, low, segment, Q, RESTART)
        else:
            M = decay_of_pairs(high, low, segment, Q, EXACT, RESTART)
        EM, SM = E * M, S * M
        if not WEIGHED:
            EM *= step[None, :]
        T_sum += EM
        pairs = pair_sums(S, EM, SM, E, step, i, j, EXACT, WEIGHED, DOT, real)
        own, end = tl.zeros([Q], real), tl.zeros([Q], real)
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            in_p = p < P
            column = (head * P + block * BP).to(tl.int32)
            if BLOCKS > 1:
                xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, in_p, FULL, TMA)
                dyv = tile_rows(dy_at, ys, dy_box, line, column, origin, token, there, p, in_p, FULL, TMA)
            g = state_tile(g_in, g_box, number + head, block, 0, P, N, p, n, FULL, TMA, BP)
            back = product(Bv, tl.trans(g), DOT, PRECISION) * (weight if WEIGHED else leave)[:, None]
            xf = xv.to(real)
            end += tl.sum(xf * back, 1)
            u, xu = gradient_of_x(SM, dyv, back, xf, EXACT, DOT, PRECISION)
            own += xu
            if not WEIGHED:
                u *= step[:, None]
            if HAS_D:
                skip = skips(D + skip_at + head * d_h, p, in_p, WIDE_D)
                u += skip * dyv.to(real)
                if WIDE_D:
                    tl.store(dD + (chunk + head) * P + p, tl.sum(dyv.to(real) * xf, 0), mask=in_p)
            at = (origin * K * H + head) * P + (token[:, None] * (K * H * P) + p[None, :])
            if FULL:  # not in boxes: two programs would not fit into shared memory
                tl.store(dx + at, u)
            else:
                tl.store(dx + at, u, mask=there[:, None] & in_p[None, :])
        if not EXACT:  # it has both
            own -= end
        skipped = tl.sum(tl.where(i == j, E, 0.0), 1) if HAS_D and not WIDE_D else end
        store_four(four_at + 4 * (vector + head * each), own, end, pairs, skipped, Q)
    T_sum = tl.where(i >= j, T_sum, 0.0)
    Bv = tile_rows(B_at, Bs, B_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    Cv = tile_rows(C_at, Cs, C_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    to, live = shares + (pid * Q + i) * N + n[None, :], (n < N)[None, :]
    tl.store(to, product(T_sum, Bv, DOT, PRECISION), mask=live)
    tl.store(to + half, product(tl.trans(T_sum), Cv, DOT, PRECISION), mask=live)


@triton.jit
def outer(pid, piece, x, dy, C, x_box, C_part, dy_box, h_part, g_part, steps, tokens, h_in, g_in, shares,
          h_to_g, vectors, xs, ys, Cs, t_b, t_k, per_row, first_chunk, plane, K, H, G, L, T,
          first, sign, P, N, parts, heads_each, half, TABLE: tl.constexpr, NEAR: tl.constexpr,
          RESTART: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr,
          FULL: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
          Q: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BLOCKS: tl.constexpr,
          PIECES: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """What goes through a chunk's borders: shares of dC and dB, the other two of ``shares``, and da's from h and from h
    to g. One program a chunk, route, group, part of its heads, piece of BO states.

    vectors begins with what comes from h (PIECES, B, K, H, chunks, Q); h_to_g (chunks, K, H, PIECES) is what passes a
    whole chunk.
    """
    part, group, k = pid % parts, pid // parts % G, pid // parts // G % K
    local = pid // parts // G // K
    b, c = (first_chunk + local) // per_row, (first_chunk + local) % per_row
    entry, origin, token, there, _exists = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, NEAR)
    begin = group * (H // G) + part * heads_each
    stop = tl.minimum(begin + heads_each, (group + 1) * (H // G))
    vector, each, number = ((b * K + k) * H * per_row + c) * Q, per_row * Q, (local * K + k) * H
    x, dy = x + b * xs[0] + k * xs[2], dy + b * ys[0] + k * ys[2]
    line, states = (b * L + c * Q).to(tl.int32), (piece * BO).to(tl.int32)
    chunk, n = ((first_chunk + local) * K + k) * H, states + tl.arange(0, BO)
    real: tl.constexpr = steps.dtype.element_ty
    Cv = tile_rows(C + b * Cs[0] + k * Cs[2] + group * Cs[3], Cs, C_part, line, (group * N).to(tl.int32) + states,
                   origin, token, there, n, n < N, FULL, TMA).to(DOT)  # fmt: skip
    dCv, dBv = tl.zeros([Q, BO], real), tl.zeros([Q, BO], real)
    for head in tl.range(begin, stop, num_stages=STAGES):
        _step, _high, _low, _segment, enter, _leave, weight, through = decays(
            steps + vector + head * each, plane, entry, Q, EXACT, FOLDED, RESTART
        )
        weight = stored_weight(steps + vector + head * each, plane, weight, Q, FOLDED, RESTART)
        x_at, dy_at = x + head * xs[3], dy + head * ys[3]
        if AHEAD:
            lines = tl.arange(0, BO // 64)[None, :] * 64  # of 128 bytes
            state = (number + tl.minimum(head + 1, stop - 1)) * P * N + states
            prefetch(h_in + state + tl.arange(0, BP)[:, None] * N + lines)
        from_h, passing = tl.zeros([Q], real), tl.full((), 0.0, real)
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            column = (head * P + block * BP).to(tl.int32)
            dyv = tile_rows(dy_at, ys, dy_box, line, column, origin, token, there, p, p < P, FULL, TMA)
            h = state_tile(h_in, h_part, number + head, block, states, P, N, p, n, FULL, TMA, BP)
            before = product(Cv, tl.trans(h), DOT, PRECISION)
            from_h += tl.sum(before * dyv.to(real), 1)
            dCv = product(dyv.to(real) * enter[:, None], h, DOT, PRECISION, dCv)
            g = state_tile(g_in, g_part, number + head, block, states, P, N, p, n, FULL, TMA, BP)
            xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, p < P, FULL, TMA)
            dBv = product(xv.to(real) * weight[:, None], g, DOT, PRECISION, dBv)
            if EXACT or BP < 64:
                passing += tl.sum(h.to(real) * g.to(real))
            else:  # tensor cores do it faster, though they find what nobody asks for as well
                rows = tl.arange(0, BP)
                both = product(h, tl.trans(g), DOT, PRECISION)
                passing += tl.sum(tl.where(rows[:, None] == rows[None, :], both, 0.0))
        tl.store(h_to_g + (chunk + head) * PIECES + piece, through * passing)
        tl.store(vectors + piece * plane + vector + head * each + tl.arange(0, Q), from_h * enter)
    to, live = shares + (pid * Q + tl.arange(0, Q)[:, None]) * N + n[None, :], (n < N)[None, :]
    tl.store(to + 2 * half, dCv, mask=live)
    tl.store(to + 3 * half, dBv, mask=live)


@triton.jit
def chunks_kernel(x, dy, B, C, D, x_box, B_box, C_box, dy_box, g_box, C_part, h_part, g_part, steps, tokens,
                  owner, h_in, g_in, dx, shares, dD, h_to_g, vectors, xs, ys, Bs, Cs, t_b, t_k, d_h, per_row,
                  first_chunk, plane, K, H, G, L, T, first, sign, P, N, parts, heads_each, half, TABLE: tl.constexpr,
                  NEAR: tl.constexpr, RESTART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
                  FOLDED: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
                  HAS_D: tl.constexpr, WIDE_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                  Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BLOCKS: tl.constexpr,
                  PIECES: tl.constexpr, WEIGHED: tl.constexpr, STAGES: tl.constexpr,
                  INNER_STAGES: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """``inner`` and ``outer``, side by side: what one has read of x, dy and g the other finds in the cache."""
    pid = tl.program_id(0).to(tl.int64)
    role, pid = pid % (1 + PIECES), pid // (1 + PIECES)
    if role == 0:
        inner(pid, x, dy, B, C, D, x_box, B_box, C_box, dy_box, g_box, steps, tokens, g_in, dx,
              shares, dD, vectors, xs, ys, Bs, Cs, t_b, t_k, d_h, per_row, first_chunk, plane, K, H, G, L, T,
              first, sign, P, N, parts, heads_each, half, TABLE, NEAR, RESTART, EXACT, FOLDED, FULL, TMA, HAS_D,
              WIDE_D, DOT, PRECISION, Q, BP, BN, BLOCKS, PIECES, WEIGHED, INNER_STAGES)  # fmt: skip
    else:
        outer(pid, role - 1, x, dy, C, x_box, C_part, dy_box, h_part, g_part, steps, tokens, h_in, g_in, shares,
              h_to_g, vectors, xs, ys, Cs, t_b, t_k, per_row, first_chunk, plane, K, H, G, L, T, first, sign, P, N,
              parts, heads_each, half, TABLE, NEAR, RESTART, EXACT, FOLDED, FULL, TMA, DOT, PRECISION, Q, BP,
              BO, BLOCKS, PIECES, STAGES, AHEAD)  # fmt: skip
