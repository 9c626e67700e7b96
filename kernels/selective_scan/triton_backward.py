"""The selective scan on GPUs, backward. Plain Triton, all chunks at once.

With q_t = a_t h_{t-1} (never h_t - b_t, which cancels), dy before the gate and x* the conjugate:

    G_t = dy_t C_t* + a_{t+1}* G_{t+1}                      (twice dy for complex, as y = 2 Re <C, h>)
    dC_t = dy_t h_t*,   dB_t = dt_t x_t G_t,   dA = sum_t dt_t q_t* G_t
    u_t = sum_n Re(B_t* G_t),   dx_t = dt_t u_t + D dy_t,   ddt_t = x_t u_t + sum_n Re((A q_t)* G_t)

The states at the chunks' starts come from the forward, the adjoints at their ends from a pass over the chunks
backwards (``Plan.totals`` and ``Plan.carry``). In between a chunk's W warps walk their segments both ways, as in the
forward. dB and dC are summed over a program's channels and written beside those of the other programs; ``rows_kernel``
adds them in a fixed order.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences, BD channels of a program.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
# ruff: noqa: RUF005  Triton grows tuples by +, it has no starred expressions
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.selective_scan.outputs import MapGradients
from kernels.selective_scan.problem import CHUNK, Problem
from kernels.selective_scan.triton_plan import Plan, device_of, interleaved
from kernels.selective_scan.triton_steps import (
    CH,
    decay,
    feedback,
    join,
    load_number,
    load_step,
    read_dy,
    read_step,
    softplus_slope,
    store_number,
    times,
)  # fmt: skip

if TYPE_CHECKING:
    from kernels.selective_scan import Gradients

WORKSPACE = 256 << 20  # bytes for the parts of dB and dC; more channel blocks than fit take turns


@triton.jit
def store_sums(pointer, number, re, im, column, live, w,
               T: tl.constexpr, CONST: tl.constexpr, COMPLEX: tl.constexpr):  # fmt: skip
    """Sums of a program for dB or dC: of a state's CH steps, or, where it is constant, of each channel."""
    if CONST:
        re = tl.sum(re, 1, keep_dims=True) + tl.zeros_like(re)
        im = tl.sum(im, 1, keep_dims=True) + tl.zeros_like(im) if COMPLEX else re
        store_number(pointer, number, re, im, live & (w == 0), COMPLEX)
    else:
        steps = w * T + column
        tl.store(pointer + (2 * number if COMPLEX else number) * CH + steps, re, mask=column < T)
        if COMPLEX:
            tl.store(pointer + (2 * number + 1) * CH + steps, im, mask=column < T)


@triton.jit
def add_step(sr, si, re, im, column, i, CONST: tl.constexpr, COMPLEX: tl.constexpr):
    """Puts step i's sum over the channels in lane i; adds up over the steps where B or C is constant."""
    if CONST:
        sr, si = sr + re, si + im
    else:
        sr = tl.where(column == i, tl.sum(re, 0, keep_dims=True), sr)
        si = tl.where(column == i, tl.sum(im, 0, keep_dims=True), si) if COMPLEX else sr
    return sr, si


