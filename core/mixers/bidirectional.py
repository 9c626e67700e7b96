"""Mamba in both directions with shared projections (Schiff et al. 2024, "Caduceus", section 3.1).

Legend: B batch, L length, D model width, E inner width.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.mixers.mamba import Mamba


class BiMamba(nn.Module):
    """A causal and an anti-causal Mamba on the same input, (B, L, D) -> (B, L, D).

    Parameters have the published names, ``mamba_fwd.*`` and ``mamba_rev.*``. Tied projections are one parameter under
    two names.

    Args:
        d_model: Width D.
        bidirectional: Otherwise the causal one alone.
        bidirectional_strategy: The outputs are added ("add"), or multiplied element by element ("ew_multiply").
        bidirectional_weight_tie: in_proj and out_proj are shared; convolution, x_proj, dt_proj, A_log and D are not.
        device: Where the parameters live.
        dtype: Their dtype.
        mamba: Arguments of ``core.mixers.Mamba``.

    Raises:
        ValueError: For an unknown strategy, or sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        bidirectional: bool = True,
        bidirectional_strategy: str = "add",
        bidirectional_weight_tie: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mamba: Any,
    ) -> None:
        super().__init__()
        if bidirectional_strategy not in ("add", "ew_multiply"):
            raise ValueError(f'bidirectional_strategy: got {bidirectional_strategy!r}, wanted "add" or "ew_multiply"')
        self.strategy = bidirectional_strategy
        self.tied = bidirectional and bidirectional_weight_tie
        self.mamba_fwd = Mamba(d_model, device=device, dtype=dtype, **mamba)
        self.mamba_rev = Mamba(d_model, reverse=True, device=device, dtype=dtype, **mamba) if bidirectional else None
        if self.tied and self.mamba_rev is not None:
            for name in ("in_proj", "out_proj"):
                own, other = getattr(self.mamba_fwd, name), getattr(self.mamba_rev, name)
                other.weight, other.bias = own.weight, own.bias

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences; the arguments are those of ``core.mixers.Mamba.forward``.

        Returns:
            (B, L, D) in x's dtype.
        """
        if self.mamba_rev is None:
            return self.mamba_fwd(x, seq_idx, cu_seqlens)
        if self.tied and self.strategy == "add":
            return self._shared(x, seq_idx, cu_seqlens)
        forward, backward = self.mamba_fwd(x, seq_idx, cu_seqlens), self.mamba_rev(x, seq_idx, cu_seqlens)
        return forward + backward if self.strategy == "add" else forward * backward

    def _shared(self, x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Tied and added: each projection once, since out_proj is linear (its bias counts twice)."""
        assert self.mamba_rev is not None
        u, z = self.mamba_fwd.in_proj(x).chunk(2, dim=-1)
        total: Tensor | None = None
        for mamba in (self.mamba_fwd, self.mamba_rev):
            convolved, _ = mamba._conv(u, None, cu_seqlens, seq_idx, False)
            y, _ = mamba._scan(convolved, z, None, cu_seqlens, seq_idx, False)
            total = y if total is None else total + y
        assert total is not None
        out = self.mamba_fwd.out_proj
        return F.linear(total, out.weight, None if out.bias is None else 2 * out.bias)

    def forward_state(self, x: Tensor, state: Any, lengths: Tensor | None = None) -> NoReturn:
        """Not there: what a position becomes depends on what follows it.

        Raises:
            ValueError: Always.
        """
        raise ValueError("BiMamba: a bidirectional layer has no state to continue from; give it whole sequences")

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NoReturn:
        """Not there; see ``forward_state``.

        Raises:
            ValueError: Always.
        """
        raise ValueError("BiMamba: a bidirectional layer has no state to continue from; give it whole sequences")
