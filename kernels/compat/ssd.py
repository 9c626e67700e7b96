"""``mamba_chunk_scan_combined`` of ``mamba_ssm.ops.triton.ssd_combined``.

B batch, L length, H heads, P head dim, N state, G groups, S packed sequences.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from kernels.ssd import ssd


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """State space duality by chunks (Dao & Gu 2024, section 6).

    Args:
        x: ``(B, L, H, P)``.
        dt: ``(B, L, H)``.
        A: ``(H,)``, negative.
        B: ``(B, L, G, N)``.
        C: ``(B, L, G, N)``.
        chunk_size: Positive; changes nothing in the result. The chunks' length here follows from the shapes.
        D: ``(H,)`` or ``(H, P)``, or None.
        z: Gate ``(B, L, H, P)`` or None.
        dt_bias: ``(H,)`` or None.
        initial_states: ``(B, H, P, N)`` or None.
        seq_idx: ``(B, L)``; the state restarts where it changes.
        cu_seqlens: ``(S + 1,)`` bounds of the sequences that ``seq_idx`` tells apart, for their last states.
        dt_softplus: Whether dt goes through softplus.
        dt_limit: dt is clamped between these two.
        return_final_states: Whether to return the state after the last position, ``(B, H, P, N)``.
        return_varlen_states: Whether to return the last state of each packed sequence, ``(S, H, P, N)``; differentiable
            here. Needs ``cu_seqlens`` and B = 1, and, as in the original, no initial states.
        state_dtype: Dtype of the states between chunks; they are float32 (float64 for float64 x) here, so only None and
            that are taken.

    Returns:
        ``(B, L, H, P)`` in x's dtype; then the final states, then those of the packed sequences, if asked for.

    Raises:
        ValueError: For a chunk size below 1, a narrower ``state_dtype``, or sequences' states without bounds.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, wanted at least 1; it doesn't change the result")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state_dtype not in (None, wide):
        raise ValueError(f"state_dtype: got {state_dtype}, wanted None or {wide}: states are not rounded here")

    def run(initial: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        found = ssd(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, initial_state=initial,
            return_final_state=True, cu_seqlens=cu_seqlens, seq_idx=seq_idx,
        )  # fmt: skip
        return cast(tuple[Tensor, Tensor], found)

    if not return_varlen_states:
        y, final = run(initial_states, seq_idx, None)
        return (y, final) if return_final_states else y
    if cu_seqlens is None:
        raise ValueError("return_varlen_states: got it without cu_seqlens, wanted the bounds of the sequences too")
    if initial_states is not None:
        raise ValueError("initial_states: got them together with return_varlen_states, wanted None; call kernels.ssd")
    y, states = run(None, None, cu_seqlens)
    return (y, states[-1:], states) if return_final_states else (y, states)
