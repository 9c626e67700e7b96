"""The published functions by ours, and the references that their tests import.

B batch, D channels, L length, W conv width, S new tokens, T columns of a state.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from kernels import causal_conv1d
from kernels.compat import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Our reference op with channels before tokens: x ``(B, D, L)``, states ``(B, D, W - 1)``."""
    y, state = causal_conv1d(
        torch.einsum("bdl->bld", x), weight, bias, activation=_silu(activation), seq_idx=seq_idx,
        initial_state=None if initial_states is None else torch.einsum("bdw->bwd", initial_states),
        return_final_state=True, backend="reference",
    )  # fmt: skip
    y, state = torch.einsum("bld->bdl", y), torch.einsum("bwd->bdw", state)
    if not return_final_states:
        return y
    return y, state if final_states_out is None else final_states_out.copy_(state)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """A convolution over the state ``(B, D, T)`` and x, ``(B, D)`` or ``(B, D, S)``, end to end; S outputs count.

    With ``cache_seqlens (B,)`` the state is a circular buffer: it is unrolled first and rolled up again.
    """
    new = x[..., None] if x.ndim == 2 else x
    shifts = [0] * len(x) if cache_seqlens is None else [int(n) % conv_state.shape[-1] for n in cache_seqlens]
    outputs = []
    for row, shift in enumerate(shifts):
        joined = torch.cat([conv_state[row].roll(-shift, -1), new[row].to(conv_state.dtype)], -1)[None]
        y = causal_conv1d_ref(joined.to(weight.dtype), weight, bias, activation=activation)
        outputs.append(cast(Tensor, y)[0, :, -new.shape[-1] :])
        kept = joined[0, :, -conv_state.shape[-1] :]
        conv_state[row] = kept.roll(0 if cache_seqlens is None else shift + new.shape[-1], -1)
    return torch.stack(outputs).view(x.shape).to(x.dtype)


def _silu(activation: str | None) -> Literal["silu"] | None:
    return None if activation is None else "silu"
