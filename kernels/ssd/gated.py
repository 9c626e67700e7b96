"""The scan of a Mamba-2 layer with its gate, on the way through the norm behind it: for reading prompts.

The gated norm reads what the scan has just written, once to sum up squares and once to divide. Here the scan multiplies
by gate and weight itself and hands on sums of squares; ``kernels.norm.late`` divides behind the output projection.
No gradients.

B batch, L tokens, H heads, P head dim, N state, G groups.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has
from kernels.checks import check_float, check_shape
from kernels.plans import Plans
from kernels.ssd import _resolve, ssd
from kernels.ssd.problem import Problem, make_problem

__all__ = ["gated_scan", "saves_a_pass"]

Limits = tuple[float, float]
_plans = Plans()


def gated_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, norm_weight: Tensor,
    initial_state: Tensor | None = None, *, dt_limit: Limits = (0.0, math.inf),
    state_dtype: torch.dtype | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``u = ssd(...) silu(z)`` (Dao & Gu 2024, section 7.1), which waits for its RMSNorm over all channels.

    Args:
        x: (B, L, H, P), as the next that ``kernels.ssd.ssd`` takes.
        dt: (B, L, H), before its bias and the softplus.
        A: (H,).
        B: (B, L, G, N).
        C: (B, L, G, N).
        D: (H,) or (H, P).
        z: (B, L, H, P) gate.
        dt_bias: (H,).
        norm_weight: (H P,) of the norm.
        initial_state: (B, H, P, N).
        dt_limit: Bounds of dt.
        state_dtype: Of the final state; that of the scan by default.
        backend: See ``kernels.ssd.ssd``.

    Returns:
        u times the norm's weight (B, L, H P) in x's dtype; u's squares summed over each head, (B, L, H) float32
        (float64); and the final state (B, H, P, N) in state_dtype.

    Raises:
        ValueError: If a shape, dtype, device or value does not fit.
    """
    p = _problem(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_limit, backend)
    check_float(x, norm_weight=norm_weight)
    check_shape("norm_weight", norm_weight, (p.heads * p.head_dim,), "(H P,)")
    name = _resolve(p, backend)
    if name == "triton" and _fits(p):
        from kernels.ssd.gluon_gated import forward

        return forward(p, norm_weight, state_dtype)
    y, state = ssd(x, dt, A, B, C, D, None, dt_bias, dt_limit=dt_limit, initial_state=initial_state,
                   return_final_state=True, backend=backend)  # fmt: skip
    u = y.to(p.dtype) * F.silu(z.to(p.dtype))
    state = state if state_dtype is None else state.to(state_dtype)
    return (u.flatten(2) * norm_weight.to(p.dtype)).to(x.dtype), u.square().sum(-1), state


def saves_a_pass(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, *, dt_limit: Limits = (0.0, math.inf),
) -> bool:  # fmt: skip
    """Whether ``gated_scan`` has a kernel for such tensors: elsewhere it is what it is defined by."""
    p = _problem(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_limit, "auto")
    return _resolve(p, "auto") == "triton" and _fits(p)


def _problem(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None, dt_limit: Limits, backend: str,
) -> Problem:  # fmt: skip
    tensors = (x, dt, A, B, C, D, z, dt_bias, None, initial_state, None, None)
    flags = (True, *dt_limit, "sum", False)
    return make_problem(*tensors, *flags, _plans.find(tensors, (*flags, backend)))


def _fits(p: Problem) -> bool:
    if "gated" not in p.plan:
        p.plan["gated"] = False
        if has("triton.experimental.gluon"):  # which no later version of Triton has to have
            from kernels.ssd.gluon_gated import fits

            p.plan["gated"] = fits(p)
    return p.plan["gated"]
