"""The custom ops behind ``selective_scan``: which implementation runs, and how gradients come about.

``torch.ops.triscan.selective_scan`` survives tracing; where nobody traces or watches, ``eager`` takes a shorter way.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import recompute
from kernels.backend import resolve
from kernels.checks import autocast_dtype, owned
from kernels.plans import Plans
from kernels.registration import op, plain, simple, unwatched
from kernels.selective_scan.exactness import exact
from kernels.selective_scan.outputs import like, unprojected
from kernels.selective_scan.problem import Problem, low_rank, make_problem, project

TENSORS: tuple[str, ...] = (
    "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "route", "initial_state", "cu_seqlens", "seq_idx",
)  # fmt: skip
KERNELS = ("cpu", "cuda", "triton")  # backends with a forward and a backward of their own
INITIAL = TENSORS.index("initial_state")
FINAL = 4  # among the flags: whether the final state is asked for
PLAIN = ("straight",)  # where a plan keeps what its calls without a projected dt go by
DIFFERENTIABLE: tuple[str, ...] = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "initial_state")


class Gradients(NamedTuple):
    """What a backward returns, in the shapes of ``Problem`` and in any dtype; None where there is no such input."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


def _resolve(p: Problem, backend: str) -> str:
    """The backend that runs a problem."""
    if "backend" not in p.plan:
        p.plan["backend"] = _choose(p, backend)
    return p.plan["backend"]


def _choose(p: Problem, backend: str) -> str:
    """The same at the first call."""
    takes = False
    if p.x.is_cuda:
        from kernels.selective_scan import cuda

        takes = cuda.supports(p)
    return resolve("selective_scan", backend, p.x.device, takes)


def implementation(name: str) -> Any:
    """The module behind a backend: ``scan`` for plain operators, ``forward`` and ``backward`` for kernels."""
    if name == "cpu":
        from kernels.selective_scan import cpu as module
    elif name == "cuda":
        from kernels.selective_scan import cuda as module
    elif name == "triton":
        from kernels.selective_scan import triton as module
    elif name == "torch":
        from kernels.selective_scan import aten as module
    else:
        from kernels.selective_scan import reference as module
    return module


def _key(dt_weight: Tensor | None, device: torch.device) -> tuple[object, ...]:
    """Where a plan keeps what is right for one dtype of the projected dt, which autocast has a say in."""
    return PLAIN if dt_weight is None else ("straight", "projected", autocast_dtype(device))


def _straight(p: Problem, backend: str) -> Any:
    """The ``Straight`` of a problem's signature, or False."""
    if backend != "cuda":
        return False
    from kernels.selective_scan import cuda_straight

    return cuda_straight.supports(p) and cuda_straight.Straight(p)


