"""``mamba_chunk_scan_combined`` and ``mamba_split_conv1d_scan_combined`` of ``mamba_ssm.ops.triton.ssd_combined``.

B batch, L length, H heads, P head dim, N state, G groups, W conv width, M channels of an MLP beside the heads, D output
width, S packed sequences.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from kernels.mamba2_inner import mamba2_inner
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
    _check_chunks(chunk_size, state_dtype, x.dtype)

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


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything of a Mamba-2 layer behind its input projection; see ``kernels.mamba2_inner``.

    Args:
        zxbcdt: ``(B, L, 2 M + 2 H P + 2 G N + H)``: MLP gate and input, gate, x, B, C, dt.
        conv1d_weight: ``(H P + 2 G N, W)``, any W.
        conv1d_bias: ``(H P + 2 G N,)`` or None.
        dt_bias: ``(H,)``.
        A: ``(H,)``, negative.
        D: ``(H, P)``, or ``(H,)`` together with ``headdim``.
        chunk_size: Positive; changes nothing in the result.
        initial_states: ``(B, H, P, N)`` or None.
        seq_idx: ``(B, L)``; convolution and state restart where it changes.
        dt_limit: dt is clamped between these two.
        return_final_states: Whether to return the state after the last position, ``(B, H, P, N)``.
        activation: "silu" or "swish", the same.
        rmsnorm_weight: ``(H P,)``, or None for a gate without norm.
        rmsnorm_eps: Of the norm.
        outproj_weight: ``(D, M + H P)``, or None for no projection.
        outproj_bias: ``(D,)`` or None.
        headdim: P, wanted where D doesn't tell.
        ngroups: G.
        norm_before_gate: norm(y) silu(z), else norm(y silu(z)).
        state_dtype: As in ``mamba_chunk_scan_combined``.

    Returns:
        ``(B, L, D)``, without a projection ``(B, L, M + H P)``; and the final states, if asked for.

    Raises:
        ValueError: For a chunk size below 1, another activation, no way to know P, or a narrower ``state_dtype``.
    """
    _check_chunks(chunk_size, state_dtype, zxbcdt.dtype)
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation: got {activation!r}, wanted 'silu' or 'swish'")
    if headdim is None and D.ndim != 2:
        raise ValueError(f"headdim: got None with D of shape {tuple(D.shape)}, wanted it, or D (H, P)")
    width = D.shape[1] if headdim is None else headdim
    if outproj_weight is None:
        inner = (zxbcdt.shape[-1] - A.shape[0] - conv1d_weight.shape[0] + A.shape[0] * width) // 2
        outproj_weight = torch.eye(inner, device=zxbcdt.device, dtype=zxbcdt.dtype)
    return mamba2_inner(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, outproj_weight, outproj_bias,
        initial_states, headdim=width, ngroups=ngroups, eps=rmsnorm_eps, norm_before_gate=norm_before_gate,
        dt_limit=dt_limit, return_final_state=return_final_states, seq_idx=seq_idx,
    )  # fmt: skip


def _check_chunks(chunk_size: int, state_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Raises for chunks and states between them that the ops here do not have."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, wanted at least 1; it doesn't change the result")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if state_dtype not in (None, wide):
        raise ValueError(f"state_dtype: got {state_dtype}, wanted None or {wide}: states are not rounded here")
