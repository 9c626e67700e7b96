"""The selective scan (S6) as one op: over tokens in order, along routes, packed, backwards, on any device.

``selective_scan`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.selective_scan``, whose arguments are the same by position; checks and dispatch are inside the op.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import recompute
from kernels.backend import resolve
from kernels.checks import autocast_dtype, owned
from kernels.plans import Plans, on_device
from kernels.registration import op, plain, simple, unwatched
from kernels.selective_scan.problem import Problem, make_problem

__all__ = ["selective_scan"]

TENSORS: tuple[str, ...] = (
    "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "route", "initial_state", "cu_seqlens", "seq_idx",
)  # fmt: skip
KERNELS = ("cpu", "cuda", "triton")  # backends with a forward and a backward of their own
INITIAL = TENSORS.index("initial_state")
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


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_softplus: bool = True,
    route: Tensor | None = None,
    route_params: bool = True,
    merge: Literal["sum", "keep"] = "sum",
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``, ``y_t = <C_t, h_t> + D x_t`` (Gu & Dao 2023, algorithm 2).

    The state is float32 (float64 for float64 x). Real dtypes may be mixed; everything but the indices is
    differentiable, the states included. B batch, L tokens, D channels, N state, G groups, K routes, P scan positions.

    Args:
        x: ``(B, L, D)``; with a route also ``(B, L, K, D)``, one input per route.
        dt: ``(B, L, D)``, with a route ``(B, L, K, D)``; low-rank ``(..., R)`` with ``dt_weight``.
        A: ``(D, N)``, with a route ``(K, D, N)``; negative real, or complex with negative real part (then B, C and the
            states are complex too and ``y = 2 Re <C, h> + D x``).
        B: ``(B, L, G, N)``, with a route ``(B, L, K, G, N)``; constant over time: the shape of A.
        C: As B.
        D: Skip connection ``(D,)``, with a route ``(K, D)``.
        z: Gate ``(B, L, D)``: y is multiplied by silu(z), after the routes are merged.
        dt_bias: ``(D,)``, with a route ``(K, D)``; added to dt before the softplus.
        dt_weight: ``(D, R)``, with a route ``(K, D, R)``; projects a low-rank dt.
        dt_softplus: Whether dt goes through softplus.
        route: ``(K, P)`` int32 or int64, the token at each scan position. -1 is a padding slot: x, B, C and the raw dt
            are zero there, the state still decays, the output is dropped. A route visits a token at most once; where
            it doesn't, its output is zero. Values are checked on the CPU only (elsewhere that would wait for the GPU).
        route_params: Whether dt, B and C are read at the token; False reads them at the scan position (P <= L).
        merge: ``sum`` adds the routes, ``(B, L, D)``; ``keep`` returns ``(B, L, K, D)``.
        reverse: Scans from the last position to the first: the flip of the scan of the flipped inputs.
        initial_state: ``(B, D, N)``, with a route ``(B, K, D, N)``, with ``cu_seqlens`` ``(S, D, N)``.
        return_final_state: Whether to return the state after the last position, shaped as ``initial_state``.
        cu_seqlens: ``(S + 1,)`` bounds of S sequences that lie end to end in a batch of one. Empty ones are allowed.
        seq_idx: ``(B, L)`` integers. The state restarts from zero where the value changes; the initial state enters
            the first sequence of a row, the final state is that of its last. -1 marks padding: skipped, output zero.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y in x's dtype, and the final state if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, route_params, merge, reverse)
    if backend in ("torch", "reference"):  # plain operators: differentiable twice, exportable
        y, state = _implementation(backend).scan(make_problem(*tensors, *flags))
        state = state if route is not None else state.squeeze(1)
    elif torch.compiler.is_compiling():
        y, state, _ = torch.ops.triscan.selective_scan(*tensors, *flags, return_final_state, backend)
    else:
        y, state = _eager(tensors, (*flags, return_final_state, backend))
    return (y, state) if return_final_state else y


def _eager(tensors: tuple[Tensor | None, ...], flags: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """y and the final state, by the shortest way."""
    if unwatched() and simple(tensors):
        straight = _plans.find(tensors, flags).get("straight")
        if straight:
            inputs = (*tensors[:8], tensors[INITIAL])
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return _Straight.apply(straight, flags, *inputs)
            return straight.forward(inputs, keep=False)[:2]
    return _selective_scan(*tensors, *flags)[:2]


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


def _implementation(name: str) -> Any:
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


def _straight(p: Problem, backend: str, final: bool) -> Any:
    """The ``Straight`` of a problem's signature, or False."""
    if backend != "cuda":
        return False
    from kernels.selective_scan import cuda_straight

    with on_device(p.x):
        return cuda_straight.supports(p) and cuda_straight.Straight(p, final)


