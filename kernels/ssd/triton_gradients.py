"""The kernels of ``ssd``'s backward on GPUs, in plain Triton; ``triton_backward.py`` launches them.

With S_ij = <C_i, B_j>, L the structured mask, E_ij = <dy_i, x_j>, h what enters a chunk, g what its end gets back:

    dx_j  = dt_j u_j + D dy_j,   u_j = sum_i S_ij L_ij dy_i + leave_j g B_j
    dB_j  = sum over heads of (sum_i T_ij C_i + dt_j leave_j g^T x_j),   T_ij = E_ij L_ij dt_j
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

from kernels.ssd.triton_steps import decays, gates, mask, product, read_dt, read_rows, read_tokens, turned_mask
import os
SCALED = tl.constexpr(int(os.environ.get("X_SCALED", "0")))
EACH = tl.constexpr(int(os.environ.get("X_EACH", "0")))
DIAG = tl.constexpr(int(os.environ.get("X_DIAG", "1")))


@triton.jit
def tile_rows(rows, strides, box, line, column, origin, token, there, p, live, FULL: tl.constexpr, TMA: tl.constexpr):
    """A tile of x or dy (Q, P): by a bulk copy from the matrix of tokens, or by its elements' addresses."""
    if TMA:
        found = box.load([line, column])
    else:
        found = read_rows(rows, strides[1], strides[4], origin, token, there, p, live, FULL)
    return found


@triton.jit
def gated_rows(dy, ys, dy_box, line, column, z, zs, origin, token, there, p, live, FULL: tl.constexpr,
               TMA: tl.constexpr, HAS_Z: tl.constexpr, DOT: tl.constexpr, real: tl.constexpr):  # fmt: skip
    """dy after and before the gate's gradient (Q, P), what the latter loses as a product's operand, and the gate."""
    after = tile_rows(dy, ys, dy_box, line, column, origin, token, there, p, live, FULL, TMA)
    dyf, lost, gate, sigmoid = after, after, after, after
    if HAS_Z:
        gate, sigmoid = gates(z, zs[1], zs[3], origin, token, there, p, live, FULL, real)
        dyf = after.to(real) * gate * sigmoid
        lost = dyf - dyf.to(DOT).to(real)
    return after, dyf, lost, gate, sigmoid


@triton.jit
def state_tile(states, box, number, block, P, N, p, n, FULL: tl.constexpr, TMA: tl.constexpr, BP: tl.constexpr):
    """One of the states (P, N) of ``states``, or BP of its rows."""
    if TMA:
        found = box.load([(number * P + block * BP).to(tl.int32), 0])
    else:
        at = states + number * P * N + (p[:, None] * N + n[None, :])
        found = tl.load(at) if FULL else tl.load(at, mask=(p < P)[:, None] & (n < N)[None, :], other=0)
    return found