def _given(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a ``Straight``, dt projected."""
    x, dt, A, B, C, D, z, dt_bias, dt_weight, _, initial_state, *_ = tensors
    return x, dt if dt_weight is None else project(dt, dt_weight), A, B, C, D, z, dt_bias, initial_state


_plans, _backward_plans = Plans(), Plans()
_loaded = functools.cache(implementation)  # an import statement takes microseconds; inside an op nothing is traced


@op
def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    route_params: bool,
    merge: str,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (empty if not asked for) and the saved states (zeros where the backward needs none)."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, route_params, merge, reverse)
    plan = _plans.find(tensors, (*flags, return_final_state, backend))
    key = _key(dt_weight, x.device)
    straight = plan.get(key)
    if straight:
        y, state, saved = straight.forward(_given(tensors), True, return_final_state)
        return y, saved.new_empty(0) if state is None else state, saved
    p = make_problem(*tensors, *flags, plan)
    name = _resolve(p, backend)
    if straight is None:
        plan[key] = _straight(p, name)
    if name in KERNELS:
        kernel = _loaded(name)
        y, state, saved = kernel.forward(p, exact(return_final_state)) if name == "cuda" else kernel.forward(p)
    else:
        # An op's outputs are tensors of their own: no views, no aliases of its inputs.
        y, state = (t.clone(memory_format=torch.contiguous_format) for t in _loaded(name).scan(p))
        saved = x.new_zeros((p.slots, p.routes, p.state, p.channels), dtype=p.state_dtype)
    if not return_final_state:
        return y, x.new_empty(0, dtype=p.state_dtype), saved
    return y, (state if route is not None else owned(state, (p.sequences, p.channels, p.state))), saved


@_selective_scan.register_fake
def _(
    x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx,
    dt_softplus, route_params, merge, reverse, return_final_state, backend,
):  # fmt: skip
    p = make_problem(
        x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx,
        dt_softplus, route_params, merge, reverse,
    )  # fmt: skip
    keep = not p.merge and route is not None
    y = x.new_empty((p.batch, p.length, *((p.routes,) if keep else ()), p.channels))
    lead = (p.routes,) if route is not None else ()
    size = (p.sequences, *lead, p.channels, p.state) if return_final_state else (0,)
    saved = x.new_empty((p.slots, p.routes, p.state, p.channels), dtype=p.state_dtype)
    return y, x.new_empty(size, dtype=p.state_dtype), saved


@op
def _selective_scan_backward(
    dy: Tensor,
    dstate: Tensor | None,
    saved: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    route_params: bool,
    merge: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of ``DIFFERENTIABLE``, shaped as the inputs; empty for absent ones."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, route_params, merge, reverse)
    plan, key = _backward_plans.find((dy, dstate, saved, *inputs), (*flags, backend)), _key(dt_weight, x.device)
    straight = plan.get(key)
    if straight:
        given = _given(inputs)
        dx, ddt, *others, dinitial = straight.backward(dy, dstate, saved, given)
        ddt, ddt_weight = unprojected(ddt, dt, dt_weight, routed=False)
        grads = (dx, like(ddt, dt, x), *others, like(ddt_weight, dt_weight, x), dinitial)
        return tuple(x.new_empty(0) if t is None else t for t in grads)  # type: ignore[return-value]
    p = make_problem(*inputs, *flags, plan)
    name = _resolve(p, backend)
    if straight is None:
        plan[key] = _straight(p, name)
    if name not in KERNELS:
        scan = _loaded(name).scan
        grads = recompute.gradients(lambda *t: scan(make_problem(*t, *flags)), inputs, (dy, dstate))  # type: ignore
        return tuple(grads[TENSORS.index(n)] for n in DIFFERENTIABLE)  # type: ignore[return-value]
    if dstate is not None and route is None:
        dstate = dstate.unsqueeze(1)
    g = _loaded(name).backward(p, dy, dstate, saved)
    if dt_weight is not None:
        dt = low_rank(dt, seq_idx, route, route_params)
    ddt, ddt_weight = unprojected(g.dt, dt, dt_weight, routed=route is not None)
    by_name = g._asdict() | {"dt": ddt, "dt_weight": ddt_weight}
    return tuple(like(by_name[n], inputs[TENSORS.index(n)], x) for n in DIFFERENTIABLE)  # type: ignore[return-value]


@_selective_scan_backward.register_fake
def _(
    dy, dstate, saved, x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx,
    dt_softplus, route_params, merge, reverse, backend,
):  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_weight, initial_state)
    return tuple(x.new_empty(0 if t is None else t.shape, dtype=None if t is None else t.dtype) for t in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, dt_softplus, route_params, merge, reverse, return_final_state, backend = inputs
    ctx.flags = (dt_softplus, route_params, merge, reverse, backend)
    ctx.has_state = return_final_state
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.y = (output[0].shape, output[0].dtype, output[0].device)
    ctx.autocast = autocast_dtype(output[0].device)  # a low-rank dt is projected in it, in the backward as here


def _backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    none = (None,) * (len(TENSORS) + 6)
    if dy is None and dstate is None:
        return none
    if dy is None:
        shape, dtype, device = ctx.y
        dy = torch.zeros(shape, dtype=dtype, device=device)
    arguments = (dy, dstate if ctx.has_state else None, saved, *tensors, *ctx.flags)
    if ctx.autocast is None or tensors[TENSORS.index("dt_weight")] is None:
        grads = _selective_scan_backward(*arguments)
    else:
        with torch.autocast(dy.device.type, ctx.autocast):
            grads = _selective_scan_backward(*arguments)
    by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
    inputs = (by_name.get(n) if t is not None else None for n, t in zip(TENSORS, tensors, strict=True))
    return (*inputs, *none[len(TENSORS) :])


_selective_scan.register_autograd(_backward, setup_context=_setup_context)


class _Straight(torch.autograd.Function):
    """A ``cuda_straight.Straight`` with its gradients."""

    @staticmethod
    def forward(ctx: Any, straight: Any, flags: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        y, state, saved = straight.forward(inputs, True, flags[FINAL])
        ctx.save_for_backward(*inputs, saved)
        ctx.straight, ctx.flags = straight, flags
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, saved = ctx.saved_tensors
        if dy is None and dstate is None:
            return (None,) * (2 + len(inputs))
        if dy is None:
            dy = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format)
        tensors = (*inputs[:8], None, None, inputs[8], None, None)
        direct = not torch.is_grad_enabled() and plain((dy, dstate, saved)) and simple(inputs)
        if direct and _plans.find(tensors, ctx.flags).get(PLAIN) is ctx.straight:  # hooks may replace what is saved
            return (None, None, *ctx.straight.backward(dy, dstate, saved, inputs))
        *flags, _, backend = ctx.flags
        grads = _selective_scan_backward(dy, dstate, saved, *tensors, *flags, backend)
        by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
        names = (*TENSORS[:8], TENSORS[INITIAL])
        return (None, None, *(None if t is None else by_name[n] for n, t in zip(names, inputs, strict=True)))


def eager(tensors: tuple[Tensor | None, ...], flags: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """y and the final state, by the shortest way."""
    if unwatched() and simple(tensors):
        straight = _plans.find(tensors, flags).get(PLAIN)
        if straight:
            inputs = (*tensors[:8], tensors[INITIAL])
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return _Straight.apply(straight, flags, *inputs)
            return straight.forward(inputs, False, flags[FINAL])[:2]
    return _selective_scan(*tensors, *flags)[:2]
