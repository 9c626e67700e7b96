"""The definition of ``diagonal_ssm``: a loop over time, differentiable, in the dtype of its arguments.

    x_t = exp(log_a) x_{t-1} + B u_t        y_t = 2 Re sum_m C_m x_{t,m}

B batch, L length, H channels, M complex states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_ssm(u: Tensor, log_a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, H) in u's dtype and the final state (B, H, M)."""
    a, outputs = torch.exp(log_a), []
    x = log_a.new_zeros(u.shape[0], *log_a.shape) if initial_state is None else initial_state
    for t in range(u.shape[1]):
        x = a * x + B * u[:, t, :, None].to(log_a.real.dtype)
        outputs.append(2 * (C * x).real.sum(-1).to(u.dtype))
    y = torch.stack(outputs, dim=1) if outputs else u.new_empty(u.shape)
    return y, x.clone()
