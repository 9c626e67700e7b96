"""Mamba-S4: the block of Mamba around a time-invariant state space (Gu & Dao 2023, appendix E.4: the outer layers of
the audio ablation), and so Mamba without selection.

Legend: B batch, L length, D model width, E inner width (expand * D), N state, W convolution width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core.mixers.mamba import last_inputs
from core.mixers.packed import run_packed, zero_padding
from core.mixers.s4 import S4Kernel
from core.mixers.s4_block import StateSpace, after_rows
from core.mixers.s4d import S4DKernel


class MambaS4State(NamedTuple):
    """What a Mamba-S4 layer remembers."""

    conv: Tensor  # (B, W - 1, E): the last inputs of the convolution, oldest first
    ssm: Tensor  # (B, E, N/2, 2): real and imaginary parts, float32, float64 for a float64 layer


class MambaS4(nn.Module):
    """Mixes a sequence by gated, time-invariant state spaces, (B, L, D) -> (B, L, D).

    x, z = in_proj(u); x = silu(conv1d(x)); y = SSM(x) + D x; out = out_proj(y * silu(z)).

    Args:
        d_model: Width D.
        d_state: Real states N of a channel, even.
        d_conv: Width W of the causal convolution, at least 1.
        expand: E = expand * d_model.
        diagonal: S4D's diagonal state space, or S4's.
        kernel_cfg: Further arguments of ``S4DKernel`` or ``S4Kernel``, such as ``init`` or ``n_ssm``.
        conv_bias: Whether the convolution has a bias.
        bias: Whether in_proj and out_proj have biases.
        device: Where the parameters live.
        dtype: Their dtype; those of the state space are float32 at least.

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        diagonal: bool = True,
        kernel_cfg: dict[str, Any] | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted at least 1")
        self.d_model, self.d_conv, self.d_inner = d_model, d_conv, expand * d_model
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, device=device, dtype=dtype)
        kind = S4DKernel if diagonal else S4Kernel
        self.kernel = kind(inner, d_state, **(kernel_cfg or {}), device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.D = nn.Parameter(torch.ones(inner, device=device, dtype=wide))
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences (B, L, D); see ``Mixer`` for packed ones. Outputs at padding are zeros."""
        if seq_idx is not None or cu_seqlens is not None:
            return run_packed(self, x, seq_idx, cu_seqlens)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = self._conv(x, None, False)
        return self._out(self.kernel.run(x, None)[0], x, z)

    def forward_state(
        self, x: Tensor, state: MambaS4State, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaS4State]:
        """Continues sequences from ``state``; see ``Mixer``. With ``lengths`` the rows' states are found in turn."""
        x = x if lengths is None else zero_padding(x, lengths)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        inputs = x
        x, conv = self._conv(x, state.conv, True)
        y, ssm = self.kernel.run(x, state.ssm)
        if lengths is not None:
            conv = last_inputs(inputs, state.conv, lengths)
            ssm = after_rows(self.kernel, x, state.ssm, lengths)
        return self._out(y, x, z), MambaS4State(conv.to(state.conv.dtype), ssm)

    @torch.no_grad()
    def decode(self, x: Tensor, state: MambaS4State) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = torch.ops.triscan.conv_update(
            x, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", "auto"
        )
        space: StateSpace = self.kernel
        return self._out(space.steps(x, state.ssm), x, z)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> MambaS4State:
        """The state before the first token, zeros; see ``Mixer``. The convolution's part has ``dtype``."""
        weight = self.in_proj.weight
        device, dtype = weight.device if device is None else device, weight.dtype if dtype is None else dtype
        wide = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        conv = torch.zeros(batch_size, self.d_conv - 1, self.d_inner, device=device, dtype=dtype)
        size = (batch_size, self.d_inner, self.kernel.d_state // 2, 2)
        return MambaS4State(conv, torch.zeros(size, device=device, dtype=wide))

    def _conv(self, x: Tensor, initial: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.triscan.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, initial, None, None, "silu", False, keep, "auto"
        )

    def _out(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return self.out_proj((y + x * self.D.to(x.dtype)) * F.silu(z))
