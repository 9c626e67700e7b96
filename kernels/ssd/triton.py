"""``ssd`` on GPUs, forward, in plain Triton. The backward is in ``triton_backward.py``.

A program takes a head (or BP of its P columns) and walks the chunks of a row with the state in registers: C B^T under
the structured mask times x, plus C times the state, then the state's update. No state is written to memory, except
where a row is cut: into segments (``triton_states.py``) if heads are few and sequences long, or at the borders of even
shares of all chunks if rows and heads are more than fit at a time. Where the layout allows it
(``triton_boxes.py``), tiles come and go by bulk copies (TMA) instead of by their elements' addresses.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kernels.checks import owned
from kernels.selective_scan.outputs import fresh
from kernels.selective_scan.triton_plan import device_of
from kernels.ssd import triton_backward
from kernels.ssd.problem import Problem
from kernels.ssd.triton_boxes import rows_box, with_even_rows
from kernels.ssd.triton_gate import ungate
from kernels.ssd.triton_plan import Plan
from kernels.ssd.triton_sizes import Sizes
from kernels.ssd.triton_steps import decays, gates, product, read_rows, read_tokens, skips, weighted_mask

if TYPE_CHECKING:
    from kernels.ssd import Gradients

__all__ = ["backward", "forward"]


# A length known to be 1 leaves no loop, and ptxas 12.8 then takes parts of addresses of tiles from registers never set.
@triton.jit(do_not_specialize=["length"])
def forward_kernel(x, z, B, C, x_box, B_box, C_box, y_box, D, steps, tokens, owner, initial, enter_from, final, y,
                   ready, handed, xs, zs, Bs, Cs, t_b, t_k, d_h, units, segments, length, per_row, plane, K, H, G, L, T,
                   first, sign, P, N, blocks, SHARED: tl.constexpr, TABLE: tl.constexpr, NEAR: tl.constexpr,
                   RESTART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr,
                   FULL: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, WIDE_D: tl.constexpr,
                   HAS_INITIAL: tl.constexpr, HAS_ENTER: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
                   PRECISION: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """y (B, L, K, H, P) and the final states. A unit is a row, route, head and block of P; a program takes a segment of
    one or, SHARED, so many chunks (``length``) of all units, laid one behind the other: first the start of the unit
    that it leaves unfinished, last the rest of the one before it, whose state has been ``handed`` over by then.
    """
    if PDL:
        gdc_wait()
    pid = tl.program_id(0).to(tl.int64)
    first_unit, turns, end = pid, 1, 0
    if SHARED:
        first_unit, end = pid * length // per_row, tl.minimum((pid + 1) * length, units * per_row)
        turns = tl.cdiv(end, per_row) - first_unit
    for turn in range(turns):
        unit = first_unit + (turns - 1 - turn)
        block, head, k = unit % blocks, unit // blocks % H, unit // blocks // H % K
        number = unit // blocks // H // K
        b, s = number // segments, number % segments
        begin, stop = s * length, tl.minimum((s + 1) * length, per_row)
        if SHARED:
            begin, stop = tl.maximum(pid * length - unit * per_row, 0), tl.minimum(end - unit * per_row, per_row)
        p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
        in_p, in_n = p < P, n < N
        # The state is (N, P), so that C h reads it as it is.
        live, tile = in_n[:, None] & in_p[None, :], p[None, :] * N + n[:, None]
        real: tl.constexpr = steps.dtype.element_ty
        if HAS_D:
            skip = skips(D + (k * H + head) * d_h, p, in_p, WIDE_D)
        matrix, heads = (k * H + head) * P * N, K * H * P * N
        group = head // (H // G)
        x_at, steps_at = x + b * xs[0] + k * xs[2] + head * xs[3], steps + ((b * K + k) * H + head) * per_row * Q
        B_at, C_at = B + b * Bs[0] + k * Bs[2] + group * Bs[3], C + b * Cs[0] + k * Cs[2] + group * Cs[3]
        tokens_at = tokens + b * t_b + k * t_k
        h = tl.zeros([BN, BP], real)
        if HAS_ENTER:
            h = tl.load(enter_from + number * heads + matrix + tile, mask=live, other=0)
        whole = tl.arange(0, BN)[:, None] * BP + tl.arange(0, BP)[None, :]
        if SHARED and begin > 0:  # programs start in their order, and wait for none that comes later
            while tl.atomic_add(ready + pid - 1, 0, sem="acquire") == 0:
                pass
            h = tl.load(handed + (pid - 1) * BN * BP + whole, cache_modifier=".cg")
        for c in range(begin, stop):
            if PACKED:
                sequence, before, after = tl.load(owner + 1 + c), tl.load(owner + c), tl.load(owner + 2 + c)
                border = (sequence >= 0) & (sequence != before)
                new = tl.zeros_like(h)
                if HAS_INITIAL:
                    new = tl.load(initial + sequence * heads + matrix + tile, mask=live & border, other=0)
                h = tl.where(border, new, h)
            entry, origin, token, there, _ = read_tokens(tokens_at, c, T, first, sign, Q, TABLE, NEAR)
            step, high, low, segment, enter, _leave, weight, through = decays(steps_at + c * Q, plane, entry, Q, EXACT,
                                                                             FOLDED, RESTART)  # fmt: skip
            if TMA:  # the tensors as matrices of tokens
                line = (b * L + c * Q).to(tl.int32)
                xv = x_box.load([line, (head * P + block * BP).to(tl.int32)])
                Bv, Cv = B_box.load([line, (group * N).to(tl.int32)]), C_box.load([line, (group * N).to(tl.int32)])
            else:
                xv = read_rows(x_at, xs[1], xs[4], origin, token, there, p, in_p, FULL)
                Bv = read_rows(B_at, Bs[1], Bs[4], origin, token, there, n, in_n, FULL).to(DOT)
                Cv = read_rows(C_at, Cs[1], Cs[4], origin, token, there, n, in_n, FULL).to(DOT)
            scores = product(Cv, tl.trans(Bv), DOT, PRECISION)
            scores = (scores * weighted_mask(step, high, low, segment, Q, EXACT, FOLDED, RESTART)).to(DOT)
            out = product(Cv, h, DOT, PRECISION) * enter[:, None]
            out = product(scores, xv, DOT, PRECISION, out)
            xf = xv.to(real)
            h = product(tl.trans(Bv), xf * weight[:, None], DOT, PRECISION, h * through)
            if HAS_D:
                out += skip * xf
            if HAS_Z:
                z_at = z + b * zs[0] + head * zs[2]
                gate, sigmoid = gates(z_at, zs[1], zs[3], origin, token, there, p, in_p, FULL, real)
                out *= gate * sigmoid
            rounded = out.to(y.dtype.element_ty)
            to = y + ((b * L + origin) * K * H + k * H + head) * P + (token[:, None] * (K * H * P) + p[None, :])
            if TMA:
                if c < per_row:  # always: copies of the next chunk are under way before what stands in a condition
                    y_box.store([line, (head * P + block * BP).to(tl.int32)], rounded)
            elif FULL:
                tl.store(to, rounded)
            else:
                tl.store(to, rounded, mask=there[:, None] & in_p[None, :])
            if PACKED:
                leaves = (sequence >= 0) & (sequence != after)
                tl.store(final + sequence * heads + matrix + tile, h, mask=live & leaves)
        if not PACKED:
            tl.store(final + b * heads + matrix + tile, h, mask=live & (stop == per_row))
        if SHARED and stop < per_row:
            tl.store(handed + pid * BN * BP + whole, h)
            tl.debug_barrier()  # all threads have stored
            tl.atomic_xchg(ready + pid, 1, sem="release")


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Runs the scan: y ``(B, L, [K,] H, P)`` in x's dtype and the final state ``(S, K, H, P, N)``."""
    with device_of(p.x):
        return _forward(with_even_rows(p))


