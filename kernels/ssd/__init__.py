"""State space duality (SSD, the scan of Mamba-2 and Mamba-3) as one op, with the options of ``selective_scan``.

``ssd`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.ssd``, whose arguments are the same by position; checks and dispatch are inside the op.
``semiseparable_matrix`` is the matrix that the op multiplies by, spelled out.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import recompute
from kernels.backend import choose, resolve
from kernels.checks import owned
from kernels.plans import Plans
from kernels.registration import op
from kernels.ssd.problem import Problem, make_problem
from kernels.ssd.quadratic import semiseparable_matrix

__all__ = ["semiseparable_matrix", "ssd"]

TENSORS: tuple[str, ...] = (
    "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "route", "initial_state", "cu_seqlens", "seq_idx",
)  # fmt: skip
KERNELS = ("cpu", "triton")  # backends with a forward and a backward of their own
DIFFERENTIABLE: tuple[str, ...] = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
MODES = ("chunked", "recurrent", "quadratic")
CHUNK = 64  # positions of a chunk that the counted operations assume


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


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    route: Tensor | None = None,
    merge: Literal["sum", "keep"] = "sum",
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mode: Literal["chunked", "recurrent", "quadratic"] = "chunked",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t`` (Dao & Gu 2024, section 2 and 6).

    The state of a head is a P x N matrix, float32 (float64 for float64 x). Real dtypes may be mixed; everything but the
    indices is differentiable, the states included. B batch, L tokens, H heads, P head dim, N state, G groups, K
    routes, T scan positions.

    Args:
        x: ``(B, L, H, P)``; with a route also ``(B, L, K, H, P)``, one input per route.
        dt: ``(B, L, H)``, with a route ``(B, L, K, H)``.
        A: ``(H,)``, with a route ``(K, H)``; negative, or 0 for a state that forgets nothing.
        B: ``(B, L, G, N)``, with a route ``(B, L, K, G, N)``; heads h H/G share group h.
        C: As B.
        D: Skip connection per head ``(H,)`` or channel ``(H, P)``, with a route ``(K, H)`` or ``(K, H, P)``.
        z: Gate ``(B, L, H, P)``: y is multiplied by silu(z), after the routes are merged.
        dt_bias: ``(H,)``, with a route ``(K, H)``; added to dt before the softplus.
        dt_softplus: Whether dt goes through softplus.
        dt_limit: dt is clamped between these two, after the softplus.
        route: ``(K, T)`` int32 or int64, the token at each scan position. -1 is a padding slot: x, B, C and the raw dt
            are zero there, the state still decays, the output is dropped. A route visits a token at most once; where
            it doesn't, its output is zero. Values are checked on the CPU only (elsewhere that would wait for the GPU).
        merge: ``sum`` adds the routes, ``(B, L, H, P)``; ``keep`` returns ``(B, L, K, H, P)``.
        reverse: Scans from the last position to the first: the flip of the scan of the flipped inputs.
        initial_state: ``(B, H, P, N)``, with a route ``(B, K, H, P, N)``, with ``cu_seqlens`` ``(S, H, P, N)``.
        return_final_state: Whether to return the state after the last position, shaped as ``initial_state``.
        cu_seqlens: ``(S + 1,)`` int32 or int64 bounds of S sequences that lie end to end in a batch of one; some may be
            empty.
        seq_idx: ``(B, L)`` int32 or int64. The state restarts from zero where the value changes; the initial state
            enters the first sequence of a row, the final state is that of its last. -1 marks padding: skipped, whatever
            it holds, output zero.
        mode: ``chunked``, the algorithm to use; ``recurrent``, the loop over positions; ``quadratic``, one product
            with ``semiseparable_matrix``, L^2 in time and memory. All compute the same; the last two are plain
            operators, for study and tests.
        backend: ``auto``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y in x's dtype, and the final state if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]), merge, reverse)
    plain = _plain_mode(mode, backend)
    if plain is None:
        y, state = _ssd(*tensors, *flags, return_final_state, backend)
    else:  # plain operators: differentiable twice, exportable
        y, state = _implementation(plain).scan(make_problem(*tensors, *flags))
        state = state if route is not None else state.squeeze(1)
    return (y, state) if return_final_state else y


def _plain_mode(mode: str, backend: str) -> str | None:
    """The implementation in plain operators that the two name, None where the custom op runs."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, wanted one of {', '.join(MODES)}")
    if mode == "chunked":
        return backend if backend in ("torch", "reference") else None
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"backend: got {backend!r} together with mode={mode!r}, which is plain operators; "
            "leave the backend out, or use mode='chunked'"
        )
    return "reference" if mode == "recurrent" else "quadratic"


def _resolve(p: Problem, backend: str) -> str:
    """The backend that runs a problem."""
    if "backend" not in p.plan:
        p.plan["backend"] = _choose(p, backend)
    return p.plan["backend"]


def _choose(p: Problem, backend: str) -> str:
    """The same at the first call; on the CPU plain operators are the kernel, with or without numba."""
    if p.x.device.type == "cpu" and choose(backend, p.x.device)[1].startswith("device cpu"):
        return "cpu"
    return resolve("ssd", backend, p.x.device)


