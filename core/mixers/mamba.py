"""Mamba, the selective state-space layer (Gu & Dao 2023, figure 3 and algorithm 2).

Legend: B batch, L length, D model width, E inner width (expand * D), N state, R dt rank, W convolution width.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._jit_internal import is_scripting

import kernels  # noqa: F401  registers torch.ops.triscan
from core import hippo
from core.forget import forget, may_forget
from core.parallel import sequence


class MambaState(NamedTuple):
    """What a Mamba layer remembers of the sequence so far."""

    conv: Tensor  # (B, W - 1, E): the last inputs of the convolution, oldest first
    ssm: Tensor  # (B, E, N): float32, float64 for a float64 layer


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), computed in float32 at least: in bfloat16 neighbouring rates would coincide."""
    wide = A_log if A_log.dtype == torch.float64 else A_log.float()
    return -torch.exp(wide)


torch.fx.wrap("decay_rates")  # a tracer has no dtypes to compare


class Mamba(nn.Module):
    """Mixes a sequence by gated, selective state spaces, (B, L, D) -> (B, L, D).

    x, z = in_proj(u); x = silu(conv1d(x)); dt, B, C = x_proj(x); dt = softplus(dt_proj(dt));
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t; y_t = <C_t, h_t> + D x_t; out = out_proj(y * silu(z)).

    Parameters have the published names and shapes. ``A_log`` and ``D`` are float32 whatever ``dtype`` is; a later
    ``.to(dtype)`` casts them as it casts every parameter, and the layer computes with them in float32 again.

    Args:
        d_model: Width D of the input and output.
        d_state: State size N per channel.
        d_conv: Width W of the causal convolution, at least 1.
        expand: E = expand * d_model, which must be whole.
        dt_rank: Rank R of the time-step projection; "auto" is ceil(d_model / 16).
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_init: "random" or "constant" weights of dt_proj.
        dt_scale: Their scale, in units of R^-1/2.
        dt_init_floor: Initial time steps below it are raised to it.
        conv_bias: Whether the convolution has a bias.
        bias: Whether in_proj and out_proj have biases.
        reverse: Anti-causal: every position sees itself and what follows it. Equal to flipping the input and the
            output of the causal layer.
        device: Where the parameters live.
        dtype: Their dtype (``A_log`` and ``D`` excepted).

    Raises:
        ValueError: For sizes that do not fit, or an unknown dt_init.
    """

    carries_state: ClassVar[bool] = True  # a block may run it piece by piece with gradients: see ``core.block``

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        reverse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.reverse = reverse
        _check_sizes(d_model, d_state, d_conv, expand, dt_rank, dt_init)

        inner, rank = self.d_inner, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, device=device, dtype=dtype)
        # Holds weight (E, 1, W) and bias (E,); the convolution itself is kernels.causal_conv1d.
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, device=device, dtype=dtype)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(rank, inner, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.A_log = nn.Parameter(torch.empty(inner, d_state, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(inner, device=device, dtype=wide))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, device=device, dtype=dtype)

        # Marks that optimisers and initialisers of the wider ecosystem look for.
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self._reset_ssm(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    @torch.no_grad()
    def _reset_ssm(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, floor: float) -> None:
        """The published initialisation: small weights and softplus(bias) log-uniform for dt, S4D-Real for A, ones."""
        scale = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        dt = hippo.log_uniform_dt(self.d_inner, dt_min, dt_max, floor, device=self.dt_proj.bias.device)
        self.dt_proj.bias.copy_(hippo.inverse_softplus(dt))
        self.A_log.copy_(torch.log(-hippo.s4d_real(self.d_state)))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype.
        """
        before, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = self._conv(before, None, cu_seqlens, seq_idx, False)
        if not is_scripting():
            self._leave_out(x, before, cu_seqlens, seq_idx)
        y, _ = self._scan(x, z, None, cu_seqlens, seq_idx, False)
        return self.out_proj(y)

    def forward_state(self, x: Tensor, state: MambaState, lengths: Tensor | None = None) -> tuple[Tensor, MambaState]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step.

        A ``reverse`` layer runs from the right: feed it the last piece of the sequence first.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row, 0 to L. Outputs at padding mean nothing.

        Returns:
            The output (B, L, D) and the state after the last real token of each row.

        Raises:
            ValueError: With lengths in a ``reverse`` layer, where the padding would come first.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if lengths is None:
            x, conv_state = self._conv(x, state.conv, None, None, True)
            y, ssm_state = self._scan(x, z, state.ssm, None, None, True)
        else:
            if self.reverse:
                raise ValueError("lengths: a reverse layer cannot skip right padding; pass rows of one length each")
            # Causal: right padding cannot reach a real token, so only the states have to stop at the real end.
            conv_state = last_inputs(x, state.conv, lengths)
            seq_idx = -(torch.arange(x.shape[1], device=x.device) >= lengths[:, None]).to(torch.int32)
            x, _ = self._conv(x, state.conv, None, None, False)
            y, ssm_state = self._scan(x, z, state.ssm, None, seq_idx, True)
        return self.out_proj(y), MambaState(conv_state.to(state.conv.dtype), ssm_state.to(state.ssm.dtype))

    @torch.no_grad()
    def decode(self, x: Tensor, state: MambaState) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or ``forward_state``; its tensors are updated in place.

        Returns:
            (B, L, D).
        """
        if self.reverse:
            raise ValueError("decode: a reverse layer sees what follows, there is nothing to decode; use forward_state")
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = torch.ops.triscan.conv_update(
            x, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", "auto"
        )
        dt, B, C = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        y = torch.ops.triscan.state_update(
            state.ssm, x, dt, decay_rates(self.A_log), B.unsqueeze(2), C.unsqueeze(2), self.D, z, self.dt_proj.bias,
            None, True, 0.0, math.inf, "auto",
        )  # fmt: skip
        return self.out_proj(y)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> MambaState:
        """The state before the first token: zeros.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of the convolution's part; the parameters' by default. The scan's part is float32 (or float64).
            max_length: Accepted; the size of the state does not depend on it.
        """
        device = self.in_proj.weight.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        conv = torch.zeros(batch_size, self.d_conv - 1, self.d_inner, device=device, dtype=dtype)
        return MambaState(conv, torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=wide))

    def _leave_out(self, y: Tensor, x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> None:
        """Have the convolution's output computed again: one pass over what in_proj left, which is kept."""
        if may_forget():
            x = x.detach()
            forget(y, lambda: self._conv(x, None, cu_seqlens, seq_idx, False)[0])

    def _conv(
        self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        return sequence.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, initial, cu_seqlens, seq_idx,
            "silu", self.reverse, keep, "auto",
        )  # fmt: skip

    def _scan(
        self,
        x: Tensor,
        z: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        dt, B, C = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        return sequence.selective_scan(
            x, dt, decay_rates(self.A_log), B.unsqueeze(2), C.unsqueeze(2), self.D, z,
            self.dt_proj.bias, self.dt_proj.weight, None, initial, cu_seqlens, seq_idx,
            True, True, "sum", self.reverse, keep, "auto",
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, reverse={self.reverse}"


def last_inputs(x: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
    """The last inputs of a causal convolution after each row's real tokens.

    Args:
        x: (B, L, E) new inputs, right-padded.
        state: (B, S, E) inputs before them, oldest first.
        lengths: (B,) number of real inputs of each row.

    Returns:
        (B, S, E): of state and x laid end to end, the S inputs that end at each row's last real one.
    """
    joined = torch.cat([state, x.to(state.dtype)], dim=1)
    index = lengths[:, None] + torch.arange(state.shape[1], device=x.device)
    return joined.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _check_sizes(d_model: int, d_state: int, d_conv: int, expand: float, dt_rank: int | str, dt_init: str) -> None:
    for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted at least 1")
    if int(expand * d_model) != expand * d_model or expand <= 0:
        raise ValueError(f"expand: got {expand}, wanted a positive factor that makes expand * {d_model} whole")
    if dt_rank != "auto" and (isinstance(dt_rank, str) or dt_rank < 1):
        raise ValueError(f'dt_rank: got {dt_rank!r}, wanted a positive integer or "auto"')
    if dt_init not in ("random", "constant"):
        raise ValueError(f'dt_init: got {dt_init!r}, wanted "random" or "constant"')