def _forward(p: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``forward``, with y in another dtype if one is given."""
    merging, dtype = p.merge and p.routes > 1, p.x.dtype if dtype is None else dtype
    y = fresh(p, (p.batch, p.length, p.routes, p.heads, p.head_dim), p.dtype if merging else dtype)
    plan = Plan(p)
    final = plan.states(p.sequences)
    if p.cu_seqlens is not None or not plan.per_row:  # that of an empty sequence is its initial state
        final.copy_(p.initial_state) if p.initial_state is not None else final.zero_()
    if plan.programs and plan.rows:
        segments, units = plan.segments, plan.rows * plan.programs
        enter = plan.entering(segments)[0]
        tensors = {
            **plan.shared, "y_box": rows_box(y, plan.chunk, plan.width) if plan.boxed else None, "y": y, "z": p.z,
            "final": final, "enter_from": enter, "D": plan.D, "initial": plan.initial, "ready": plan.ready,
            "handed": plan.handed,
        }  # fmt: skip
        plan.launch(
            forward_kernel, (plan.sharers or units * segments.count,), tensors,
            lambda: plan.shared_numbers | {
                "HAS_ENTER": enter is not None, **plan.d_numbers, "SHARED": plan.share > 0,
                "HAS_INITIAL": plan.initial is not None, "units": units, "segments": segments.count,
                "length": plan.share or segments.length, "L": p.length, "num_warps": plan.warps,
                "num_stages": plan.stages, "TMA": plan.boxed, "HAS_Z": p.z is not None,
                "zs": (0, 0, 0, 0) if p.z is None else p.z.stride(), **plan.early,
            },
        )  # fmt: skip
    if merging:
        return y.sum(2).to(dtype), final
    keep = () if p.route is None or p.merge else (p.routes,)
    return owned(y, (p.batch, p.length, *keep, p.heads, p.head_dim)), final


def backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    """Gradients of ``forward``: first those of the gate, from y as it was before it, then those of the scan.

    Args:
        p: The problem that forward solved.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, H, P, N)``, or None.
    """
    if p.z is None:
        return triton_backward.backward(p, dy, dstate)
    with device_of(p.x):
        p = with_even_rows(p)
        again, scan = (replace(p, z=None, plan=p.plan.setdefault(name, {})) for name in ("again", "scan"))
        low = Sizes(again).product_dtype == torch.bfloat16
        y = _forward(again, p.x.dtype if low else p.dtype)[0]
        dz = ungate(p, y, dy)
    return triton_backward.backward(scan, y, dstate)._replace(z=dz)
