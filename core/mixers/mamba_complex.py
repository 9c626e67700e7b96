"""Mamba with complex A (Gu & Dao 2023, sections 3.6 and 4.4: the choice for continuous signals such as sound).

Legend: B batch, L length, D model width, E inner width, N complex states of a channel, R dt rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from core.mixers.contract import decode_by_copy
from core.mixers.mamba import Mamba, MambaState


class MambaComplex(Mamba):
    """As ``Mamba``, with complex states: A = -exp(A_log) + i A_imag, B and C complex, y = 2 Re <C, h> + D x.

    A begins as S4D-Lin. ``d_state`` counts complex states; each costs two real ones. The state's part of a
    ``MambaState`` is (B, E, N, 2): real and imaginary parts.

    Args:
        d_model: Width D.
        d_state: Complex states N of a channel.
        arguments: All others of ``Mamba``, by name.

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(self, d_model: int, d_state: int = 8, **arguments: Any) -> None:
        super().__init__(d_model, d_state, **arguments)
        like = self.x_proj.weight
        self.x_proj = nn.Linear(
            self.d_inner, self.dt_rank + 4 * d_state, bias=False, device=like.device, dtype=like.dtype
        )
        n = torch.arange(d_state, device=self.A_log.device, dtype=self.A_log.dtype)
        with torch.no_grad():
            self.A_log.fill_(math.log(0.5))
        self.A_imag = nn.Parameter((math.pi * n).repeat(self.d_inner, 1))
        self.A_imag._no_weight_decay = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def decode(self, x: Tensor, state: MambaState) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``."""
        return decode_by_copy(self, x, state)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> MambaState:
        """The state before the first token: zeros; see ``Mamba.init_state``."""
        conv, ssm = super().init_state(batch_size, device, dtype, max_length=max_length)
        return MambaState(conv, torch.stack([ssm, ssm], dim=-1))

    def _scan(
        self,
        x: Tensor,
        z: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        A = torch.complex(-torch.exp(self.A_log.to(wide)), self.A_imag.to(wide))
        dt, B, C = torch.split(self.x_proj(x), [self.dt_rank, 2 * self.d_state, 2 * self.d_state], dim=-1)
        B, C = (torch.complex(t[..., ::2].to(wide), t[..., 1::2].to(wide)).unsqueeze(2) for t in (B, C))
        first = None if initial is None else torch.view_as_complex(initial.contiguous())
        y, final, _ = torch.ops.triscan.selective_scan(
            x, dt, A, B, C, self.D, z, self.dt_proj.bias, self.dt_proj.weight, None, first, cu_seqlens, seq_idx,
            True, True, "sum", self.reverse, keep, "auto",
        )  # fmt: skip
        return y, torch.view_as_real(final) if keep else y.new_empty(0)
