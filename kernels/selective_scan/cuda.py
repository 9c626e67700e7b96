"""The selective scan on NVIDIA GPUs: CUDA C++ that NVRTC compiles at run time, for float32 and 16-bit inputs.

    h_t = a_t h_{t-1} + dt_t B_t x_t,  a_t = exp(dt_t A),  y_t = <C_t, h_t> + D x_t        (Gu & Dao 2023, algorithm 2)

The kernels are in ``cuda_forward.cu`` and ``cuda_backward.cu``; ``triton.py`` is their plain Triton twin. What they are
compiled and launched with is in ``cuda_launch.py`` and ``cuda_shape.py``; what becomes of complex numbers and of more
than 64 states, in ``cuda_states.py``.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import nvrtc, plans
from kernels.selective_scan.cuda_launch import (
    TYPES,
    Fields,
    Launch,
    backward_macros,
    dense_float32,
    forward_macros,
    shape_for,
)
from kernels.selective_scan.cuda_shape import properties
from kernels.selective_scan.cuda_states import Part, doubled, joined, parts_of, real, saved_from
from kernels.selective_scan.cuda_sums import THREADS, Held
from kernels.selective_scan.outputs import MapGradients, finished_y, new_map, new_y
from kernels.selective_scan.problem import Problem

if TYPE_CHECKING:
    from kernels.selective_scan import Gradients, cuda_few

NUMBERS = (*TYPES, torch.complex64)


def supports(p: Problem) -> bool:
    """Whether these kernels can take the problem; the Triton kernels take any."""
    if not p.x.is_cuda or not nvrtc.available():
        return False
    if not all(t is None or t.dtype in NUMBERS for t in (p.x, p.dt, p.B, p.C, p.z)):
        return False
    return 4 * shape_for(p, backward=True).backward_words(ends=False) <= properties(p.x.device)[1]


def dense(p: Problem) -> Problem:
    """The problem with channels next to each other; they nearly always are."""
    changed = {n: t.contiguous() for n in ("x", "dt", "z") if (t := getattr(p, n)) is not None and t.stride(-1) != 1}
    return replace(p, **changed) if changed else p


def forward(p: Problem, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan.

    Args:
        p: The problem.
        exact: Whether the final state is wanted as exact as float32 is. The GPU's own exponential is off by up to two
            units in the last place, which a long memory adds up; y, rounded to 16 bits, doesn't show it.

    Returns:
        y ``(B, L, D)`` or ``(B, L, K, D)`` in x's dtype, the final state ``(S, K, D, N)``, and the state before each
        chunk ``(slots, K, N, D)``, zero in slots that belong to no chunk.
    """
    from kernels.selective_scan import cuda_few

    if cuda_few.supports(p):
        return cuda_few.forward(p, exact)
    with plans.on_device(p.x):
        return _forward(dense(p), exact)


