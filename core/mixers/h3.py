"""H3, two state spaces with a multiplication before and after the second (Fu et al. 2023, "Hungry Hungry Hippos",
section 3 and algorithm 1), here with any transformation as the second.

Legend: B batch, L length, D model width, N state, W width of the shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.mixers.around import Around
from core.mixers.inner import InnerName, make_inner


class H3(Around):
    """Mixes a sequence by a shift, a state space and two gates, (B, L, D) -> (B, L, D).

    q, k, v = q_proj(u), k_proj(u), v_proj(u); out = out_proj(q * SSM(shift(k) * v)).

    The shift SSM's A moves the state by one place and its B is the first unit vector, so that it is the causal
    convolution of its C with the last W inputs; that is how it runs. Heads have one channel, as in the published
    models: shift(k) v^T is then a product of numbers.

    Args:
        d_model: D.
        d_conv: W, the state of the shift SSM.
        inner: The second state space: "s4d" as published, "s4", "dss", "s6" or "hyena"; see ``core.mixers.inner``.
        inner_cfg: Its arguments.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For a name or an argument that does not exist, or sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        d_conv: int = 4,
        inner: InnerName = "s4d",
        inner_cfg: dict[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_conv < 1:
            raise ValueError(f"d_model and d_conv: got {d_model} and {d_conv}, wanted at least 1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, **factory) for _ in range(3))
        # Holds weight (D, 1, W) and bias (D,); the convolution itself is kernels.causal_conv1d.
        self.conv1d = nn.Conv1d(d_model, d_model, d_conv, groups=d_model, **factory)
        self.inner = make_inner(inner, d_model, inner_cfg, **factory)
        self.out_proj = nn.Linear(d_model, d_model, **factory)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k, and [q, v] that pass by the shift."""
        return self.k_proj(x), torch.cat([self.q_proj(x), self.v_proj(x)], dim=-1)

    def between(self, convolved: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
        """shift(k) * v, and q."""
        q, v = passed.chunk(2, dim=-1)
        return convolved * v, q

    def after(self, y: Tensor, gate: Tensor) -> Tensor:
        """out_proj(q * y)."""
        return self.out_proj(gate * y)
