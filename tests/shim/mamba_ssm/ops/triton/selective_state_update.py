"""The published function by ours, and the reference that its tests import.

B batch, D channels, H heads, P head dim, N state, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import state_update
from kernels.compat import selective_state_update

__all__ = ["selective_state_update", "selective_state_update_ref"]


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Our reference op on states ``(B, H, P, N)``; ``(B, D, N)`` is one head. No number is taken as tied."""
    heads = state.ndim == 4
    if not heads:
        state, A = state[:, None], A[None]
        x, dt = x[:, None], dt[:, None]
        z = None if z is None else z[:, None]
        D, dt_bias = (None if t is None else t[None] for t in (D, dt_bias))
    B, C = (t if t.ndim == 3 else t[:, None] for t in (B, C))
    x, dt, B, C = (torch.stack([t], 1) for t in (x, dt, B, C))
    z = None if z is None else z[:, None]
    y = state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, backend="reference")
    return y[:, 0] if heads else y[:, 0, 0]