def _forward(p: Problem, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    saved = torch.empty((p.slots, p.routes, p.state, p.channels), dtype=p.state_dtype, device=p.x.device)
    if p.cu_seqlens is not None:
        saved.zero_()
    parts = parts_of(p)
    merger = _merger(p, len(parts)) if p.merge else None
    y = new_y(p) if merger is None else merger.map(p.x.dtype, merged=True)
    before = new_map(p, torch.float32) if len(parts) > 1 else None  # y of the parts so far
    finals = []
    for i, part in enumerate(parts):
        out = y
        if before is not None and i < len(parts) - 1:
            part, out = replace(part, p=replace(part.p, D=None, z=None)), before
        finals.append(_forward_part(part, exact, saved_from(saved, part), out, before if i > 0 else None))
    return finished_y(p, y) if merger is None else merger.merged(y), joined(finals, p.is_complex), saved


def _merger(p: Problem, parts: int) -> cuda_few.Launch | None:
    """What adds up the maps of several routes in one pass, so that none has to be zeroed; None where torch does."""
    from kernels.selective_scan import cuda_few

    plain = parts == 1 and not p.is_complex and all(t.dtype in TYPES for t in (p.B, p.C))
    return cuda_few.Launch(p) if p.routes > 1 and plain else None


def _forward_part(part: Part, exact: bool, saved: Tensor, y: Tensor, before: Tensor | None) -> Tensor:
    """The scan over some states: fills ``saved``, and y on top of ``before``; returns the final state."""
    launch, p = Launch(part), part.p
    shared, macros = 4 * launch.shape.forward_words, forward_macros(launch.shape, exact)
    final = launch.float32(p.sequences, p.routes, p.channels, p.state)
    found = launch.carries("forward", shared, {}, **macros)
    launch.run("forward", shared, {"saved": saved, "final": final, "y": y, "partial": before, **found}, **macros,
               TY=TYPES[y.dtype], HAS_INITIAL=p.initial_state is not None, ADD=before is not None)  # fmt: skip
    return final


def backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    """Gradients of ``forward``.

    Args:
        p: The problem that forward solved.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, D, N)``, or None.
        saved: The states that forward saved.
    """
    from kernels.selective_scan import cuda_few

    if cuda_few.supports(p):
        return cuda_few.backward(p, dy, dstate, saved)
    with plans.on_device(p.x):
        return _backward(dense(p), dy, dstate, saved)


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    from kernels.selective_scan import Gradients

    dy = (dy.unsqueeze(2) if dy.ndim == 3 else dy).contiguous()
    if dstate is not None and p.is_complex:
        dstate = real(dstate)
    parts, found, maps, starts = parts_of(p), [], None, []
    merger = _merger(p, len(parts))
    for i, part in enumerate(parts):
        if i > 0:  # D belongs to one of them
            part = replace(part, p=replace(part.p, D=None))
        end = dstate if dstate is None else dstate[..., part.first : part.first + part.p.state]
        more, held, start = _backward_part(part, dy, end, saved_from(saved, part), len(parts) > 1, merger)
        maps = more if maps is None else maps.plus(more)
        found.append(held)
        starts.append(start)
    assert maps is not None

    def states(name: str) -> Tensor:
        return joined([held.total(name) for held in found], False)

    dC = doubled(states("C")) if p.is_complex else states("C")
    bias = sum(held.total("bias") for held in found) if p.dt_bias is not None else None
    dx, dz = (maps.merged_x, maps.merged_z) if merger is None else _merged(merger, maps)
    return Gradients(
        x=dx,
        dt=maps.dt,
        A=joined([states("A")], p.is_complex),
        B=joined([states("B")], p.is_complex),
        C=joined([dC], p.is_complex),
        D=None if p.D is None else found[0].total("D"),
        z=dz,
        dt_bias=bias,  # type: ignore[arg-type]
        initial_state=None if p.initial_state is None else joined(starts, p.is_complex),
    )


def _maps(p: Problem, merger: cuda_few.Launch) -> MapGradients:
    """Memory for gradients, zeros only where ``_merged`` doesn't see to them."""
    shared = p.x.shape[2] == 1
    dz = None if p.z is None else merger.map(p.z.dtype, merged=True)
    return MapGradients(p, merger.map(p.x.dtype, shared), merger.map(p.dt.dtype, shared and p.route_params), dz)


def _merged(merger: cuda_few.Launch, maps: MapGradients) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and z, where ``merger`` made their maps; zeros in that of dt where a route leaves out."""
    p = maps.p
    dz = None if maps.z is None else merger.merged(maps.z)
    if p.x.shape[2] > 1:
        return maps.x, dz
    return merger.merged(maps.x, maps.dt if p.route_params else None).unsqueeze(2), dz


def _backward_part(
    part: Part, dy: Tensor, dstate: Tensor | None, saved: Tensor, wide: bool, merger: cuda_few.Launch | None
) -> tuple[MapGradients, Held, Tensor]:
    """The gradients that come from some states, and that of the initial ones.

    Gradients of maps are float32 if there are others to add (``wide``); ``merger`` makes those that it merges.
    """
    launch, p = Launch(part, dy), part.p
    maps = MapGradients.new(p, torch.float32 if wide else None) if merger is None else _maps(p, merger)
    held, start = Held(p, launch.sums), launch.float32(p.sequences, p.routes, p.channels, p.state)
    macros = backward_macros(dy, maps.x, maps.dt, maps.z)
    fields: Fields = {
        "dy": dy, "dy_k": dy.shape[2], "saved": saved, "dx": maps.x, "ddt": maps.dt, "dz": maps.z,
        "dfinal": dense_float32(dstate), **held.fields,
    }  # fmt: skip
    fields |= launch.carries("backward", launch.backward_bytes(ends=True), fields, **macros)
    for i in reversed(range(launch.sums.slices)):
        more: Fields = {**launch.sums.bounds(i), **held.states(i), **({"dinitial": start} if i == 0 else {})}
        launch.run("backward", launch.backward_bytes(ends=False), fields | more, **macros)
        launch.start("reduce", launch.sums.blocks(i), THREADS, 0, fields | more)
    held.done()  # before anything else asks for memory
    return maps, held, start