_plans, _backward_plans = Plans(), Plans()
_loaded = functools.cache(_implementation)  # an import statement takes microseconds; inside an op nothing is traced


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
    straight = plan.get("straight")
    if straight:
        y, state, saved = straight.forward((*tensors[:8], initial_state), keep=True)
        return y, x.new_empty(0, dtype=saved.dtype) if state is None else state, saved
    p = make_problem(*tensors, *flags, plan)
    name = _resolve(p, backend)
    if straight is None and dt_weight is None:
        plan["straight"] = _straight(p, name, return_final_state)
    if name in KERNELS:
        kernel = _loaded(name)
        y, state, saved = kernel.forward(p, return_final_state) if name == "cuda" else kernel.forward(p)
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
    p = make_problem(*inputs, *flags, _backward_plans.find((dy, dstate, saved, *inputs), (*flags, backend)))
    name = _resolve(p, backend)
    if name not in KERNELS:
        scan = _loaded(name).scan
        grads = recompute.gradients(lambda *t: scan(make_problem(*t, *flags)), inputs, (dy, dstate))  # type: ignore
        return tuple(grads[TENSORS.index(n)] for n in DIFFERENTIABLE)  # type: ignore[return-value]
    if dstate is not None and route is None:
        dstate = dstate.unsqueeze(1)
    g = _loaded(name).backward(p, dy, dstate, saved)
    ddt, ddt_weight = _unproject(g.dt, dt, dt_weight, routed=route is not None)
    by_name = g._asdict() | {"dt": ddt, "dt_weight": ddt_weight}
    return tuple(_like(by_name[n], inputs[TENSORS.index(n)], x) for n in DIFFERENTIABLE)  # type: ignore[return-value]


def _unproject(ddt: Tensor, dt: Tensor, weight: Tensor | None, routed: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of a low-rank dt and its weight from that of the projected dt ``(B, L, K, D)``."""
    if weight is None:
        return ddt, None
    if not routed:
        rows, low = ddt.flatten(0, 2), dt.flatten(0, 1).to(ddt.dtype)
        return rows @ weight.to(ddt.dtype), rows.T @ low
    low = torch.einsum("blkd,kdr->blkr", ddt, weight.to(ddt.dtype))
    return low, torch.einsum("blkd,blkr->kdr", ddt, dt.to(ddt.dtype))


def _like(grad: Tensor | None, tensor: Tensor | None, x: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its input; an empty tensor where there is no input."""
    if tensor is None or grad is None:
        return x.new_empty(0)
    if grad.dtype != tensor.dtype:
        grad = grad.to(tensor.dtype)
    if grad.shape != tensor.shape:
        grad = grad.reshape(tensor.shape)
    return grad.contiguous()


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
        y, state, saved = straight.forward(inputs, keep=True)
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
        if (
            direct and _plans.find(tensors, ctx.flags).get("straight") is ctx.straight
        ):  # hooks may replace what is saved
            return (None, None, *ctx.straight.backward(dy, dstate, saved, inputs))
        *flags, _, backend = ctx.flags
        grads = _selective_scan_backward(dy, dstate, saved, *tensors, *flags, backend)
        by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
        names = (*TENSORS[:8], TENSORS[INITIAL])
        return (None, None, *(None if t is None else by_name[n] for n, t in zip(names, inputs, strict=True)))


def _scan_flops(x: Any, A: Any, dt_weight: Any, route: Any) -> int:
    """Multiplications and additions: 7 a state (decay, input, recurrence, read-out), 2 R for each projected dt."""
    routes, positions = (1, x[1]) if route is None else route
    elements = x[0] * positions * routes * x[-1]
    return elements * (7 * A[-1] + (0 if dt_weight is None else 2 * dt_weight[-1]))


@register_flop_formula(torch.ops.triscan.selective_scan)
def _forward_flops(x, dt, A, B, C, D, z, dt_bias, dt_weight, route, *args, **kwargs) -> int:
    return _scan_flops(x, A, dt_weight, route)


@register_flop_formula(torch.ops.triscan.selective_scan_backward)
def _backward_flops(dy, dstate, saved, x, dt, A, B, C, D, z, dt_bias, dt_weight, route, *args, **kwargs) -> int:
    """Twice the forward for the two adjoint scans, once more for the states that are computed again."""
    return 3 * _scan_flops(x, A, dt_weight, route)
