"""The selective scan on GPUs, forward. Plain Triton; the backward is in ``triton_backward.py``.

    h_t = a_t h_{t-1} + dt_t B_t x_t,  a_t = exp(dt_t A),  y_t = <C_t, h_t> + D x_t        (Gu & Dao 2023, algorithm 2)

A program takes 32 channels and chunks of 64 steps. Each of its W warps walks its own segment of T steps, one channel a
thread, the states n one after another: from zero first, then, once an associative scan over the warps has joined the
segments, from the true state. Where there are few programs and long sequences, all chunks run at once (SPLIT), from
states that a first pass over the chunks has found. ``triton_steps.py`` explains ``tokens`` and the layout of B and C.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences, BD channels of a program.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
# ruff: noqa: RUF005  Triton grows tuples by +, it has no starred expressions
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.selective_scan.outputs import finished_y, new_y
from kernels.selective_scan.problem import Problem
from kernels.selective_scan.triton_backward import backward
from kernels.selective_scan.triton_plan import Plan, device_of, interleaved
from kernels.selective_scan.triton_steps import (
    CH,
    decay,
    join,
    load_number,
    load_step,
    read_step,
    store_number,
    times,
)  # fmt: skip

__all__ = ["backward", "forward"]


@triton.jit
def forward_kernel(x, dt, A, B, C, D, z, dt_bias, tokens, cu_seqlens, initial, saved, final, y,
                   x_b, x_l, x_k, x_d, dt_b, dt_l, dt_k, dt_d, z_b, z_l, z_d, t_b, t_k,
                   per_row, K, channels, G, blocks, N, L, first, sign,
                   HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
                   CONST_B: tl.constexpr, CONST_C: tl.constexpr, PACKED: tl.constexpr, RESTART: tl.constexpr,
                   AT_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, SPLIT: tl.constexpr,
                   T: tl.constexpr, W: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """y (B, L, K, D), states before the chunks. One program a sequence (SPLIT: chunk), route and channel block."""
    pid = tl.program_id(0).to(tl.int64)
    block, g, k, s = pid % blocks, pid // blocks % G, pid // blocks // G % K, pid // blocks // G // K
    w = tl.arange(0, W)[None, :] + tl.zeros([BD, W], tl.int32)
    d = (g * (channels // G) + block * BD + tl.arange(0, BD))[:, None] + tl.zeros([BD, W], tl.int64)
    live = d < (g + 1) * (channels // G)
    real: tl.constexpr = A.dtype.element_ty
    bias = tl.zeros([BD, W], real)
    if HAS_BIAS:
        bias = tl.load(dt_bias + k * channels + d, mask=live, other=0).to(real)
    begin, end = s, s + 1
    if not SPLIT:
        if PACKED:
            start, length = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1) - tl.load(cu_seqlens + s)
            begin = start // CH + s
            end = begin + (length + CH - 1) // CH
        else:
            begin, end = s * per_row, (s + 1) * per_row
        for n in range(N):
            hr = tl.zeros([BD, W], real)
            hi = hr
            if HAS_INITIAL:
                hr, hi = load_number(initial, ((s * K + k) * channels + d) * N + n, live, COMPLEX)
            one = live & (w == 0)
            store_number(saved, ((begin * K + k) * N + n) * channels + d, hr, hi, one & (begin < end), COMPLEX)
            store_number(final, ((s * K + k) * channels + d) * N + n, hr, hi, one & (begin >= end), COMPLEX)
        tl.debug_barrier()
    for slot in range(begin, end):
        b, c = slot // per_row, slot % per_row
        steps = tokens + b * t_b + k * t_k + c * CH
        x_off, dt_off = b * x_b + k * x_k + d * x_d, b * dt_b + k * dt_k + d * dt_d
        entries, dts, inputs, ys = (), (), (), ()
        for i in tl.static_range(T):
            j = w * T + i
            place = first + sign * (c * CH + j)
            entry, _, xv, _, step = read_step(
                x, dt, steps, x_l, dt_l, x_off, dt_off, bias, place, live, j, AT_TOKEN, SOFTPLUS)  # fmt: skip
            entries, dts, inputs = entries + (entry,), dts + (step,), inputs + (step * xv,)
            skip = tl.zeros([BD, W], real)
            if HAS_D:
                skip = xv * tl.load(D + k * channels + d, mask=live, other=0).to(real)
            ys = ys + (skip,)
        Bs = B + ((slot * K + k) * G + g) * (2 * N if COMPLEX else N) * CH
        Cs = C + ((slot * K + k) * G + g) * (2 * N if COMPLEX else N) * CH
        for n in range(N):
            Ar, Ai = load_number(A, (k * N + n) * channels + d, live, COMPLEX)
            ahead = ((slot * K + k) * N + n) * channels + d
            cr, ci = load_number(saved, ahead, live, COMPLEX)
            if CONST_B:
                Br, Bi = load_number(B, (k * N + n) * channels + d, live, COMPLEX)
            decays, news = (), ()
            lr, li = tl.zeros([BD, W], real), tl.zeros([BD, W], real)
            pr, pi = tl.full([BD, W], 1.0, real), tl.zeros([BD, W], real)
            for i in tl.static_range(T):
                ar, ai = decay(dts[i], Ar, Ai, entries[i], RESTART, COMPLEX)
                if not CONST_B:
                    Br, Bi = load_step(Bs, n, w * T + i, real, COMPLEX)
                br, bi = inputs[i] * Br, inputs[i] * Bi
                lr, li = times(ar, ai, lr, li, COMPLEX)
                lr, li = lr + br, li + bi
                pr, pi = times(ar, ai, pr, pi, COMPLEX)
                decays, news = decays + ((ar, ai),), news + ((br, bi),)
            sr, si, hr, hi = join(pr, pi, lr, li, cr, ci, COMPLEX)
            if not SPLIT:
                last = live & (w == W - 1)
                ahead += K * N * channels
                store_number(saved, ahead, sr, si, last & (slot + 1 < end), COMPLEX)
                store_number(final, ((s * K + k) * channels + d) * N + n, sr, si, last & (slot + 1 == end), COMPLEX)
            if CONST_C:
                Cr, Ci = load_number(C, (k * N + n) * channels + d, live, COMPLEX)
            sums = ()
            for i in tl.static_range(T):
                hr, hi = times(decays[i][0], decays[i][1], hr, hi, COMPLEX)
                hr, hi = hr + news[i][0], hi + news[i][1]
                if not CONST_C:
                    Cr, Ci = load_step(Cs, n, w * T + i, real, COMPLEX)
                sums = sums + (ys[i] + (2.0 * (hr * Cr - hi * Ci) if COMPLEX else hr * Cr),)
            ys = sums
        for i in tl.static_range(T):
            token = tl.where(entries[i] <= -3, -3 - entries[i], entries[i]).to(tl.int64)
            mask, out = live & (token >= 0), ys[i]
            if HAS_Z:
                gate = tl.load(z + b * z_b + token * z_l + d * z_d, mask=mask, other=0).to(real)
                out = out * (gate / (1.0 + tl.exp(-gate)))
            tl.store(y + ((b * L + token) * K + k) * channels + d, out, mask=mask)
        tl.debug_barrier()  # the next chunk's warps read the state that the last warp wrote


def registers(p: Problem) -> dict[str, int]:
    """Three programs fit a multiprocessor of NVIDIA's with 80 registers a thread; wider numbers would spill there."""
    narrow = p.x.is_cuda and torch.version.hip is None and p.state_dtype == torch.float32
    return {"maxnreg": 80} if narrow else {}


