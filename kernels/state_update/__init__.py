"""The decoding step of the recurrences S6 and SSD as one op: a few tokens, the state updated in place.

``state_update`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.state_update``, whose arguments are the same by position; checks and dispatch are inside the op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import choose, resolve
from kernels.checks import owned
from kernels.state_update.problem import Problem, make_problem

__all__ = ["state_update"]


def state_update(
    state: Tensor,
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
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Runs ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = h_t C_t + D x_t`` and leaves the last h in ``state``.

    The recurrences of ``selective_scan`` (Gu & Dao 2023, algorithm 2) and ``ssd`` (Dao & Gu 2024, section 6) for
    decoding: no chunks, no gradients. Everything is computed in float32 (float64 where x or the state is) whatever
    the state's dtype, which it is rounded to once, after the last token. Nothing waits for the device, so that a CUDA
    graph can hold the call. B batch, T >= 1 tokens, D channels or H heads of P channels, N state, G groups, S states.

    Args:
        state: ``(S, D, N)`` for S6 or ``(S, H, P, N)`` for SSD, any float dtype; updated in place. S = B without
            ``state_indices``.
        x: ``(B, T, D)`` or ``(B, T, H, P)``.
        dt: ``(B, T, D)``; for SSD ``(B, T, H)``, or ``(B, T, H, P)``.
        A: ``(D, N)``; for SSD ``(H,)``, or ``(H, P, N)``; negative.
        B: ``(B, T, G, N)``; channels d G/D or heads h G/H share a group.
        C: As B.
        D: Skip connection ``(D,)``; for SSD ``(H,)`` or ``(H, P)``.
        z: Gate, shape of x: y is multiplied by silu(z).
        dt_bias: As D; added to dt before the softplus.
        dt_softplus: Whether dt goes through softplus.
        dt_limit: dt is clamped between these two, after the softplus.
        state_indices: ``(B,)`` int32 or int64: the row of ``state`` that belongs to each row of x, at most once each.
            -1 is a padding row: y is zero there and no state changes. Values are checked on the CPU only.
        backend: ``auto``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    return torch.ops.triscan.state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        state_indices,
        dt_softplus,
        float(dt_limit[0]),
        float(dt_limit[1]),
        backend,
    )


def _implementation(p: Problem, backend: str) -> Any:
    """The module whose ``update`` runs a problem; on the CPU plain operators are the kernel, with or without numba."""
    name = "cpu"
    if p.x.device.type != "cpu" or not choose(backend, p.x.device)[1].startswith("device cpu"):
        name = resolve("state_update", backend, p.x.device)
    if name == "triton":
        from kernels.state_update import triton as module
    elif name == "reference":
        from kernels.state_update import reference as module
    else:
        from kernels.state_update import cpu as module
    return module


@torch.library.custom_op("triscan::state_update", mutates_args=("state",))
def _state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> Tensor:
    """y in the shape of x."""
    p = make_problem(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, dt_min, dt_max)
    return owned(_implementation(p, backend).update(p), x.shape)


@_state_update.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, dt_min, dt_max, backend):
    make_problem(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, dt_min, dt_max)
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.triscan.state_update)
def _flops(state, x, *args, **kwargs) -> int:
    """Decay, outer product and sum: two operations each for a state and token."""
    total = 6 * state[-1]
    for size in x:
        total *= size
    return total
