"""What the forward and the backward of the Triton scan share: steps in scan order, and chunks that run at once.

``tokens`` holds the entry of every step of every chunk: the token, -3 - token where the state restarts, -1 for a padding
slot, -2 for no step at all (skipped, or behind the end). So the scans know nothing of routes, reversal or packing. B and C
are laid out step by step beside it: they are small next to x, which is never copied.

``totals_kernel`` finds the decay over each chunk and its end state from zero; ``carry_kernel`` walks over the chunks and
leaves what enters each. Complex numbers are pairs of reals; real scans carry a second value that the compiler drops.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences; T steps of a warp's segment,
W segments of a chunk, BD channels of a program.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.selective_scan.problem import CHUNK, Problem

CH = tl.constexpr(CHUNK)
LOG2E = tl.constexpr(1.4426950408889634)


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
        re, im = tl.load(pointer + 2 * offset, mask=mask, other=0), tl.load(pointer + 2 * offset + 1, mask=mask, other=0)
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
def decay(dt, Ar, Ai, entry, RESTART: tl.constexpr, COMPLEX: tl.constexpr):
    """a_t = exp(dt A), zero where the state restarts."""
    re = tl.exp2(dt * (Ar * LOG2E))
    if RESTART:
        re = tl.where(entry <= -3, 0.0, re)
    im = re
    if COMPLEX:
        im = re * tl.sin(dt * Ai)
        re = re * tl.cos(dt * Ai)
    return re, im


@triton.jit
def softplus(v):
    """log(1 + exp(v)), accurate for small results; v itself beyond 20, as PyTorch's."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e
    rounded = u - 1.0
    log1p = tl.where(rounded > 0.0, tl.log(u) * (e / tl.where(rounded > 0.0, rounded, 1.0)), e)
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + log1p)


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
def compose(a1, h1, a2, h2):
    """h -> a2 (a1 h + h1) + h2."""
    return a1 * a2, a2 * h1 + h2


@triton.jit
def compose_complex(a1r, a1i, h1r, h1i, a2r, a2i, h2r, h2i):
    return (a1r * a2r - a1i * a2i, a1r * a2i + a1i * a2r,
            a2r * h1r - a2i * h1i + h2r, a2r * h1i + a2i * h1r + h2i)  # fmt: skip


@triton.jit
def join(pr, pi, hr, hi, COMPLEX: tl.constexpr):
    """Decay and end state from the first to each segment (axis 0)."""
    if COMPLEX:
        pr, pi, hr, hi = tl.associative_scan((pr, pi, hr, hi), 0, compose_complex)
    else:
        pr, hr = tl.associative_scan((pr, hr), 0, compose)
    return pr, pi, hr, hi


@triton.jit
def shifted(after, carry, order):
    """What enters each segment: what left the one before it, the carry for the first. order: a segment's turn."""
    return tl.where(order == 0, carry, tl.gather(after, tl.maximum(order - 1, 0), 0))


