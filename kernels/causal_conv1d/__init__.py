"""The causal depthwise convolution as one op: over tokens in order, along routes, packed, backwards, on any device.

``causal_conv1d`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.causal_conv1d``, whose arguments are the same by position; checks and dispatch are inside the op.

B batch, L tokens, D channels, K routes, P scan positions, W conv width, S sequences (rows of the state).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import resolve, runs_on_numba
from kernels.causal_conv1d.order import (
    final_state,
    final_state_backward,
    initial_state_backward,
    last_inputs,
    scan_order,
)
from kernels.causal_conv1d.problem import Problem, make_problem
from kernels.checks import owned
from kernels.plans import Plan, Plans
from kernels.recompute import gradients
from kernels.registration import op

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    route: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes ``y_t = act(bias + sum_w weight[:, w] x_{t - W + 1 + w})``, the short convolution of Mamba.

    Sums are formed in float32 (float64 for float64 x). Float dtypes may be mixed; everything but the indices is
    differentiable, the states included. B batch, L tokens, D channels, K routes, P scan positions, W width.

    Args:
        x: ``(B, L, D)``; with a route also ``(B, L, K, D)``, one input per route.
        weight: ``(D, W)`` with any W >= 1, with a route ``(K, D, W)``. The last tap is the current token's.
        bias: ``(D,)``, with a route ``(K, D)``.
        activation: ``silu`` or None.
        route: ``(K, P)`` int32 or int64, the token at each scan position; the convolution runs along it. -1 is a
            padding slot: a zero input whose output is dropped. A route visits a token at most once; where it doesn't,
            the output is zero. Values are checked on the CPU only (elsewhere that would wait for the GPU).
        reverse: Taps look forward instead: the flip of the convolution of the flipped input.
        initial_state: The W - 1 inputs before the first one, oldest first: ``(B, W - 1, D)``, with a route
            ``(B, K, W - 1, D)``, with ``cu_seqlens`` ``(S, W - 1, D)``.
        return_final_state: Whether to return the last W - 1 inputs, in x's dtype, shaped as ``initial_state``.
        cu_seqlens: ``(S + 1,)`` int32 or int64 bounds of S sequences that lie end to end in a batch of one; some may be
            empty.
        seq_idx: ``(B, L)`` int32 or int64. Tokens see only their own sequence, which ends where the value changes; the
            initial state enters the first sequence of a row, the final state is that of its last. -1 marks padding:
            such tokens count for nothing, their output is zero.
        backend: ``auto``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y in x's dtype, ``(B, L, D)`` or with a route ``(B, L, K, D)``, and the final state if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    in_order = route is None and cu_seqlens is None and seq_idx is None
    if in_order and not torch.compiler.is_compiling() and x.is_cpu and runs_on_numba(backend):
        # without the op and its dispatch, where nothing but the kernels has a part
        found = _loaded("cpu_direct").find(x, weight, bias, activation, reverse, initial_state, return_final_state)
        if found is not None:
            return found if return_final_state else found[0]
    tensors = (x, weight, bias, route, initial_state, cu_seqlens, seq_idx)
    if backend in ("torch", "reference"):  # plain operators: differentiable twice, exportable
        p = make_problem(*tensors, activation or "", reverse)
        y, state = _implementation(backend).conv(p)
        y, state = y.reshape(p.y_shape), state.reshape(p.state_shape)
    else:
        y, state = _causal_conv1d(*tensors, activation or "", reverse, return_final_state, backend)
    return (y, state) if return_final_state else y


def _implementation(name: str) -> Any:
    """The module behind a backend: ``conv`` for plain operators, ``forward`` and ``backward`` for kernels."""
    if name == "cpu":
        from kernels.causal_conv1d import cpu as module
    elif name == "cpu_direct":
        from kernels.causal_conv1d import cpu_direct as module
    elif name == "triton":
        from kernels.causal_conv1d import triton as module
    elif name == "torch":
        from kernels.causal_conv1d import aten as module
    else:
        from kernels.causal_conv1d import reference as module
    return module


_plans, _backward_plans = Plans(), Plans()
_loaded = functools.cache(_implementation)  # an import statement takes microseconds; inside an op nothing is traced


def _resolve(plan: Plan, backend: str, device: torch.device) -> str:
    """The backend that runs a problem."""
    if "backend" not in plan:
        plan["backend"] = resolve("causal_conv1d", backend, device)
    return plan["backend"]


@op
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and the final state (empty if not asked for)."""
    tensors = (x, weight, bias, route, initial_state, cu_seqlens, seq_idx)
    plan = _plans.find(tensors, (activation, reverse, return_final_state, backend))
    if "plain" in plan:
        return plan["plain"].plain_forward(plan, x, weight, bias), x.new_empty(0)
    p = make_problem(*tensors, activation, reverse, plan)
    name = _resolve(plan, backend, x.device)
    if name in ("cpu", "triton"):
        y, state = _by_kernels(name, p, return_final_state)
    else:
        y, state = _loaded(name).conv(p)
    y = owned(y, p.y_shape)
    if not return_final_state:
        _keep_plain(name, p)
    if state is None or not return_final_state:
        return y, x.new_empty(0)
    return y, owned(state, p.state_shape)