def splits(p: Problem, programs: int) -> bool:
    """Whether all chunks run at once. The first pass costs half a scan: only where programs are too few otherwise."""
    cores = torch.cuda.get_device_properties(p.x.device).multi_processor_count if p.x.is_cuda else 128
    return programs < 2 * cores and p.slots >= 4 * p.sequences


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan.

    Returns:
        y ``(B, L, D)`` or ``(B, L, K, D)`` in x's dtype, the final state ``(S, K, D, N)``, and the state before each
        chunk ``(slots, K, N, D)``, zero in slots that belong to no chunk.
    """
    with device_of(p.x):
        return _forward(p)


def _forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    plan = Plan(p)
    B, C = plan.by_step(p.B), plan.by_step(p.C)
    split = splits(p, p.sequences * plan.programs)
    if split:
        saved, products = plan.totals(B)
        final = plan.carry(saved, products, p.initial_state, adjoint=False)
    else:
        saved = plan.states(p.slots, p.routes, p.state, p.channels)
        final = plan.states(p.sequences, p.routes, p.channels, p.state)
        if p.cu_seqlens is not None:
            saved.zero_()
    y = new_y(p)
    initial = None if p.initial_state is None else interleaved(p.initial_state.to(p.state_dtype).contiguous())
    forward_kernel[((p.slots if split else p.sequences) * plan.programs,)](
        B=B, C=C, D=None if p.D is None else p.D.contiguous(), cu_seqlens=p.cu_seqlens, initial=initial,
        saved=interleaved(saved), final=interleaved(final), y=y, HAS_D=p.D is not None, HAS_INITIAL=initial is not None,
        CONST_B=p.B.ndim == 3, CONST_C=p.C.ndim == 3, PACKED=p.cu_seqlens is not None, SPLIT=split,
        **plan.inputs, **registers(p),
    )  # fmt: skip
    return finished_y(p, y), final, saved
