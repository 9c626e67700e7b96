"""The selective scan (S6) as one op: over tokens in order, along routes, packed, backwards, on any device.

``selective_scan`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.selective_scan``, whose arguments are the same by position; checks and dispatch are inside the op.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.selective_scan import flops  # noqa: F401  registers formulas
from kernels.selective_scan.op import Gradients, eager, implementation
from kernels.selective_scan.problem import make_problem

__all__ = ["Gradients", "selective_scan"]


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
        cu_seqlens: ``(S + 1,)`` int32 or int64 bounds of S sequences that lie end to end in a batch of one; some may be
            empty.
        seq_idx: ``(B, L)`` int32 or int64. The state restarts from zero where the value changes; the initial state
            enters the first sequence of a row, the final state is that of its last. -1 marks padding: skipped, whatever
            it holds, output zero.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y in x's dtype, and the final state if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx)
    flags = (dt_softplus, route_params, merge, reverse)
    if backend in ("torch", "reference"):  # plain operators: differentiable twice, exportable
        y, state = implementation(backend).scan(make_problem(*tensors, *flags))
        state = state if route is not None else state.squeeze(1)
    elif torch.compiler.is_compiling():
        y, state, _ = torch.ops.triscan.selective_scan(*tensors, *flags, return_final_state, backend)
    else:
        y, state = eager(tensors, (*flags, return_final_state, backend))
    return (y, state) if return_final_state else y  # type: ignore[return-value]
