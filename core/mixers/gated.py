"""Mamba's block around any transformation (Gu & Dao 2023, figure 3 and table 1).

Legend: B batch, L length, D model width, E inner width, W convolution width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.mixers.around import Around
from core.mixers.inner import InnerName, make_inner


class GatedBlock(Around):
    """Mixes a sequence by a convolution, a transformation and a gate, (B, L, D) -> (B, L, D).

    x, z = in_proj(u); x = silu(conv1d(x)); out = out_proj(inner(x) * silu(z)). With "s6" this is Mamba.

    Args:
        d_model: D.
        d_conv: W.
        expand: E = expand * D, which must be whole.
        inner: "s4", "s4d", "dss", "s6" or "hyena"; see ``core.mixers.inner``.
        inner_cfg: Its arguments.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For a name or an argument that does not exist, or sizes that do not fit.
    """

    activation = "silu"

    def __init__(
        self,
        d_model: int,
        d_conv: int = 4,
        expand: float = 2,
        inner: InnerName = "s6",
        inner_cfg: dict[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_conv < 1:
            raise ValueError(f"d_model and d_conv: got {d_model} and {d_conv}, wanted at least 1")
        width = int(expand * d_model)
        if width != expand * d_model or width < 1:
            raise ValueError(f"expand: got {expand}, wanted a positive factor that makes expand * {d_model} whole")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False, **factory)
        # Holds weight (E, 1, W) and bias (E,); the convolution itself is kernels.causal_conv1d.
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, **factory)
        self.inner = make_inner(inner, width, inner_cfg, **factory)
        self.out_proj = nn.Linear(width, d_model, bias=False, **factory)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and z."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return x, z

    def between(self, convolved: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
        """x as it is, and z."""
        return convolved, passed

    def after(self, y: Tensor, gate: Tensor) -> Tensor:
        """out_proj(y * silu(z))."""
        return self.out_proj(y * F.silu(gate))
