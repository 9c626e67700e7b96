"""S4's block without a gate around any transformation (Gu et al. 2021, section 3.4; the rows "no gate" of table 1 of
Gu & Dao 2023).

Legend: B batch, L length, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.mixers.around import Around
from core.mixers.inner import InnerName, make_inner


class UngatedBlock(Around):
    """Mixes a sequence by a transformation, then channels, (B, L, D) -> (B, L, D): out = GLU(out_proj(GELU(inner(u)))).

    The GLU acts on channels of one token: no path multiplies the input with what the transformation remembers. With
    "s4" this is S4.

    Args:
        d_model: D.
        inner: "s4", "s4d", "dss", "s6" or "hyena"; see ``core.mixers.inner``.
        inner_cfg: Its arguments.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For a name or an argument that does not exist, or sizes that do not fit.
    """

    conv1d = None

    def __init__(
        self,
        d_model: int,
        inner: InnerName = "s4",
        inner_cfg: dict[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model: got {d_model}, wanted at least 1")
        self.inner = make_inner(inner, d_model, inner_cfg, device, dtype)
        self.out_proj = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, twice: there is no convolution."""
        return x, x

    def between(self, convolved: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
        """x, twice: there is no gate."""
        return convolved, passed

    def after(self, y: Tensor, gate: Tensor) -> Tensor:
        """GLU(out_proj(GELU(y)))."""
        return F.glu(self.out_proj(F.gelu(y)), dim=-1)
