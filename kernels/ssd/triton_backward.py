"""``ssd`` on GPUs, backward: the host side, behind the gate. ``triton_gradients.py`` has the formulas and the kernels.

First ``states_kernel`` walks forwards for h and backwards for g and leaves those of every chunk; then ``chunks_kernel``
takes all chunks at once, each over the heads of a group, which share C B^T and the two products that give dB and dC:
half of its programs do what pairs of positions bring about, the others what the states do, and ``join_kernel`` adds up
both shares of dB and dC. What one program for both would have to hold does not fit into the registers. Last,
``ddt_kernel`` turns what they leave into the gradient of dt.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.selective_scan.outputs import fresh
from kernels.selective_scan.problem import CHUNK as SLOT
from kernels.selective_scan.triton_plan import device_of
from kernels.ssd import triton_plan
from kernels.ssd.problem import Problem
from kernels.ssd.triton_boxes import as_lines, rows_box, states_box, with_even_rows
from kernels.ssd.triton_ddt import ddt_kernel, join_kernel, sums_kernel
from kernels.ssd.triton_gradients import chunks_kernel
from kernels.ssd.triton_plan import Plan
from kernels.ssd.triton_sizes import Segments, cores, power

if TYPE_CHECKING:
    from kernels.ssd import Gradients

TAKEN, JOIN = frozenset(chunks_kernel.arg_names), frozenset(join_kernel.arg_names)
WIDEST = 128  # channels of a head: of wider ones, gradients of dt were wrong on an H200
JOINED = 32  # columns of a program of ``join_kernel``
BOXES = ("g_box", "h_part", "g_part", "C_part")


def backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    """Gradients of ``forward``.

    Args:
        p: The problem that forward solved, without its gate.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, H, P, N)``, or None.
    """
    parts = _parts_of_heads(p.head_dim)
    with device_of(p.x):
        if parts > 1:
            return _backward_in_parts(p, dy, dstate, parts)
        return _backward(with_even_rows(p), dy, dstate)


def _parts_of_heads(size: int) -> int:
    """How many heads a head of so many channels is taken as; one if it has no divisor near."""
    fewest = -(-size // WIDEST)
    return next((n for n in range(max(1, fewest), 2 * fewest + 1) if size % n == 0), 1)


def _backward_in_parts(p: Problem, dy: Tensor, dstate: Tensor | None, parts: int) -> Gradients:
    """``backward`` with every head as so many narrower ones, which share its dt, A and state's columns."""

    def rows(t: Tensor) -> Tensor:  # (..., H, P), of which each part has its own
        return t.unflatten(-1, (parts, -1)).flatten(-3, -2)

    def states(t: Tensor) -> Tensor:  # (..., H, P, N)
        return t.unflatten(-2, (parts, -1)).flatten(-4, -3)

    def alike(t: Tensor) -> Tensor:  # (..., H), of which all have the same; not rounded before the parts are added up
        return t.to(p.dtype).repeat_interleave(parts, -1)

    per_head = p.D is not None and p.D.ndim == 2
    narrow = replace(
        p,
        x=rows(p.x),
        dt=alike(p.dt),
        A=alike(p.A),
        D=None if p.D is None else alike(p.D) if per_head else rows(p.D),
        dt_bias=None if p.dt_bias is None else alike(p.dt_bias),
        initial_state=None if p.initial_state is None else states(p.initial_state),
        plan=p.plan.setdefault("parts", {}),
    )
    found = _backward(with_even_rows(narrow), rows(dy), None if dstate is None else states(dstate))
    shared = ("dt", "A", "dt_bias", *(("D",) if per_head else ()))
    sums = {n: t.unflatten(-1, (-1, parts)).sum(-1) for n in shared if (t := getattr(found, n)) is not None}
    return found._replace(**sums)  # the others are only to be reshaped


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    from kernels.ssd import Gradients

    plan = Plan(p, adjoint=True)
    maps = (p.batch, p.length, p.routes, p.heads)
    own_x = p.x.shape[2] == p.routes
    dx = fresh(p, (*maps, p.head_dim), p.x.dtype if own_x else p.dtype)
    ddt = fresh(p, maps, p.dt.dtype)
    dinitial = None
    if p.initial_state is not None:  # that of an empty sequence is handed through
        dinitial = plan.states(p.sequences).zero_() if dstate is None else dstate.to(p.dtype, copy=True).contiguous()
    if not (plan.programs and plan.rows):
        zeros = {n: None if (t := getattr(p, n)) is None else torch.zeros_like(t) for n in Gradients._fields}
        return Gradients(**zeros | {"initial_state": dinitial})
    small = _Small(plan)
    each = (p.batch, p.length, p.routes, p.groups, p.state)
    dB, dC = (fresh(p, each, t.dtype) for t in (p.B, p.C))
    pieces = -(-p.state // plan.piece)
    vectors = plan.vectors(pieces + 4)
    h_to_g = plan.by_chunk(p.A.unsqueeze(-1).expand(-1, -1, pieces))[0]
    outputs = {"dx": dx, "dB": dB, "dC": dC, "dD": small.dD, "vectors": vectors, "h_to_g": h_to_g}
    _launch(plan, dy if dy.ndim == 5 else dy.unsqueeze(2), dstate, dinitial, outputs)
    last = {"ddt": ddt, "dA": small.dA, "dbias": small.dbias, "dD": small.dD, "vectors": vectors, "h_to_g": h_to_g}
    plan.launch(
        ddt_kernel, plan.tiles, last | plan.dt,
        lambda: {
            "L": p.length, "plane": vectors[0].numel(), "HAS_D": small.per_head, "PIECES": pieces,
            "WEIGHED": plan.weighed, **plan.dt_numbers,
        },
    )  # fmt: skip
    return Gradients(
        x=dx if own_x else dx.sum(2, keepdim=True),
        dt=ddt,
        B=dB,
        C=dC,
        z=None,
        initial_state=dinitial,
        **small.sums(plan),
    )


class _Small:
    """The gradients of A, D and dt_bias chunk by chunk; those of one size lie together, to be added up together."""

    def __init__(self, plan: Plan) -> None:
        p = plan.p
        self.per_head = p.D is not None and p.D.ndim == 2
        self.all = plan.by_chunk(p.A, 1 + self.per_head + (p.dt_bias is not None))
        self.dA, self.dbias = self.all[0], None if p.dt_bias is None else self.all[-1]
        self.dD = self.all[1] if self.per_head else None if p.D is None else plan.by_chunk(p.D)[0]

    def sums(self, plan: Plan) -> dict[str, Tensor | None]:
        """The gradients by name."""
        count, chunks = self.all.shape[:2]
        total = [self.all.new_empty(self.all.shape[2:]) for _ in range(count)]
        plan.launch(
            sums_kernel, (total[0].numel(), count),
            {"by_chunk": self.all, "first": total[0], "second": total[min(1, count - 1)], "third": total[-1]},
            lambda: {"chunks": chunks, "heads": total[0].numel(), "BC": min(2048, power(chunks))},
        )  # fmt: skip
        dD = total[1] if self.per_head else None if self.dD is None else self.dD.sum(0)
        return {"A": total[0], "D": dD, "dt_bias": None if self.dbias is None else total[-1]}


def _parts(plan: Plan) -> int:
    """Programs that share the heads of a group and chunk, each with a sum of dB and dC of its own."""
    p = plan.p
    chunks = max(1, plan.rows * plan.per_row * p.routes * p.groups)
    heads = p.heads // max(1, p.groups)
    wanted = max(1, min(heads, -(-3 * cores(p.x.device) // chunks)))
    return -(-heads // -(-heads // wanted)) if heads else 1


def _launch(plan: Plan, dy: Tensor, dstate: Tensor | None, dinitial: Tensor | None, outputs: dict[str, Any]) -> None:
    """Runs the walks over the chunks and the kernel, for as many segments at a time as the workspace holds."""
    p, segments = plan.p, plan.short_segments
    if SLOT * max(map(abs, dy.stride())) >= 2**30:  # beyond what Plan.near promises
        dy = dy.contiguous()
    if plan.boxed and not as_lines(dy):  # tiles may be narrower than those that are read by address
        dy = dy.clone(memory_format=torch.contiguous_format)
    dfinal = None if dstate is None else dstate.to(p.dtype).contiguous()
    h_enter, g_enter = plan.entering(segments, dy, dfinal)
    turns = _turns(plan, segments)
    size = (2, max(chunks for *_, chunks in turns), p.routes, p.heads, p.head_dim, p.state)
    h_all, g_all = torch.empty(size, dtype=plan.product_dtype, device=p.x.device)
    of_gradient, numbers = plan.of_gradient(dy)
    walked = {
        **of_gradient, "dfinal": dfinal, "dinitial": dinitial, "h_enter": h_enter, "g_enter": g_enter, "h_out": h_all,
        "g_out": g_all,
    }  # fmt: skip
    parts = _parts(plan)
    programs = h_all.shape[0] * p.routes * p.groups * parts
    shares = torch.empty((4, programs, plan.chunk, p.state), dtype=p.dtype, device=p.x.device)
    chunked = outputs | of_gradient | {"h_in": h_all, "g_in": g_all, "shares": shares}
    if numbers["TMA"]:
        whole = {"h_box": states_box(h_all, plan.width, p.state), "g_box": states_box(g_all, plan.width, p.state)}
        pieces = {n: states_box(t, plan.width, plan.piece) for n, t in (("h_part", h_all), ("g_part", g_all))}
        walked |= whole
        chunked |= whole | pieces | {"C_part": rows_box(p.C, plan.chunk, plan.piece)}
    for first, count, first_chunk, chunks in turns:
        walking = {"STORE": True, "BOTH": True, "first_segment": first, "first_chunk": first_chunk}
        plan.walk(first, (count, 2), segments, walked, numbers | walking)
        _chunks(plan, chunked, numbers, first_chunk, chunks, parts)


def _chunks(
    plan: Plan, given: dict[str, Any], of_gradient: dict[str, Any], first_chunk: int, chunks: int, parts: int
) -> None:
    """Runs the two kernels that take all chunks at once."""
    p = plan.p
    tensors = {n: t for n, t in {**plan.shared, "D": plan.D, **dict.fromkeys(BOXES), **given}.items() if n in TAKEN}
    units, pieces, half = p.routes * p.groups * chunks, -(-p.state // plan.piece), given["shares"][0].numel()

    def numbers() -> dict[str, Any]:
        found = plan.shared_numbers | of_gradient | {
            "first_chunk": first_chunk, "L": p.length, **plan.d_numbers, "parts": parts,
            "heads_each": -(-(p.heads // p.groups) // parts), "BLOCKS": -(-p.head_dim // plan.width),
            "BO": plan.piece, "PIECES": pieces, "WEIGHED": plan.weighed, "half": half, **plan.pipeline,
            "AHEAD": of_gradient["TMA"] and p.x.is_cuda and plan.piece >= 64,
        }  # fmt: skip
        return {n: v for n, v in found.items() if n in TAKEN or n == "num_warps"}

    plan.launch(chunks_kernel, (units * parts * (1 + pieces),), tensors, numbers, first_chunk)
    slices = -(-p.state // JOINED)
    plan.launch(
        join_kernel, (units * slices, 2), {n: given[n] for n in ("shares", "dB", "dC")} | {"tokens": plan.tokens},
        lambda: {n: v for n, v in plan.shared_numbers.items() if n in JOIN} | {
            "first_chunk": first_chunk, "L": p.length, "parts": parts, "half": half, "slices": slices, "BS": JOINED,
        },
        first_chunk,
    )  # fmt: skip


def _turns(plan: Plan, segments: Segments) -> list[tuple[int, int, int, int]]:
    """First segment, number of segments, first chunk, number of chunks of each turn; chunks count over all rows."""
    p = plan.p
    total, turns = plan.rows * segments.count, []
    state = 2 * p.routes * p.heads * p.head_dim * p.state  # of h and g together
    entering = total * state * p.dtype.itemsize if segments.count > 1 else 0
    each = segments.length * state * plan.product_dtype.itemsize
    most = max(1, (triton_plan.WORKSPACE - entering) // max(1, each))

    def chunk(segment: int) -> int:
        row, s = divmod(segment, segments.count)
        return row * plan.per_row + min(s * segments.length, plan.per_row)

    count = -(-total // -(-total // most))
    for first in range(0, total, count):
        last = min(first + count, total)
        turns.append((first, last - first, chunk(first), chunk(last) - chunk(first)))
    return turns
