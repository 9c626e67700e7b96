"""RMSNorm with a gate, over groups of channels: what Mamba-2 and Mamba-3 have before their output projection.

Legend: E channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan


class GatedRMSNorm(nn.Module):
    """Normalises groups of channels and multiplies by silu(z), before or after (Dao & Gu 2024, section 7.1).

    Args:
        dim: E.
        group_size: Channels that share a mean square, a divisor of E.
        norm_before_gate: norm(x) * silu(z), else norm(x * silu(z)).
        eps: Added to the mean square.
        device: Where the weight lives.
        dtype: Its dtype.
    """

    def __init__(
        self,
        dim: int,
        group_size: int,
        norm_before_gate: bool,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group_size, self.norm_before_gate, self.eps = group_size, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(..., E) and the gate, likewise, to (..., E) in x's dtype."""
        y, _, _, _ = torch.ops.triscan.norm(
            x, self.weight, None, None, z, "rms", self.eps, self.group_size, self.norm_before_gate, True, "auto"
        )
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, group_size={self.group_size}, norm_before_gate={self.norm_before_gate}"
