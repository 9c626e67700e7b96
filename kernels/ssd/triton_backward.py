"""``ssd`` on GPUs, backward: the host side. ``triton_gradients.py`` has the formulas and the kernels.

First ``states_kernel`` walks forwards for h and backwards for g and leaves those of every chunk; then all chunks run at
once, each over the heads of a group, which share C B^T and the two products that give dB and dC: ``inner_kernel`` does
what pairs of positions bring about, ``outer_kernel`` what the states do, onto the first's sums. What one kernel for
both would have to hold does not fit into the registers. Last, ``ddt_kernel`` turns what they leave into the gradient of
dt.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.selective_scan.outputs import fresh
from kernels.selective_scan.problem import CHUNK as SLOT
from kernels.selective_scan.triton_plan import device_of
from kernels.ssd import triton_plan
from kernels.ssd.problem import Problem
from kernels.ssd.triton_boxes import rows_box, states_box
from kernels.ssd.triton_ddt import JOINED, ddt_kernel, join_kernel
from kernels.ssd.triton_gradients import inner_kernel, outer_kernel
from kernels.ssd.triton_plan import Plan
from kernels.ssd.triton_sizes import Segments, cores

if TYPE_CHECKING:
    from kernels.ssd import Gradients

INNER, OUTER = frozenset(inner_kernel.arg_names), frozenset(outer_kernel.arg_names)
BOXES = ("h_box", "g_box", "h_part", "g_part", "C_part")


def backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    """Gradients of ``forward``.

    Args:
        p: The problem that forward solved.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, H, P, N)``, or None.
    """
    with device_of(p.x):
        return _backward(p, dy, dstate)


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    from kernels.ssd import Gradients

    plan = Plan(p)
    maps = (p.batch, p.length, p.routes, p.heads)
    own_x = p.x.shape[2] == p.routes
    dx = fresh(p, (*maps, p.head_dim), p.x.dtype if own_x else p.dtype)
    ddt = fresh(p, maps, p.dt.dtype)
    dz = None if p.z is None else fresh(p, (*maps, p.head_dim), p.z.dtype if p.routes == 1 else p.dtype)
    dinitial = None
    if p.initial_state is not None:  # that of an empty sequence is handed through
        dinitial = plan.states(p.sequences).zero_() if dstate is None else dstate.to(p.dtype, copy=True).contiguous()
    if not (plan.programs and plan.rows):
        zeros = {n: None if (t := getattr(p, n)) is None else torch.zeros_like(t) for n in Gradients._fields}
        return Gradients(**zeros | {"initial_state": dinitial})
    small = _Small(plan)
    parts = _parts(plan)
    each = (p.batch, p.length, p.routes, p.groups, p.state)
    dB, dC = (fresh(p, (parts, *each), t.dtype if parts == 1 else p.dtype) for t in (p.B, p.C))
    pieces = -(-p.state // plan.piece)
    vectors = plan.vectors(pieces + 4)
    h_to_g = plan.by_chunk(p.A.unsqueeze(-1).expand(-1, -1, pieces))[0]
    outputs = {"dx": dx, "dz": dz, "dB": dB, "dC": dC, "dD": small.dD, "vectors": vectors, "h_to_g": h_to_g}
    _launch(plan, dy if dy.ndim == 5 else dy.unsqueeze(2), dstate, dinitial, outputs, parts)
    last = {"ddt": ddt, "dA": small.dA, "dbias": small.dbias, "dD": small.dD, "vectors": vectors, "h_to_g": h_to_g}
    plan.launch(
        ddt_kernel, plan.tiles, last | plan.dt,
        lambda: {
            "L": p.length, "plane": vectors[0].numel(), "HAS_D": small.per_head, "PIECES": pieces,
            "WEIGHED": plan.weighed, **plan.dt_numbers,
        },
    )  # fmt: skip
    dB, dC = (dB[0], dC[0]) if parts == 1 else _joined(plan, dB, dC)
    return Gradients(
        x=dx if own_x else dx.sum(2, keepdim=True),
        dt=ddt,
        B=dB,
        C=dC,
        z=None if dz is None else dz.squeeze(2) if p.routes == 1 else dz.sum(2),
        initial_state=dinitial,
        **small.sums(),
    )


class _Small:
    """The gradients of A, D and dt_bias chunk by chunk; those of one size lie together, to be added up together."""

    def __init__(self, plan: Plan) -> None:
        p = plan.p
        self.per_head = p.D is not None and p.D.ndim == 2
        self.all = plan.by_chunk(p.A, 1 + self.per_head + (p.dt_bias is not None))
        self.dA, self.dbias = self.all[0], None if p.dt_bias is None else self.all[-1]
        self.dD = self.all[1] if self.per_head else None if p.D is None else plan.by_chunk(p.D)[0]

    def sums(self) -> dict[str, Tensor | None]:
        """The gradients by name."""
        total = [t.clone() for t in self.all.sum(1)]  # an op's results share no memory
        dD = total[1] if self.per_head else None if self.dD is None else self.dD.sum(0)
        return {"A": total[0], "D": dD, "dt_bias": None if self.dbias is None else total[-1]}


def _joined(plan: Plan, dB: Tensor, dC: Tensor) -> tuple[Tensor, Tensor]:
    """dB and dC (B, L, K, G, N) in the dtypes of B and C, from their parts."""
    sums = torch.empty_like(dB[0], dtype=plan.p.B.dtype), torch.empty_like(dC[0], dtype=plan.p.C.dtype)
    size = sums[0].numel()
    plan.launch(
        join_kernel, (-(-size // JOINED), 2), {"dB": dB, "dC": dC, "B_sum": sums[0], "C_sum": sums[1]},
        lambda: {"parts": dB.shape[0], "size": size, "BLOCK": JOINED},
    )  # fmt: skip
    return sums


def _parts(plan: Plan) -> int:
    """Programs that share the heads of a group and chunk, each with a sum of dB and dC of its own."""
    p = plan.p
    chunks = max(1, plan.rows * plan.per_row * p.routes * p.groups)
    heads = p.heads // max(1, p.groups)
    wanted = max(1, min(heads, -(-3 * cores(p.x.device) // chunks)))
    return -(-heads // -(-heads // wanted)) if heads else 1


def _launch(
    plan: Plan, dy: Tensor, dstate: Tensor | None, dinitial: Tensor | None, outputs: dict[str, Any], parts: int
) -> None:
    """Runs the walks over the chunks and the kernel, for as many segments at a time as the workspace holds."""
    p, segments = plan.p, plan.short_segments
    if SLOT * max(map(abs, dy.stride())) >= 2**30:  # beyond what Plan.near promises
        dy = dy.contiguous()
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
    programs = h_all.shape[0] * p.routes * p.groups * parts
    within = torch.empty((2, programs, plan.chunk, p.state), dtype=p.dtype, device=p.x.device)
    chunked = outputs | of_gradient | {"h_in": h_all, "g_in": g_all, "within": within}
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
    tensors = {**plan.shared, "D": plan.D, **dict.fromkeys(BOXES), **given}

    def numbers(names: frozenset[str]) -> dict[str, Any]:
        found = plan.shared_numbers | of_gradient | {
            "first_chunk": first_chunk, "L": p.length, **plan.d_numbers, "parts": parts,
            "heads_each": -(-(p.heads // p.groups) // parts), "part_size": given["dB"][0].numel(),
            "BLOCKS": -(-p.head_dim // plan.width), "BO": plan.piece, "PIECES": pieces, "WEIGHED": plan.weighed,
            "half": given["within"][0].numel(),
        }  # fmt: skip
        return {n: v for n, v in found.items() if n in names}

    outer, inner = ({n: t for n, t in tensors.items() if n in names} for names in (OUTER, INNER))
    programs, pieces = p.routes * p.groups * chunks * parts, -(-p.state // plan.piece)
    walk = {"num_warps": plan.warps, "num_stages": plan.stages}
    plan.launch(inner_kernel, (programs,), inner, lambda: numbers(INNER) | plan.pipeline, first_chunk)
    plan.launch(outer_kernel, (programs * pieces,), outer, lambda: numbers(OUTER) | walk, first_chunk)


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
