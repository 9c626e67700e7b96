"""The selective scan on NVIDIA GPUs: CUDA C++ that NVRTC compiles at run time, for real numbers and up to 64 states.

    h_t = a_t h_{t-1} + dt_t B_t x_t,  a_t = exp(dt_t A),  y_t = <C_t, h_t> + D x_t        (Gu & Dao 2023, algorithm 2)

The kernels are in ``cuda_forward.cu`` and ``cuda_backward.cu``; ``triton.py`` is their plain Triton twin. What they are
compiled and launched with is in ``cuda_launch.py`` and ``cuda_shape.py``.

B batch, L tokens, D channels, N state, K routes, P positions, G groups, S sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from kernels import nvrtc, plans
from kernels.selective_scan.cuda_launch import TYPES, Launch, shape_for
from kernels.selective_scan.cuda_shape import properties
from kernels.selective_scan.cuda_sums import Sums
from kernels.selective_scan.outputs import MapGradients, finished_y, new_y
from kernels.selective_scan.problem import Problem

if TYPE_CHECKING:
    from kernels.selective_scan import Gradients

MAX_STATE = 64


def supports(p: Problem) -> bool:
    """Whether these kernels can take the problem; the Triton kernels take any."""
    if not p.x.is_cuda or p.is_complex or p.state > MAX_STATE or not nvrtc.available():
        return False
    if not all(t is None or t.dtype in TYPES for t in (p.x, p.dt, p.B, p.C, p.z)):
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
    launch = Launch(p)
    shared, macros = 4 * launch.shape.forward_words, {"T": launch.shape.tile, "EXACT": int(exact)}
    saved = launch.float32(p.slots, p.routes, p.state, p.channels)
    if p.cu_seqlens is not None:
        saved.zero_()
    final = launch.float32(p.sequences, p.routes, p.channels, p.state)
    y = new_y(p)
    found = launch.carries("forward", shared, {}, **macros)
    launch.run("forward", shared, {"saved": saved, "final": final, "y": y, **found},
               **macros, TY=TYPES[y.dtype], HAS_INITIAL=p.initial_state is not None)  # fmt: skip
    return finished_y(p, y), final, saved


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
    launch = Launch(p, dy)
    maps = MapGradients.new(p)
    sums = Sums.new(p, launch.shape, dstate)
    macros: dict[str, str | int] = {
        "TDY": TYPES[dy.dtype],
        "TDX": TYPES[maps.x.dtype],
        "TDZ": "float" if maps.z is None else TYPES[maps.z.dtype],
        "HAS_FINAL": int(dstate is not None or sums.slices > 1),
    }
    given = {"dy": dy, "dy_k": dy.shape[2], "saved": saved, "dx": maps.x, "ddt": maps.dt, "dz": maps.z}
    for i in reversed(range(sums.slices)):
        fields = given | sums.fields(i)
        fields |= launch.carries("backward", 4 * launch.shape.backward_words(ends=True), fields, **macros)
        launch.run("backward", 4 * launch.shape.backward_words(ends=False), fields, **macros)
        if sums.parts is not None:  # of the blocks' channels, in their order
            launch.start("reduce", -(-sums.entries(i) // 256), 256, 0, fields)
    return Gradients(
        x=maps.merged_x,
        dt=maps.dt,
        A=sums.total("dA"),
        B=sums.total("dB"),
        C=sums.total("dC"),
        D=None if p.D is None else sums.total("dD"),
        z=maps.merged_z,
        dt_bias=None if p.dt_bias is None else sums.total("dbias"),
        initial_state=None if p.initial_state is None else sums.g[0],
    )