def _by_kernels(name: str, p: Problem, return_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """y and, on request, the final state, in routed form."""
    order = None
    if name == "cpu" and (given := _loaded("cpu_direct").rows_of(p)) is not None:
        return _loaded("cpu_direct").forward(*given, return_final_state)
    if not p.length:
        y = p.x.new_empty((p.batch, 0, p.routes, p.channels))
    elif _walks(name, p):
        from kernels.causal_conv1d import triton_walk

        y = triton_walk.forward(p)
    else:
        order = scan_order(p)
        y = _loaded(name).forward(p, order)
    if not return_final_state:
        return y, None
    return y, last_inputs(p) if p.in_order else final_state(p, order or scan_order(p))


def _walks(name: str, p: Problem) -> bool:
    """Whether the GPU kernels for tokens in order run the problem; they need no tables."""
    if name != "triton":
        return False
    from kernels.causal_conv1d.triton_walk import takes

    return takes(p)


def _keep_plain(name: str, p: Problem) -> None:
    """Notes in a problem's plan if the next one can go the short way."""
    if _walks(name, p):
        from kernels.causal_conv1d import triton_walk

        if triton_walk.is_plain(p):
            p.plan["plain"] = triton_walk


@_causal_conv1d.register_fake
def _(
    x, weight, bias, route, initial_state, cu_seqlens, seq_idx, activation, reverse, return_final_state, backend
):  # fmt: skip
    p = make_problem(x, weight, bias, route, initial_state, cu_seqlens, seq_idx, activation, reverse)
    return x.new_empty(p.y_shape), x.new_empty(p.state_shape if return_final_state else (0,))


@op
def _causal_conv1d_backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state, shaped as these; empty for absent ones."""
    tensors = (x, weight, bias, route, initial_state, cu_seqlens, seq_idx)
    plan = _backward_plans.find((dy, dstate, *tensors), (activation, reverse, backend))
    if "plain" in plan:
        dx, dweight, dbias = plan["plain"].plain_backward(plan, dy, x, weight, bias)
        return dx, dweight, x.new_empty(0) if dbias is None else dbias, x.new_empty(0)
    p = make_problem(*tensors, activation, reverse, plan)
    name = _resolve(plan, backend, x.device)
    if name not in ("cpu", "triton"):
        conv = _loaded(name).conv

        def run(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
            return conv(make_problem(x, weight, bias, route, initial_state, cu_seqlens, seq_idx, activation, reverse))

        grads = gradients(run, (x, weight, bias, initial_state), (dy, dstate))
        return grads[0], grads[1], grads[2], grads[3]
    found = _backward_by_kernels(name, p, dy, dstate)
    if dstate is None and dy.stride(-1) == 1:
        _keep_plain(name, p)
    dx, dweight, dbias, dinitial = (
        x.new_empty(0) if t is None or grad is None else grad.reshape(t.shape).to(t.dtype).contiguous()
        for grad, t in zip(found, (x, weight, bias, initial_state), strict=True)
    )
    return dx, dweight, dbias, dinitial


def _backward_by_kernels(
    name: str, p: Problem, dy: Tensor, dstate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four gradients in routed form; kernels do those of x, weight and bias, the short states are left to ATen."""
    if name == "cpu" and (given := _loaded("cpu_direct").rows_of(p)) is not None:
        return _loaded("cpu_direct").backward(dy.contiguous().resolve_neg(), dstate, *given, True)
    dy, order = dy.reshape(p.batch, p.length, p.routes, p.channels), None
    if not p.length:  # the state alone, along padding slots
        dx, dweight = torch.zeros_like(p.x), torch.zeros_like(p.weight)
        dbias = None if p.bias is None else torch.zeros_like(p.bias)
        g = p.x.new_zeros((p.batch, p.routes, p.positions, p.channels), dtype=p.dtype)
    elif _walks(name, p):
        from kernels.causal_conv1d import triton_walk

        dx, dweight, dbias, g = triton_walk.backward(p, dy)
    else:
        order = scan_order(p)
        dx, dweight, dbias, g = _loaded(name).backward(p, order, dy.contiguous())
    if p.initial_state is None and dstate is None:
        return dx, dweight, dbias, None
    order, dinitial = order or scan_order(p), None
    if p.initial_state is not None:
        assert g is not None
        dinitial = initial_state_backward(p, order, g)
    if dstate is not None:
        dstate = dstate.reshape(p.sequences, p.routes, p.width - 1, p.channels)
        final_state_backward(p, order, dstate, dx, dinitial)
    return dx, dweight, dbias, dinitial


@_causal_conv1d_backward.register_fake
def _(dy, dstate, x, weight, bias, route, initial_state, cu_seqlens, seq_idx, activation, reverse, backend):
    inputs = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, reverse, return_final_state, backend = inputs
    ctx.flags = (activation, reverse, backend)
    ctx.has_state = return_final_state
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.y = (output[0].shape, output[0].dtype, output[0].device)


def _backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    none = (None,) * 4
    if dy is None and (dstate is None or not ctx.has_state):
        return (None,) * len(tensors) + none
    if dy is None:
        shape, dtype, device = ctx.y
        dy = torch.zeros(shape, dtype=dtype, device=device)
    bias, initial_state = tensors[2], tensors[4]
    dx, dweight, dbias, dinitial = _causal_conv1d_backward(dy, dstate if ctx.has_state else None, *tensors, *ctx.flags)
    dbias = None if bias is None else dbias
    dinitial = None if initial_state is None else dinitial
    return (dx, dweight, dbias, None, dinitial, None, None, *none)


_causal_conv1d.register_autograd(_backward, setup_context=_setup_context)


def _conv_flops(x: Any, weight: Any, route: Any) -> int:
    """A multiplication and an addition per tap."""
    routes, positions = (1, x[1]) if route is None else route
    return 2 * x[0] * positions * routes * x[-1] * weight[-1]


@register_flop_formula(torch.ops.triscan.causal_conv1d)
def _forward_flops(x, weight, bias, route, *args, **kwargs) -> int:
    return _conv_flops(x, weight, route)


@register_flop_formula(torch.ops.triscan.causal_conv1d_backward)
def _backward_flops(dy, dstate, x, weight, bias, route, *args, **kwargs) -> int:
    """The sums again for the activation's slope, then those of dx and dweight."""
    return 3 * _conv_flops(x, weight, route)