@triton.jit
def totals_kernel(x, dt, A, X, dy, z, dt_bias, tokens, ends, products,
                  x_b, x_l, x_k, x_d, dt_b, dt_l, dt_k, dt_d, z_b, z_l, z_d, dy_k, t_b, t_k,
                  per_row, K, channels, G, blocks, N, L, first, sign,
                  HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, CONST: tl.constexpr, RESTART: tl.constexpr,
                  AT_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr,
                  T: tl.constexpr, W: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """ends, products (slots, K, N, D): h = a h + X x dt over each chunk from zero (X is B), and the product of its decays.

    ADJOINT walks backwards with r = conj(a) (r + dy conj(X)), X is C: what the chunk hands to the one before it.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, g, k, slot = pid % blocks, pid // blocks % G, pid // blocks // G % K, pid // blocks // G // K
    w = tl.arange(0, W)[:, None] + tl.zeros([W, BD], tl.int32)
    d = (g * (channels // G) + block * BD + tl.arange(0, BD))[None, :] + tl.zeros([W, BD], tl.int64)
    live = d < (g + 1) * (channels // G)
    real: tl.constexpr = A.dtype.element_ty
    bias = tl.zeros([W, BD], real)
    if HAS_BIAS:
        bias = tl.load(dt_bias + k * channels + d, mask=live, other=0).to(real)
    b, c = slot // per_row, slot % per_row
    steps = tokens + b * t_b + k * t_k + c * CH
    x_off, dt_off = b * x_b + k * x_k + d * x_d, b * dt_b + k * dt_k + d * dt_d
    entries, dts, inputs = (), (), ()
    for i in tl.static_range(T):
        j = CH - 1 - (w * T + i) if ADJOINT else w * T + i
        place = first + sign * (c * CH + j)
        entry, token, value, _, step = read_step(
            x, dt, steps, x_l, dt_l, x_off, dt_off, bias, place, live, j, AT_TOKEN, SOFTPLUS)  # fmt: skip
        if ADJOINT:
            mask = live & (token >= 0)
            value = read_dy(dy, z, ((b * L + token) * dy_k + k % dy_k) * channels + d, b * z_b + token * z_l + d * z_d,
                            mask, real, HAS_Z)[0]  # fmt: skip
        else:
            value = value * step
        entries, dts, inputs = entries + (entry,), dts + (step,), inputs + (value,)
    Xs = X + ((slot * K + k) * G + g) * (2 * N if COMPLEX else N) * CH
    for n in range(N):
        Ar, Ai = load_number(A, (k * N + n) * channels + d, live, COMPLEX)
        if CONST:
            Xr, Xi = load_number(X, (k * N + n) * channels + d, live, COMPLEX)
        lr, li = tl.zeros([W, BD], real), tl.zeros([W, BD], real)
        pr, pi = tl.full([W, BD], 1.0, real), tl.zeros([W, BD], real)
        for i in tl.static_range(T):
            j = CH - 1 - (w * T + i) if ADJOINT else w * T + i
            ar, ai = decay(dts[i], Ar, Ai, entries[i], RESTART, COMPLEX)
            if not CONST:
                Xr, Xi = load_step(Xs, n, j, real, COMPLEX)
            if ADJOINT:
                ai = -ai
                fr, fi = feedback(inputs[i], Xr, Xi, COMPLEX)
                lr, li = times(ar, ai, lr + fr, li + fi, COMPLEX)
            else:
                lr, li = times(ar, ai, lr, li, COMPLEX)
                lr, li = lr + inputs[i] * Xr, li + inputs[i] * Xi
            pr, pi = times(ar, ai, pr, pi, COMPLEX)
        pr, pi, lr, li = join(pr, pi, lr, li, COMPLEX)
        out, last = ((slot * K + k) * N + n) * channels + d, live & (w == W - 1)
        store_number(ends, out, lr, li, last, COMPLEX)
        store_number(products, out, pr, pi, last, COMPLEX)


@triton.jit
def carry_kernel(ends, products, initial, final, cu_seqlens, per_row, K, N, channels,
                 HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, ADJOINT: tl.constexpr, COMPLEX: tl.constexpr,
                 UNROLL: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """Puts what enters each chunk in the place of ends (slots, K, N, D), what leaves the last in final (S, K, D, N)."""
    s = tl.program_id(0).to(tl.int64)
    size = K * N * channels
    e = tl.program_id(1).to(tl.int64) * BE + tl.arange(0, BE)
    live = e < size
    d, n, k = e % channels, e // channels % N, e // channels // N
    slot, chunks = s * per_row, per_row
    if PACKED:
        start, stop = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1)
        slot, chunks = start // CH + s, (stop - start + CH - 1) // CH
    state = ((s * K + k) * channels + d) * N + n
    hr = tl.zeros([BE], ends.dtype.element_ty)
    hi = hr
    if HAS_INITIAL:
        hr, hi = load_number(initial, state, live, COMPLEX)
    for c in range(0, chunks, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):  # loads first: they don't wait for each other
            turn = c + i
            at = (slot + (chunks - 1 - turn if ADJOINT else turn)) * size + e
            mask = live & (turn < chunks)
            rows = rows + ((load_number(ends, at, mask, COMPLEX), load_number(products, at, mask, COMPLEX), at, mask),)
        for i in tl.static_range(UNROLL):
            end, product, at, mask = rows[i]
            store_number(ends, at, hr, hi, mask, COMPLEX)
            nr, ni = times(product[0], product[1], hr, hi, COMPLEX)
            hr, hi = tl.where(mask, nr + end[0], hr), tl.where(mask, ni + end[1], hi)
    store_number(final, state, hr, hi, live, COMPLEX)


def device_of(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def segment(p: Problem) -> int:
    """T: 16 steps a warp where a number fits one register, 8 for float64 and complex ones."""
    return 16 if p.state_dtype == torch.float32 else 8


def interleaved(t: Tensor) -> Tensor:
    """A tensor the kernels can read: complex numbers as pairs of reals."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def constant(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A, or a constant B or C: (K, D, N) to (K, N, D), complex as pairs."""
    return interleaved(t.to(dtype).transpose(1, 2).contiguous())


@dataclass(frozen=True)
class Plan:
    """A problem laid out for the kernels, and the arguments that they share.

    Attributes:
        p: The problem.
        segment: T, steps of one warp.
    """

    p: Problem
    segment: int

    @cached_property
    def per_row(self) -> int:
        """Chunks of one row of tokens; all of them if sequences are packed."""
        return self.p.slots if self.p.cu_seqlens is not None else -(-self.p.positions // CHUNK)

    @property
    def width(self) -> int:
        """BD, channels of a program: a warp's width, less where a group has few."""
        return 32 if self.p.channels // self.p.groups > 16 else 16

    @property
    def blocks(self) -> int:
        """Programs that share the channels of a group."""
        return triton.cdiv(self.p.channels // self.p.groups, self.width)

    @cached_property
    def tokens(self) -> Tensor:
        """The entry of each step, ``(B or 1, K or 1, per_row * CHUNK)`` int32."""
        p, rows = self.p, 1 if self.p.code is None else self.p.batch
        routes = 1 if p.route is None else p.routes
        tokens = torch.empty((rows, routes, self.per_row * CHUNK), dtype=torch.int32, device=p.x.device)
        route, code = (t if t is None else t.contiguous() for t in (p.route, p.code))
        tokens_kernel[(rows * routes * self.per_row,)](
            route, code, p.cu_seqlens, tokens, p.positions, routes, self.per_row, p.sequences,
            p.sequences.bit_length() + 1, ROUTE=route is not None, CODE=code is not None,
            PACKED=p.cu_seqlens is not None, REVERSE=p.reverse,
        )  # fmt: skip
        return tokens

    @property
    def order(self) -> dict[str, Any]:
        """How steps, tokens and positions belong together."""
        rows, routes, size = self.tokens.shape
        last = self.p.positions - 1
        return {
            "t_b": routes * size if rows > 1 else 0, "t_k": size if routes > 1 else 0, "per_row": self.per_row,
            "first": last if self.p.reverse else 0, "sign": -1 if self.p.reverse else 1,
            "AT_TOKEN": self.p.route is None or self.p.route_params,
        }  # fmt: skip

    def by_step(self, t: Tensor) -> Tensor:
        """B or C in scan order ``(slots, K, G, N, CHUNK)``, N twice as long for complex; a constant one as A."""
        p = self.p
        if t.ndim == 3:
            return constant(t, p.state_dtype)
        t = interleaved(t).flatten(4)
        parts = t.shape[4]
        out = torch.empty((p.slots, p.routes, p.groups, parts, CHUNK), dtype=t.dtype, device=t.device)
        block = min(16, triton.next_power_of_2(parts))
        by_step_kernel[(p.slots * p.routes * p.groups, triton.cdiv(parts, block))](
            t, self.tokens, out, *t.stride(), K=p.routes, G=p.groups, N=parts, BN=block, **self.order
        )
        return out

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Arguments of every scan kernel: x, dt, their strides, sizes and flags."""
        p, x, dt, bias = self.p, self.p.x, self.p.dt, self.p.dt_bias
        z = (0, 0, 0) if p.z is None else p.z.stride()
        return {
            "x": x, "dt": dt, "A": constant(p.A, p.state_dtype), "z": p.z, "tokens": self.tokens,
            "dt_bias": bias if bias is None else bias.contiguous(),
            "x_b": x.stride(0), "x_l": x.stride(1), "x_k": x.stride(2) if x.shape[2] > 1 else 0, "x_d": x.stride(3),
            "dt_b": dt.stride(0), "dt_l": dt.stride(1), "dt_k": dt.stride(2), "dt_d": dt.stride(3),
            "z_b": z[0], "z_l": z[1], "z_d": z[2], "K": p.routes, "channels": p.channels, "G": p.groups,
            "blocks": self.blocks, "N": p.state, "L": p.length, "HAS_Z": p.z is not None, "HAS_BIAS": bias is not None,
            "RESTART": p.code is not None, "SOFTPLUS": p.dt_softplus, "COMPLEX": p.is_complex,
            "T": self.segment, "W": CHUNK // self.segment, "BD": self.width, "num_warps": CHUNK // self.segment,
            **self.order,
        }  # fmt: skip

    @property
    def programs(self) -> int:
        """Programs of one chunk or sequence."""
        return self.p.routes * self.p.groups * self.blocks

    def totals(self, source: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """End state from zero, and decay, of every chunk ``(slots, K, N, D)``; with dy those of the adjoint scan."""
        p = self.p
        ends, products = (self.states(p.slots, p.routes, p.state, p.channels) for _ in range(2))
        totals_kernel[(p.slots * self.programs,)](
            X=source, dy=dy, ends=interleaved(ends), products=interleaved(products), dy_k=1 if dy is None else dy.shape[2],
            CONST=(p.B if dy is None else p.C).ndim == 3, ADJOINT=dy is not None, **self.inputs,
        )  # fmt: skip
        return ends, products

    def carry(self, ends: Tensor, products: Tensor, initial: Tensor | None, adjoint: bool) -> Tensor:
        """Turns ``ends`` into what enters each chunk; returns what leaves the last, ``(S, K, D, N)``."""
        p = self.p
        final = self.states(p.sequences, p.routes, p.channels, p.state)
        initial = None if initial is None else interleaved(initial.to(p.state_dtype).contiguous())
        carry_kernel[(p.sequences, triton.cdiv(p.routes * p.state * p.channels, 32))](
            interleaved(ends), interleaved(products), initial, interleaved(final), p.cu_seqlens, self.per_row, p.routes,
            p.state, p.channels, HAS_INITIAL=initial is not None, PACKED=p.cu_seqlens is not None, ADJOINT=adjoint,
            COMPLEX=p.is_complex, UNROLL=8 if p.is_complex else 16, BE=32, num_warps=1,
        )  # fmt: skip
        return final

    def states(self, *size: int) -> Tensor:
        """Memory for states."""
        return torch.empty(size, dtype=self.p.state_dtype, device=self.p.x.device)
