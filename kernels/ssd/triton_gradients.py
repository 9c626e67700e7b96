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

from kernels.ssd.triton_steps import decays, gates, mask, product, read_dt, read_rows, read_tokens


@triton.jit
def groups_kernel(x, dy, z, B, C, steps, tokens, owner, h_in, g_in, dB, dC, vectors, h_to_g, xs, ys, zs, Bs, Cs, t_b,
                  t_k, per_row, first_chunk, plane, K, H, G, L, T, first, sign, P, N, parts, heads_each, part_size,
                  TABLE: tl.constexpr, NEAR: tl.constexpr, RESTART: tl.constexpr, PACKED: tl.constexpr,
                  EXACT: tl.constexpr, HAS_Z: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                  Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """dB, dC (parts, B, L, K, G, N) and what they share with da. One program a chunk, route, group, part of its heads.

    vectors (4 or 5, B, K, H, chunks, Q) is for ``ddt_kernel``: here 0, the chunk's own <x, u>, 1, da's sum over pairs,
    and 2, its share of h.
    """
    pid = tl.program_id(0).to(tl.int64)
    part, group, k = pid % parts, pid // parts % G, pid // parts // G % K
    local = pid // parts // G // K
    b, c = (first_chunk + local) // per_row, (first_chunk + local) % per_row
    n = tl.arange(0, BN)
    in_n = n < N
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    real: tl.constexpr = steps.dtype.element_ty
    entry, origin, token, there, _ = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, NEAR)
    Bv = read_rows(B + b * Bs[0] + k * Bs[2] + group * Bs[3], Bs[1], Bs[4], origin, token, there, n, in_n).to(DOT)
    Cv = read_rows(C + b * Cs[0] + k * Cs[2] + group * Cs[3], Cs[1], Cs[4], origin, token, there, n, in_n).to(DOT)
    S = product(Cv, tl.trans(Bv), DOT, PRECISION)
    crossing = (i <= j).to(real).to(DOT)  # at (t, i): i >= t
    T_sum = tl.zeros([Q, Q], real)
    dBv, dCv = tl.zeros([Q, BN], real), tl.zeros([Q, BN], real)
    begin = group * (H // G) + part * heads_each
    for head in range(begin, tl.minimum(begin + heads_each, (group + 1) * (H // G))):
        vector = (((b * K + k) * H + head) * per_row + c) * Q
        step, high, low, segment, enter, leave, through = decays(steps + vector, plane, entry, Q, EXACT, RESTART)
        Lm = mask(S, high, low, segment, Q, EXACT, RESTART)
        inside, from_h, along = tl.zeros([Q], real), tl.zeros([Q], real), tl.zeros([Q], real)
        both = tl.zeros([BN], real)
        x_at, dy_at = x + b * xs[0] + k * xs[2] + head * xs[3], dy + b * ys[0] + k * ys[2] + head * ys[3]
        for block in tl.static_range(BLOCKS):  # unrolled, so that the loop over heads is the innermost
            p = block * BP + tl.arange(0, BP)
            in_p = p < P
            xv = read_rows(x_at, xs[1], xs[4], origin, token, there, p, in_p).to(DOT)
            dyf = read_rows(dy_at, ys[1], ys[4], origin, token, there, p, in_p)
            if HAS_Z:
                z_at = z + b * zs[0] + head * zs[2]
                gate, sigmoid = gates(z_at, zs[1], zs[3], origin, token, there, p, in_p, real)
                dyf = dyf.to(real) * gate * sigmoid
            dyv = dyf.to(DOT)
            at = ((local * K + k) * H + head) * P * N + (p[:, None] * N + n[None, :])
            live = in_p[:, None] & in_n[None, :]
            h, g = tl.load(h_in + at, mask=live, other=0), tl.load(g_in + at, mask=live, other=0)
            both += tl.sum(h.to(real) * g.to(real), 0)
            pairs = product(dyv, tl.trans(xv), DOT, PRECISION)
            if HAS_Z and not EXACT:  # what a gated dy loses would add up in dA
                pairs += product(dyf - dyv.to(real), tl.trans(xv), DOT, PRECISION)
            pairs *= Lm
            T_sum += pairs * step[None, :]
            pairs *= S
            along += tl.sum(pairs, 0)
            pairs *= step[None, :]
            crossed = product(crossing, pairs, DOT, PRECISION)
            if not EXACT:  # the sum must not lose what its terms have
                crossed += product(crossing, pairs - pairs.to(DOT).to(real), DOT, PRECISION)
            inside += tl.sum(tl.where(j < i, crossed, 0.0), 1)
            from_start = product(dyv, h, DOT, PRECISION)
            if HAS_Z and not EXACT:
                from_start += product(dyf - dyv.to(real), h, DOT, PRECISION)
            from_start *= enter[:, None]
            dCv += from_start
            from_h += tl.sum(from_start * Cv.to(real), 1)
            dBv += product(xv, g, DOT, PRECISION) * (step * leave)[:, None]
        to = vectors + vector + tl.arange(0, Q)
        tl.store(to, along)
        tl.store(to + plane, inside)
        tl.store(to + 2 * plane, from_h)
        tl.store(h_to_g + ((first_chunk + local) * K + k) * H + head, through * tl.sum(both, 0))
    T_low = T_sum.to(DOT)
    dCv += product(T_low, Bv, DOT, PRECISION)
    dBv += product(tl.trans(T_low), Cv, DOT, PRECISION)
    to = part * part_size + (((b * L + origin) * K + k) * G + group) * N + (token[:, None] * (K * G * N) + n[None, :])
    store = there[:, None] & in_n[None, :]
    tl.store(dB + to, dBv, mask=store)
    tl.store(dC + to, dCv, mask=store)


@triton.jit
def heads_kernel(x, dy, z, B, C, D, steps, tokens, owner, h_in, g_in, dx, dz, dD, vectors, xs, ys, zs, Bs, Cs, t_b,
                 t_k, d_h, d_p, per_row, first_chunk, plane, K, H, G, L, T, first, sign, P, N, parts, heads_each,
                 TABLE: tl.constexpr, NEAR: tl.constexpr, RESTART: tl.constexpr, PACKED: tl.constexpr,
                 EXACT: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, WIDE_D: tl.constexpr,
                 DOT: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
                 BLOCKS: tl.constexpr):  # fmt: skip
    """dx, dz (B, L, K, H, P). One program a chunk, route, group and part of its heads.

    Of vectors here 3, <x, u> from g, and with one D a head 4, its gradient; a wide dD (chunks, K, H, P).
    """
    pid = tl.program_id(0).to(tl.int64)
    part, group, k = pid % parts, pid // parts % G, pid // parts // G % K
    local = pid // parts // G // K
    b, c = (first_chunk + local) // per_row, (first_chunk + local) % per_row
    n = tl.arange(0, BN)
    in_n = n < N
    real: tl.constexpr = steps.dtype.element_ty
    entry, origin, token, there, _ = read_tokens(tokens + b * t_b + k * t_k, c, T, first, sign, Q, TABLE, NEAR)
    Bv = read_rows(B + b * Bs[0] + k * Bs[2] + group * Bs[3], Bs[1], Bs[4], origin, token, there, n, in_n).to(DOT)
    Cv = read_rows(C + b * Cs[0] + k * Cs[2] + group * Cs[3], Cs[1], Cs[4], origin, token, there, n, in_n).to(DOT)
    S = product(Cv, tl.trans(Bv), DOT, PRECISION)
    begin = group * (H // G) + part * heads_each
    for head in range(begin, tl.minimum(begin + heads_each, (group + 1) * (H // G))):
        vector = (((b * K + k) * H + head) * per_row + c) * Q
        step, high, low, segment, enter, leave, _through = decays(steps + vector, plane, entry, Q, EXACT, RESTART)
        SL = S * mask(S, high, low, segment, Q, EXACT, RESTART)
        to_g, dD_head = tl.zeros([Q], real), tl.zeros([Q], real)
        x_at, dy_at = x + b * xs[0] + k * xs[2] + head * xs[3], dy + b * ys[0] + k * ys[2] + head * ys[3]
        for block in tl.static_range(BLOCKS):  # unrolled, so that the loop over heads is the innermost
            p = block * BP + tl.arange(0, BP)
            in_p = p < P
            xv = read_rows(x_at, xs[1], xs[4], origin, token, there, p, in_p)
            dyv = read_rows(dy_at, ys[1], ys[4], origin, token, there, p, in_p)
            dyf = dyv.to(real)
            if HAS_Z:
                z_at = z + b * zs[0] + head * zs[2]
                gate, sigmoid = gates(z_at, zs[1], zs[3], origin, token, there, p, in_p, real)
                after = dyf
                dyf = dyf * gate * sigmoid
                dyv = dyf
            dyv = dyv.to(DOT)
            xf = xv.to(real)
            at = ((local * K + k) * H + head) * P * N + (p[:, None] * N + n[None, :])
            live = in_p[:, None] & in_n[None, :]
            g = tl.load(g_in + at, mask=live, other=0)
            from_end = product(Bv, tl.trans(g), DOT, PRECISION) * leave[:, None]
            to_g += tl.sum(xf * from_end, 1)
            u = product(tl.trans(SL.to(DOT)), dyv, DOT, PRECISION) + from_end
            u = u * step[:, None]
            if HAS_D:
                skip = tl.load(D + k * H * d_h + head * d_h + p * d_p, mask=in_p, other=0)
                u += skip[None, :] * dyf
                if WIDE_D:
                    to = dD + (((first_chunk + local) * K + k) * H + head) * P + p
                    tl.store(to, tl.sum(dyf * xf, 0), mask=in_p)
                else:
                    dD_head += tl.sum(dyf * xf, 1)
            store = there[:, None] & in_p[None, :]
            out = (((b * L + origin) * K + k) * H + head) * P + (token[:, None] * (K * H * P) + p[None, :])
            tl.store(dx + out, u, mask=store)
            if HAS_Z:
                h = tl.load(h_in + at, mask=live, other=0)
                before = product(Cv, tl.trans(h), DOT, PRECISION) * enter[:, None]
                before += product(SL * step[None, :], xv, DOT, PRECISION)
                if HAS_D:
                    before += skip[None, :] * xf
                tl.store(dz + out, after * before * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=store)
        to = vectors + vector + tl.arange(0, Q)
        tl.store(to + 3 * plane, to_g)
        if HAS_D and not WIDE_D:
            tl.store(to + 4 * plane, dD_head)


@triton.jit
def ddt_kernel(dt, A, dt_bias, tokens, vectors, h_to_g, ddt, dA, dbias, dD, ts, t_b, t_k, per_row, K, H, L, T, first,
               sign, plane, blocks, TABLE: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
               LOW: tl.constexpr, HIGH: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
               HAS_D: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr):  # fmt: skip
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
    from_h = tl.load(at + 2 * plane, mask=known, other=0)
    end = tl.load(at + 3 * plane, mask=known, other=0)
    to_g = step * end
    chunk = ((b * per_row + c) * K + k) * H + head
    da = tl.load(at + plane, mask=known, other=0) + tl.load(h_to_g + chunk, mask=live, other=0)[:, None]
    da += tl.cumsum(from_h, 1, reverse=True) + (tl.cumsum(to_g, 1) - to_g)
    slope = tl.load(at, mask=known, other=0) + end + A_h[:, None] * da
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
        tl.store(dD + chunk, tl.sum(tl.load(at + 4 * plane, mask=known, other=0), 1), mask=live)