@triton.jit
def backward_kernel(x, dt, A, B, C, D, z, dt_bias, dy, tokens, saved, adjoint, dx, ddt, dz, dA, dB, dC, dD, dbias,
                    x_b, x_l, x_k, x_d, dt_b, dt_l, dt_k, dt_d, z_b, z_l, z_d, dy_k, t_b, t_k,
                    per_row, slots, K, channels, G, first_block, blocks, N, L, first, sign,
                    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, CONST_B: tl.constexpr,
                    CONST_C: tl.constexpr, RESTART: tl.constexpr, AT_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr,
                    COMPLEX: tl.constexpr, T: tl.constexpr, W: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """One program a chunk, route and channel block. dA, dD and dbias are written chunk by chunk."""
    pid = tl.program_id(0).to(tl.int64)
    part, g, k, slot = pid % blocks, pid // blocks % G, pid // blocks // G % K, pid // blocks // G // K
    w = tl.arange(0, W)[None, :] + tl.zeros([BD, W], tl.int32)
    column = tl.arange(0, BD)[:, None] + tl.zeros([BD, W], tl.int32)
    d = (g * (channels // G) + (first_block + part) * BD + column).to(tl.int64)
    live = d < (g + 1) * (channels // G)
    real: tl.constexpr = A.dtype.element_ty
    zero = tl.zeros([BD, W], real)
    bias, Dd = zero, zero
    if HAS_BIAS:
        bias = tl.load(dt_bias + k * channels + d, mask=live, other=0).to(real)
    if HAS_D:
        Dd = tl.load(D + k * channels + d, mask=live, other=0).to(real)
    b, c = slot // per_row, slot % per_row
    steps = tokens + b * t_b + k * t_k + c * CH
    x_off, dt_off = b * x_b + k * x_k + d * x_d, b * dt_b + k * dt_k + d * dt_d
    entries, dts, xs, dys, us, vs, ys = (), (), (), (), (), (), ()
    for i in tl.static_range(T):
        j = w * T + i
        place = first + sign * (c * CH + j)
        entry, token, xv, _, step = read_step(
            x, dt, steps, x_l, dt_l, x_off, dt_off, bias, place, live, j, AT_TOKEN, SOFTPLUS)  # fmt: skip
        dy_off, z_off = ((b * L + token) * dy_k + k % dy_k) * channels + d, b * z_b + token * z_l + d * z_d
        entries, dts, xs, us, vs = entries + (entry,), dts + (step,), xs + (xv,), us + (zero,), vs + (zero,)
        dys = dys + (read_dy(dy, z, dy_off, z_off, live & (token >= 0), real, HAS_Z)[0],)
        ys = ys + (Dd * xv,)
    parts = 2 * N if COMPLEX else N
    rows = ((slot * K + k) * G + g) * parts * CH
    group = (((part * slots + slot) * K + k) * G + g) * parts * CH
    for n in range(N):
        Ar, Ai = load_number(A, (k * N + n) * channels + d, live, COMPLEX)
        state = ((slot * K + k) * N + n) * channels + d
        cr, ci = load_number(saved, state, live, COMPLEX)
        er, ei = load_number(adjoint, state, live, COMPLEX)
        if CONST_B:
            Br, Bi = load_number(B, (k * N + n) * channels + d, live, COMPLEX)
        if CONST_C:
            Cr, Ci = load_number(C, (k * N + n) * channels + d, live, COMPLEX)
        decays = ()
        hr, hi, pr, pi = zero, zero, zero + 1.0, zero
        for i in tl.static_range(T):
            ar, ai = decay(dts[i], Ar, Ai, entries[i], RESTART, COMPLEX)
            if not CONST_B:
                Br, Bi = load_step(B + rows, n, w * T + i, real, COMPLEX)
            hr, hi = times(ar, ai, hr, hi, COMPLEX)
            hr, hi = hr + dts[i] * xs[i] * Br, hi + dts[i] * xs[i] * Bi
            pr, pi = times(ar, ai, pr, pi, COMPLEX)
            decays = decays + ((ar, ai),)
        rr, ri = zero, zero
        for i in tl.static_range(T - 1, -1, -1):
            if not CONST_C:
                Cr, Ci = load_step(C + rows, n, w * T + i, real, COMPLEX)
            fr, fi = feedback(dys[i], Cr, Ci, COMPLEX)
            rr, ri = times(decays[i][0], -decays[i][1], rr + fr, ri + fi, COMPLEX)
        # the segments' turn in the adjoint scan is the reverse of that in the forward scan
        turn = W - 1 - w
        prf, rr = tl.gather(pr, turn, 1), tl.gather(rr, turn, 1)
        pif, ri = (-tl.gather(pi, turn, 1), tl.gather(ri, turn, 1)) if COMPLEX else (prf, rr)
        _, _, rr, ri = join(prf, pif, rr, ri, er, ei, COMPLEX)
        rr = tl.gather(rr, turn, 1)
        ri = tl.gather(ri, turn, 1) if COMPLEX else rr
        _, _, hr, hi = join(pr, pi, hr, hi, cr, ci, COMPLEX)
        before, sums, cr, ci = (), (), zero, zero
        for i in tl.static_range(T):
            if not CONST_B:
                Br, Bi = load_step(B + rows, n, w * T + i, real, COMPLEX)
            if not CONST_C:
                Cr, Ci = load_step(C + rows, n, w * T + i, real, COMPLEX)
            qr, qi = times(decays[i][0], decays[i][1], hr, hi, COMPLEX)
            hr, hi = qr + dts[i] * xs[i] * Br, qi + dts[i] * xs[i] * Bi
            fr, fi = feedback(dys[i], hr, hi, COMPLEX)
            cr, ci = add_step(cr, ci, fr, fi, column, i, CONST_C, COMPLEX)
            before = before + ((qr, qi),)
            sums = sums + (ys[i] + (2.0 * (hr * Cr - hi * Ci) if COMPLEX else hr * Cr),)
        ys = sums
        to_C, number = (dC, state) if CONST_C else (dC + group, n)
        store_sums(to_C, number, cr, ci, column, live, w, T, CONST_C, COMPLEX)
        br, bi, er, ei = zero, zero, zero, zero
        backward_us, backward_vs = (), ()
        for i in tl.static_range(T - 1, -1, -1):
            if not CONST_B:
                Br, Bi = load_step(B + rows, n, w * T + i, real, COMPLEX)
            if not CONST_C:
                Cr, Ci = load_step(C + rows, n, w * T + i, real, COMPLEX)
            fr, fi = feedback(dys[i], Cr, Ci, COMPLEX)
            Gr, Gi = rr + fr, ri + fi
            br, bi = add_step(br, bi, dts[i] * xs[i] * Gr, dts[i] * xs[i] * Gi, column, i, CONST_B, COMPLEX)
            qr, qi = times(before[i][0], -before[i][1], Gr, Gi, COMPLEX)  # q* G
            er, ei = er + dts[i] * qr, ei + dts[i] * qi
            backward_us = (us[i] + (Br * Gr + Bi * Gi if COMPLEX else Br * Gr),) + backward_us
            backward_vs = (vs[i] + (Ar * qr + Ai * qi if COMPLEX else Ar * qr),) + backward_vs
            rr, ri = times(decays[i][0], -decays[i][1], Gr, Gi, COMPLEX)
        us, vs = backward_us, backward_vs
        to_B, number = (dB, state) if CONST_B else (dB + group, n)
        store_sums(to_B, number, br, bi, column, live, w, T, CONST_B, COMPLEX)
        store_sums(dA, state, er, ei, column, live, w, T, True, COMPLEX)
    dDs, dbiases = zero, zero
    for i in tl.static_range(T):
        j = w * T + i
        place = first + sign * (c * CH + j)
        entry, token, xv, raw, step = read_step(
            x, dt, steps, x_l, dt_l, x_off, dt_off, bias, place, live, j, AT_TOKEN, SOFTPLUS)  # fmt: skip
        mask = live & (token >= 0)
        row = token if AT_TOKEN else place
        slope = xv * us[i] + vs[i]
        if SOFTPLUS:
            slope = slope * softplus_slope(raw)
        slope = tl.where(live & (entry != -2), slope, 0.0)
        dDs, dbiases = dDs + dys[i] * xv, dbiases + slope
        out = ((b * L + token) * K + k) * channels + d
        tl.store(dx + out, step * us[i] + Dd * dys[i], mask=mask)
        tl.store(ddt + ((b * L + row) * K + k) * channels + d, slope, mask=mask)
        if HAS_Z:
            dy_off, z_off = ((b * L + token) * dy_k + k % dy_k) * channels + d, b * z_b + token * z_l + d * z_d
            _, after, gate, sigmoid = read_dy(dy, z, dy_off, z_off, mask, real, HAS_Z)
            tl.store(dz + out, after * ys[i] * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=mask)
    chunk = (slot * K + k) * channels + d
    if HAS_D:
        store_sums(dD, chunk, dDs, dDs, column, live, w, T, True, False)
    if HAS_BIAS:
        store_sums(dbias, chunk, dbiases, dbiases, column, live, w, T, True, False)


@triton.jit
def rows_kernel(sums, tokens, out, t_b, t_k, per_row, slots, blocks, K, G, N, L, first, sign,
                AT_TOKEN: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """out (B, L, K, G, N) from sums (blocks, slots, K, G, N, CHUNK): blocks added up, steps back at their tokens."""
    pid = tl.program_id(0).to(tl.int64)
    g, k, slot = pid % G, pid // G % K, pid // G // K
    b, c = slot // per_row, slot % per_row
    n, j = tl.program_id(1) * BN + tl.arange(0, BN)[:, None], tl.arange(0, CH)[None, :]
    entry = tl.load(tokens + b * t_b + k * t_k + c * CH + j).to(tl.int64)
    token = tl.where(entry <= -3, -3 - entry, entry)
    row = token if AT_TOKEN else first + sign * (c * CH + j)
    mask = (token >= 0) & (n < N)
    to = out + (((b * L + row) * K + k) * G + g) * N + n
    total = tl.zeros([BN, CH], out.dtype.element_ty)
    if ADD:
        total = tl.load(to, mask=mask, other=0)
    for block in range(blocks):
        total += tl.load(sums + ((block * slots * K * G + pid) * N + n) * CH + j, mask=mask, other=0)
    tl.store(to, total, mask=mask)


def backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    """Gradients of ``forward``.

    Args:
        p: The problem that forward solved.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, D, N)``, or None.
        saved: The states that forward saved.
    """
    with device_of(p.x):
        return _backward(p, dy, dstate, saved)


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    from kernels.selective_scan import Gradients

    plan = Plan(p)
    B, C = plan.by_step(p.B), plan.by_step(p.C)
    dy = (dy.unsqueeze(2) if dy.ndim == 3 else dy).contiguous()
    adjoint, products = plan.totals(C, dy)
    dinitial = plan.carry(adjoint, products, dstate, adjoint=True)

    maps = MapGradients.new(p)
    dD, dbias = (
        None if t is None else torch.empty((p.slots, p.routes, p.channels), dtype=p.dtype, device=p.x.device)
        for t in (p.D, p.dt_bias)
    )
    dA = products  # read for the last time by carry
    shared = {
        "B": B, "C": C, "D": None if p.D is None else p.D.contiguous(), "dy": dy, "saved": interleaved(saved),
        "adjoint": interleaved(adjoint), "dx": maps.x, "ddt": maps.dt, "dz": maps.z, "dA": interleaved(dA), "dD": dD,
        "dbias": dbias, "dy_k": dy.shape[2], "slots": p.slots, "HAS_D": p.D is not None, "CONST_B": p.B.ndim == 3,
        "CONST_C": p.C.ndim == 3, **plan.inputs,
    }  # fmt: skip
    dB, dC = _launch(plan, shared)
    return Gradients(
        x=maps.merged_x,
        dt=maps.dt,
        A=dA.sum(0).transpose(1, 2),
        B=dB,
        C=dC,
        D=None if dD is None else dD.sum(0),
        z=maps.merged_z,
        dt_bias=None if dbias is None else dbias.sum(0),
        initial_state=None if p.initial_state is None else dinitial,
    )


def _launch(plan: Plan, shared: dict[str, object]) -> tuple[Tensor, Tensor]:
    """Runs the kernel, as many channel blocks at a time as the workspace holds, and returns dB and dC."""
    p, parts = plan.p, plan.p.state * (2 if plan.p.is_complex else 1)
    each = p.slots * p.routes * p.groups * parts * CHUNK
    turn = max(1, min(plan.blocks, WORKSPACE // max(1, 2 * each * p.dtype.itemsize)))
    grads, sums = [], []
    for t in (p.B, p.C):
        if t.ndim == 3:
            grads.append(plan.states(p.slots, p.routes, p.state, p.channels))
            sums.append(interleaved(grads[-1]))
        else:
            grads.append(torch.zeros(t.shape, dtype=p.state_dtype, device=p.x.device))
            sums.append(torch.empty((turn, each), dtype=p.dtype, device=p.x.device))
    for first in range(0, plan.blocks, turn):
        blocks = min(turn, plan.blocks - first)
        backward_kernel[(p.slots * p.routes * p.groups * blocks,)](
            **shared | {"dB": sums[0], "dC": sums[1], "first_block": first, "blocks": blocks}
        )
        for t, total, part in zip((p.B, p.C), grads, sums, strict=True):
            if t.ndim == 5:
                block = min(16, triton.next_power_of_2(parts))
                rows_kernel[(p.slots * p.routes * p.groups, triton.cdiv(parts, block))](
                    part, plan.tokens, interleaved(total), slots=p.slots, blocks=blocks, K=p.routes, G=p.groups,
                    N=parts, L=p.length, ADD=first > 0, BN=block, **plan.order,
                )  # fmt: skip
    return tuple(g.sum(0).transpose(1, 2) if t.ndim == 3 else g for t, g in zip((p.B, p.C), grads, strict=True))
