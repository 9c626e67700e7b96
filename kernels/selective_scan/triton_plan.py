"""The Triton scan's problem laid out for its kernels, and the passes that let all chunks run at once.

``totals_kernel`` finds the decay over each chunk and its end state from zero; ``carry_kernel`` walks over the chunks
and leaves what enters each. The backward does the same with the adjoint, from the last chunk to the first.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences; T steps of a warp's segment,
W segments of a chunk, BD channels of a program.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
# ruff: noqa: RUF005  Triton grows tuples by +, it has no starred expressions
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
from kernels.selective_scan.triton_steps import (
    CH,
    by_step_kernel,
    decay,
    feedback,
    load_number,
    load_step,
    read_dy,
    read_step,
    scan_segments,
    store_number,
    times,
    tokens_kernel,
)  # fmt: skip

SEGMENT = 8  # T: more steps a warp take registers that hide latency, fewer spend more on the scan over the warps


@triton.jit
def totals_kernel(x, dt, A, X, dy, z, dt_bias, tokens, ends, products,
                  x_b, x_l, x_k, x_d, dt_b, dt_l, dt_k, dt_d, z_b, z_l, z_d, dy_k, t_b, t_k,
                  per_row, K, channels, G, blocks, N, L, first, sign,
                  HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, CONST: tl.constexpr, RESTART: tl.constexpr,
                  AT_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr,
                  T: tl.constexpr, W: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """ends, products (slots, K, N, D): over each chunk h = a h + X x dt from zero (X is B), and the product of its a.

    ADJOINT walks backwards with r = conj(a) (r + dy conj(X)), X is C: what the chunk hands to the one before it.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, g, k, slot = pid % blocks, pid // blocks % G, pid // blocks // G % K, pid // blocks // G // K
    w = tl.arange(0, W)[None, :] + tl.zeros([BD, W], tl.int32)
    d = (g * (channels // G) + block * BD + tl.arange(0, BD))[:, None] + tl.zeros([BD, W], tl.int64)
    live = d < (g + 1) * (channels // G)
    real: tl.constexpr = A.dtype.element_ty
    bias = tl.zeros([BD, W], real)
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
        lr, li = tl.zeros([BD, W], real), tl.zeros([BD, W], real)
        pr, pi = tl.full([BD, W], 1.0, real), tl.zeros([BD, W], real)
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
        pr, pi, lr, li, _, _, _, _ = scan_segments(pr, pi, lr, li, COMPLEX)
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
    """

    p: Problem

    @cached_property
    def per_row(self) -> int:
        """Chunks of one row of tokens; all of them if sequences are packed."""
        return self.p.per_row

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
            "T": SEGMENT, "W": CHUNK // SEGMENT, "BD": self.width, "num_warps": CHUNK // SEGMENT,
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
            X=source, dy=dy, ends=interleaved(ends), products=interleaved(products),
            dy_k=1 if dy is None else dy.shape[2],
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