def _implementation(name: str) -> Any:
    """The module behind a name: ``scan`` for plain operators, ``forward`` and ``backward`` for kernels."""
    if name == "cpu":
        from kernels.ssd import cpu as module
    elif name == "triton":
        from kernels.ssd import triton as module
    elif name == "torch":
        from kernels.ssd import aten as module
    elif name == "quadratic":
        from kernels.ssd import quadratic as module
    else:
        from kernels.ssd import reference as module
    return module


_plans, _backward_plans = Plans(), Plans()
_loaded = functools.cache(_implementation)  # an import statement takes microseconds; inside an op nothing is traced


@op
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    merge: str,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and the final state (empty if not asked for)."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, dt_min, dt_max, merge, reverse)
    p = make_problem(*tensors, *flags, _plans.find(tensors, (*flags, return_final_state, backend)))
    name = _resolve(p, backend)
    if name in KERNELS:
        y, state = _loaded(name).forward(p)
    else:  # an op's outputs are tensors of their own: no views, no aliases of its inputs
        y, state = (t.clone(memory_format=torch.contiguous_format) for t in _loaded(name).scan(p))
    if not return_final_state:
        return y, x.new_empty(0, dtype=p.dtype)
    return y, (state if route is not None else owned(state, (p.sequences, p.heads, p.head_dim, p.state)))


@_ssd.register_fake
def _(
    x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx,
    dt_softplus, dt_min, dt_max, merge, reverse, return_final_state, backend,
):  # fmt: skip
    p = make_problem(
        x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx,
        dt_softplus, dt_min, dt_max, merge, reverse,
    )  # fmt: skip
    keep = (p.routes,) if route is not None and not p.merge else ()
    lead = (p.routes,) if route is not None else ()
    y = x.new_empty((p.batch, p.length, *keep, p.heads, p.head_dim))
    size = (p.sequences, *lead, p.heads, p.head_dim, p.state) if return_final_state else (0,)
    return y, x.new_empty(size, dtype=p.dtype)


@op
def _ssd_backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    merge: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of ``DIFFERENTIABLE``, shaped as the inputs; empty for absent ones."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, dt_min, dt_max, merge, reverse)
    p = make_problem(*inputs, *flags, _backward_plans.find((dy, dstate, *inputs), (*flags, backend)))
    name = _resolve(p, backend)
    if name not in KERNELS:
        scan = _loaded(name).scan
        grads = recompute.gradients(lambda *t: scan(make_problem(*t, *flags)), inputs, (dy, dstate))  # type: ignore
        return tuple(grads[TENSORS.index(n)] for n in DIFFERENTIABLE)  # type: ignore[return-value]
    if dstate is not None and route is None:
        dstate = dstate.unsqueeze(1)
    g = _loaded(name).backward(p, dy, dstate)._asdict()
    return tuple(_like(g[n], inputs[TENSORS.index(n)], x) for n in DIFFERENTIABLE)  # type: ignore[return-value]


def _like(grad: Tensor | None, tensor: Tensor | None, x: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its input; an empty tensor where there is no input."""
    if tensor is None or grad is None:
        return x.new_empty(0)
    return grad.reshape(tensor.shape).to(tensor.dtype).contiguous()


@_ssd_backward.register_fake
def _(
    dy, dstate, x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx,
    dt_softplus, dt_min, dt_max, merge, reverse, backend,
):  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(x.new_empty(0 if t is None else t.shape, dtype=None if t is None else t.dtype) for t in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *flags, return_final_state, backend = inputs[len(TENSORS) :]
    ctx.flags = (*flags, backend)
    ctx.has_state = return_final_state
    ctx.save_for_backward(*inputs[: len(TENSORS)])
    ctx.set_materialize_grads(False)
    ctx.y = (output[0].shape, output[0].dtype, output[0].device)


def _backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    none = (None,) * (len(TENSORS) + len(ctx.flags) + 1)
    if dy is None and dstate is None:
        return none
    if dy is None:
        shape, dtype, device = ctx.y
        dy = torch.zeros(shape, dtype=dtype, device=device)
    grads = _ssd_backward(dy, dstate if ctx.has_state else None, *tensors, *ctx.flags)
    by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
    inputs = (by_name.get(n) if t is not None else None for n, t in zip(TENSORS, tensors, strict=True))
    return (*inputs, *none[len(TENSORS) :])


_ssd.register_autograd(_backward, setup_context=_setup_context)


def _flops(x: Any, B: Any, route: Any, products: tuple[int, int, int]) -> int:
    """Operations of so many products of Q x N x Q a group, of Q x P x Q a head and of Q x P x N a head."""
    routes, positions = (1, x[1]) if route is None else route
    groups, state = B[-2:]
    heads, width = x[-2:]
    scores, inside, states = products
    each = scores * groups * CHUNK * state + inside * heads * CHUNK * width + states * heads * width * state
    return 2 * x[0] * positions * routes * each


@register_flop_formula(torch.ops.triscan.ssd)
def _forward_flops(x, dt, A, B, C, D, z, dt_bias, route, *args, **kwargs) -> int:
    """C B^T; its product with x; reading and writing the state."""
    return _flops(x, B, route, (1, 1, 2))


@register_flop_formula(torch.ops.triscan.ssd_backward)
def _backward_flops(dy, dstate, x, dt, A, B, C, D, z, dt_bias, route, *args, **kwargs) -> int:
    """Two products for each of the forward's; C B^T and the states are computed again."""
    return _flops(x, B, route, (3, 2, 5))