@triton.jit
def row_side(x, dy, z, C_at, D, B_at, x_box, B_box, C_box, dy_box, h_box, g_box, line, key, steps, h_in, g_in, h_to_g, dz, dC, dD, vectors, xs, ys, zs, Bs, Cs, entry, origin, token, there,
             vector, each, number, chunk, skip_at, d_h, d_p, plane, K, H, P, N, begin, stop,
             RESTART: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
             HAS_Z: tl.constexpr, HAS_D: tl.constexpr, WIDE_D: tl.constexpr, DOT: tl.constexpr,
             PRECISION: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
             BLOCKS: tl.constexpr):  # fmt: skip
    """What ends at a position: dC, dz, dD, and its share of da."""
    n = tl.arange(0, BN)
    real: tl.constexpr = steps.dtype.element_ty
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    Bv = tile_rows(B_at, Bs, B_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    Cv = tile_rows(C_at, Cs, C_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    S = product(Cv, tl.trans(Bv), DOT, PRECISION)
    T_sum, dCv = tl.zeros([Q, Q], real), tl.zeros([Q, BN], real)
    for head in range(begin, stop):
        step, high, low, segment, enter, _leave, _weight, through = decays(steps + vector + head * each, plane, entry,
                                                                            Q, EXACT, FOLDED, RESTART)  # fmt: skip
        x_at, dy_at, z_at = x + head * xs[3], dy + head * ys[3], z + head * zs[2]
        E = tl.zeros([Q, Q], real)
        for block in tl.static_range(BLOCKS):  # unrolled, so that the loop over heads is the innermost
            p = block * BP + tl.arange(0, BP)
            column = (head * P + block * BP).to(tl.int32)
            xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, p < P, FULL, TMA)
            after, dyf, lost, gate, sigmoid = gated_rows(dy_at, ys, dy_box, line, column, z_at, zs, origin, token, there, p, p < P, FULL, TMA, HAS_Z, DOT, real)  # fmt: skip
            E = product(dyf, tl.trans(xv), DOT, PRECISION, E)
            if HAS_Z and not EXACT:  # what a gated dy loses would add up in dA
                E = product(lost, tl.trans(xv), DOT, PRECISION, E)
        L = mask(high, low, segment, Q, EXACT, RESTART)
        SL = S * L
        if EACH:
            dCv = product(E * L * step[None, :], Bv, DOT, PRECISION, dCv)
        else:
            T_sum += E * L * step[None, :]
        if EXACT:
            crossing = (i <= j).to(real)  # at (t, i): i >= t
            crossed = product(crossing, E * SL * step[None, :], DOT, "ieee")  # tensor cores cut sums off
            pairs = tl.sum(tl.where(j < i, crossed, 0.0), 1)
        else:  # with the numbers that <x, u> is from, so that their sums over all pairs cancel
            pairs = tl.sum(E * SL.to(DOT).to(real) * step[None, :], 1)
        from_h, dD_head, passing = tl.zeros([Q], real), tl.zeros([Q], real), tl.full((), 0.0, real)
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            in_p = p < P
            if BLOCKS > 1:
                column = (head * P + block * BP).to(tl.int32)
                xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, in_p, FULL, TMA)
                after, dyf, lost, gate, sigmoid = gated_rows(dy_at, ys, dy_box, line, column, z_at, zs, origin, token, there, p, in_p, FULL, TMA, HAS_Z, DOT, real)  # fmt: skip
            h = state_tile(h_in, h_box, number + head, block, P, N, p, n, FULL, TMA, BP)
            before = product(Cv, tl.trans(h), DOT, PRECISION) * enter[:, None]
            from_h += tl.sum(before * dyf.to(real), 1)
            if HAS_D and WIDE_D:
                tl.store(dD + (chunk + head) * P + p, tl.sum(dyf.to(real) * xv.to(real), 0), mask=in_p)
            elif HAS_D:
                dD_head += tl.sum(dyf.to(real) * xv.to(real), 1)
            if HAS_Z:
                before = product(SL * step[None, :], xv, DOT, PRECISION, before)
                if HAS_D:
                    skip = tl.load(D + skip_at + head * d_h + p * d_p, mask=in_p, other=0)
                    before += skip[None, :] * xv.to(real)
                slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
                to = dz + (origin * K * H + head) * P + (token[:, None] * (K * H * P) + p[None, :])
                tl.store(to, after.to(real) * before * slope, mask=there[:, None] & in_p[None, :])
            if SCALED:
                dCv = product(dyf.to(real) * enter[:, None], h, DOT, PRECISION, dCv)
            else:
                dCv += product(dyf, h, DOT, PRECISION) * enter[:, None]
            g = state_tile(g_in, g_box, number + head, block, P, N, p, n, FULL, TMA, BP)
            if DIAG and not EXACT:  # tensor cores do it faster, though they find what nobody asks for as well
                rows_of = tl.arange(0, BP)
                both = product(h, tl.trans(g), DOT, PRECISION)
                passing += tl.sum(tl.where(rows_of[:, None] == rows_of[None, :], both, 0.0))
            else:
                passing += tl.sum(h.to(real) * g.to(real))
        tl.store(h_to_g + chunk + head, through * passing)
        to = vectors + vector + head * each + tl.arange(0, Q)
        if EXACT:
            tl.store(to + 2 * plane, from_h)
            tl.store(to + 3 * plane, pairs)
        else:
            tl.store(to + 2 * plane, from_h + pairs)
        if HAS_D and not WIDE_D:
            tl.store(to + (3 + EXACT) * plane, dD_head)
    if not EACH:
        Bv = tile_rows(B_at, Bs, B_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
        dCv = product(T_sum, Bv, DOT, PRECISION, dCv)
    tl.store(dC + n[None, :], dCv, mask=there[:, None] & (n < N)[None, :])


@triton.jit
def column_side(x, dy, z, C_at, D, B_at, x_box, B_box, C_box, dy_box, g_box, dx_box, line, key, steps, g_in, dx, dB, vectors, xs, ys, zs, Bs, Cs, entry, origin, token, there,
                vector, each, number, skip_at, d_h, d_p, plane, K, H, P, N, begin, stop,
                RESTART: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
                HAS_Z: tl.constexpr, HAS_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr,
                BP: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """What starts at a position: dB, dx, and <x, u>. Matrices of pairs are (j, i) here."""
    n = tl.arange(0, BN)
    real: tl.constexpr = steps.dtype.element_ty
    Bv = tile_rows(B_at, Bs, B_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    Cv = tile_rows(C_at, Cs, C_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
    S = product(Bv, tl.trans(Cv), DOT, PRECISION)
    T_sum, dBv = tl.zeros([Q, Q], real), tl.zeros([Q, BN], real)
    for head in range(begin, stop):
        step, high, low, segment, _enter, leave, weight, _through = decays(steps + vector + head * each, plane, entry,
                                                                           Q, EXACT, FOLDED, RESTART)  # fmt: skip
        x_at, dy_at, z_at = x + head * xs[3], dy + head * ys[3], z + head * zs[2]
        E = tl.zeros([Q, Q], real)
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            column = (head * P + block * BP).to(tl.int32)
            xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, p < P, FULL, TMA)
            _, dyf, lost, _, _ = gated_rows(dy_at, ys, dy_box, line, column, z_at, zs, origin, token, there, p, p < P, FULL, TMA, HAS_Z, DOT, real)
            E = product(xv, tl.trans(dyf.to(DOT)), DOT, PRECISION, E)
        L = turned_mask(high, low, segment, Q, EXACT, RESTART)
        SL = S * L
        if EACH:
            dBv = product(E * L * step[:, None], Cv, DOT, PRECISION, dBv)
        else:
            T_sum += E * L * step[:, None]
        own, end = tl.zeros([Q], real), tl.zeros([Q], real)
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            in_p = p < P
            if BLOCKS > 1:
                column = (head * P + block * BP).to(tl.int32)
                xv = tile_rows(x_at, xs, x_box, line, column, origin, token, there, p, in_p, FULL, TMA)
                _, dyf, lost, _, _ = gated_rows(dy_at, ys, dy_box, line, column, z_at, zs, origin, token, there, p, in_p, FULL, TMA, HAS_Z, DOT, real)  # fmt: skip
            u = product(SL, dyf, DOT, PRECISION)
            if HAS_Z and not EXACT:
                u = product(SL, lost, DOT, PRECISION, u)
            xf = xv.to(real)
            own += tl.sum(xf * u, 1)
            g = state_tile(g_in, g_box, number + head, block, P, N, p, n, FULL, TMA, BP)
            back = product(Bv, tl.trans(g), DOT, PRECISION) * leave[:, None]
            end += tl.sum(xf * back, 1)
            if SCALED:
                dBv = product(xf * weight[:, None], g, DOT, PRECISION, dBv)
            else:
                dBv += product(xv, g, DOT, PRECISION) * weight[:, None]
            u = (u + back) * step[:, None]
            if HAS_D:
                skip = tl.load(D + skip_at + head * d_h + p * d_p, mask=in_p, other=0)
                u += skip[None, :] * dyf.to(real)
            to = dx + (origin * K * H + head) * P + (token[:, None] * (K * H * P) + p[None, :])
            if TMA:
                dx_box.store([line, (head * P + block * BP).to(tl.int32)], u.to(dx.dtype.element_ty))
            elif FULL:
                tl.store(to, u)
            else:
                tl.store(to, u, mask=there[:, None] & in_p[None, :])
        to = vectors + vector + head * each + tl.arange(0, Q)
        tl.store(to, own)
        tl.store(to + plane, end)
    if not EACH:
        Cv = tile_rows(C_at, Cs, C_box, line, key, origin, token, there, n, n < N, FULL, TMA).to(DOT)
        dBv = product(T_sum, Cv, DOT, PRECISION, dBv)
    tl.store(dB + n[None, :], dBv, mask=there[:, None] & (n < N)[None, :])


@triton.jit
def chunks_kernel(x, dy, z, B, C, D, x_box, B_box, C_box, dy_box, h_box, g_box, dx_box, steps, tokens, owner, h_in, g_in, h_to_g, dx, dz, dB, dC, dD, vectors, xs, ys, zs,
                  Bs, Cs, t_b, t_k, d_h, d_p, per_row, first_chunk, plane, K, H, G, L, T, first, sign, P, N, parts,
                  heads_each, part_size, TABLE: tl.constexpr, NEAR: tl.constexpr, RESTART: tl.constexpr,
                  PACKED: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr, FULL: tl.constexpr,
                  HAS_Z: tl.constexpr, HAS_D: tl.constexpr, WIDE_D: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
                  PRECISION: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
                  BLOCKS: tl.constexpr):  # fmt: skip
    """dx, dz (B, L, K, H, P); dB, dC (parts, B, L, K, G, N). Two programs a chunk, route, group, part of its heads.

    They run side by side, so that the second to read a tile finds it in the cache. vectors (3 to 5, B, K, H, chunks, Q)
    is for ``ddt_kernel``: 0, the chunk's own <x, u>; 1, <x, u> from g; 2, what ends at each position; 3, da's sum over
    pairs (EXACT: else it follows from 2 and 0); and with one D a head 3 or 4, its gradient. A wide dD is (chunks, K,
    H, P).
    """
    pid = tl.program_id(0).to(tl.int64)
    side = pid % 2
    part, group, k = pid // 2 % parts, pid // 2 // parts % G, pid // 2 // parts // G % K
    local = pid // 2 // parts // G // K
    b, c = (first_chunk + local) // per_row, (first_chunk + local) % per_row
    entry, origin, token, there, _ = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, NEAR)
    B_at, C_at = B + b * Bs[0] + k * Bs[2] + group * Bs[3], C + b * Cs[0] + k * Cs[2] + group * Cs[3]
    begin = group * (H // G) + part * heads_each
    stop = tl.minimum(begin + heads_each, (group + 1) * (H // G))
    vector, each, number = ((b * K + k) * H * per_row + c) * Q, per_row * Q, (local * K + k) * H
    x, dy = x + b * xs[0] + k * xs[2], dy + b * ys[0] + k * ys[2]
    rows, keys = (b * L * K + k) * H * P, part * part_size + ((b * L + origin) * K + k) * G * N + group * N
    keys = keys + token[:, None] * (K * G * N)
    skip_at, line, key = k * H * d_h, (b * L + c * Q).to(tl.int32), (group * N).to(tl.int32)
    if side == 0:
        row_side(x, dy, z + b * zs[0], C_at, D, B_at, x_box, B_box, C_box, dy_box, h_box, g_box, line, key, steps, h_in, g_in, h_to_g, dz + rows, dC + keys, dD, vectors, xs, ys, zs, Bs,
                 Cs, entry, origin, token, there, vector, each, number, ((first_chunk + local) * K + k) * H, skip_at,
                 d_h, d_p, plane, K, H, P, N, begin, stop, RESTART, EXACT, FOLDED, FULL, TMA, HAS_Z, HAS_D, WIDE_D,
                 DOT, PRECISION, Q, BP, BN, BLOCKS)  # fmt: skip
    else:
        column_side(x, dy, z + b * zs[0], C_at, D, B_at, x_box, B_box, C_box, dy_box, g_box, dx_box, line, key, steps, g_in, dx + rows, dB + keys, vectors, xs, ys, zs, Bs,
                    Cs, entry, origin, token, there, vector, each, number, skip_at, d_h, d_p, plane, K, H, P, N, begin,
                    stop, RESTART, EXACT, FOLDED, FULL, TMA, HAS_Z, HAS_D, DOT, PRECISION, Q, BP, BN,
                    BLOCKS)  # fmt: skip


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
               FOLDED: tl.constexpr, HAS_D: tl.constexpr, Q: tl.constexpr,
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
    at = vectors + (((b * K + k) * H + head[:, None]) * per_row + c) * Q + tl.arange(0, Q)[None, :]
    known = live[:, None] & (tl.arange(0, Q) >= 0)[None, :]
    end = tl.load(at + plane, mask=known, other=0)
    to_g = step * end
    chunk = ((b * per_row + c) * K + k) * H + head
    own, ends = tl.load(at, mask=known, other=0), tl.load(at + 2 * plane, mask=known, other=0)
    if not EXACT:
        ends -= step * own
    da = tl.cumsum(ends, 1, reverse=True)
    da += before_each(to_g)
    da += tl.load(h_to_g + chunk, mask=live, other=0)[:, None]
    if EXACT:
        da += tl.load(at + 3 * plane, mask=known, other=0)
    slope = own + end + A_h[:, None] * da
    if CLAMP:
        inside = (free >= tl.zeros_like(free) + LOW) & (free <= tl.zeros_like(free) + HIGH)
        slope = tl.where(inside, slope, 0.0)
    if SOFTPLUS:
        slope = tl.where(raw > 20.0, slope, slope / (1.0 + tl.exp(-raw)))
    slope = tl.where(exists[None, :], slope, 0.0)
    tl.store(ddt + ((b * L + token[None, :]) * K + k) * H + head[:, None], slope, mask=live[:, None] & there[None, :])
    tl.store(dA + chunk, tl.sum(step * da, 1), mask=live)
    if HAS_BIAS:
        tl.store(dbias + chunk, tl.sum(slope, 1), mask=live)
    if HAS_D:
        tl.store(dD + chunk, tl.sum(tl.load(at + (3 + EXACT) * plane, mask=known, other=0), 1), mask=live)
