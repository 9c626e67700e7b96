"""S5, one state space with many inputs and outputs, by a parallel scan (Smith, Warrington & Linderman 2023, "Simplified
state space layers for sequence modeling", section 3).

Legend: B batch, L length, D model width, N real states, P = N/2 complex ones, J blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import hippo
from core.mixers.contract import decode_by_copy
from core.mixers.linear_scan import linear_scan
from core.mixers.packed import run_packed, zero_padding
from kernels.checks import full_precision


class S5State(NamedTuple):
    """What an S5 layer remembers."""

    ssm: Tensor  # (B, P, 2): real and imaginary parts, float32, float64 for a float64 layer


class S5(nn.Module):
    """Mixes a sequence and its channels by one diagonal state space, (B, L, D) -> (B, L, D).

    x_t = exp(dt Lambda) x_{t-1} + (exp(dt Lambda) - 1) / Lambda B u_t; y_t = 2 Re(C x_t) + D u_t;
    g = GELU(y); out = g * sigmoid(out_proj(g)). Lambda, dt (P,); B (P, D); C (D, P): every state sees every channel.

    Lambda begins as the eigenvalues of HiPPO-LegS' normal part, of J smaller ones for J blocks; B and C are drawn in
    the real basis and turned into that of the eigenvectors (section B.1 of the paper).

    Args:
        d_model: D.
        d_state: N, even.
        blocks: J, a divisor of N with an even quotient.
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        lr: Kept as the ``_optim`` mark of Lambda, B and the time steps, as published; None leaves it out.
        device: Where the parameters live.
        dtype: Of ``out_proj``; the others are float32, float64 where this is.

    Raises:
        ValueError: For sizes that do not fit.
    """

    Lambda_real: nn.Parameter  # log(-Re(Lambda)) (P,)
    Lambda_imag: nn.Parameter  # (P,)
    log_dt: nn.Parameter  # (P,)
    B: nn.Parameter  # (P, D, 2)
    C: nn.Parameter  # (D, P, 2)
    D: nn.Parameter  # (D,)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        blocks: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        *,
        lr: float | None = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model: got {d_model}, wanted at least 1")
        if blocks < 1 or d_state < 2 or d_state % (2 * blocks):
            raise ValueError(
                f"d_state and blocks: got {d_state} and {blocks}, wanted blocks of an even size (conjugate pairs)"
            )
        self.d_model, self.d_state = d_model, d_state
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        legs = hippo.nplr_legs(d_state // blocks)
        turn = legs.V.mH  # (P / J, N / J)
        B = torch.cat([turn @ _normal(d_state // blocks, d_model, d_model) for _ in range(blocks)])
        C = torch.cat([_normal(d_model, d_state // blocks, d_state) @ legs.V for _ in range(blocks)], dim=1)
        Lambda = legs.Lambda.repeat(blocks)
        for name, tensor in (
            ("Lambda_real", torch.log(-Lambda.real)),
            ("Lambda_imag", Lambda.imag),
            ("log_dt", torch.log(hippo.log_uniform_dt(d_state // 2, dt_min, dt_max))),
            ("B", torch.view_as_real(B)),
            ("C", torch.view_as_real(C)),
            ("D", torch.randn(d_model)),
        ):
            parameter = nn.Parameter(tensor.to(device=device, dtype=wide).contiguous())
            parameter._no_weight_decay = name != "C"  # type: ignore[attr-defined]
            if lr is not None and name not in ("C", "D"):
                parameter._optim = {"lr": lr, "weight_decay": 0.0}  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype; zeros at padding.
        """
        if seq_idx is not None or cu_seqlens is not None:
            return run_packed(self, x, seq_idx, cu_seqlens)
        return self.forward_state(x, self.init_state(x.shape[0]))[0]

    def forward_state(self, x: Tensor, state: S5State, lengths: Tensor | None = None) -> tuple[Tensor, S5State]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row, 0 to L. Outputs at padding mean nothing.

        Returns:
            The output (B, L, D) and the state after the last real token of each row.
        """
        x = x if lengths is None else zero_padding(x, lengths)
        with full_precision(x.device):
            log_a, B, C = self._discrete()
            u = x.to(log_a.real.dtype)
            before = torch.view_as_complex(state.ssm)
            states = linear_scan(log_a, u.to(B.dtype) @ B.T, before)
            y = 2 * (states @ C.T).real + u * self.D
            all_states = torch.cat([before[:, None], states], dim=1)
            last = torch.full((x.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths
            after = all_states.gather(1, last.long()[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
        g = F.gelu(y.to(x.dtype))
        return g * torch.sigmoid(self.out_proj(g)), S5State(torch.view_as_real(after).to(state.ssm.dtype))

    @torch.no_grad()
    def decode(self, x: Tensor, state: S5State) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``."""
        return decode_by_copy(self, x, state)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> S5State:
        """The state before the first token: zeros.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Accepted; the state is float32, float64 for a layer of float64 parameters.
            max_length: Accepted; the size of the state does not depend on it.
        """
        wide = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        where = self.D.device if device is None else device
        return S5State(torch.zeros(batch_size, self.d_state // 2, 2, device=where, dtype=wide))

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt Lambda (P,), the discrete B (P, D) and C (D, P), by zero-order hold."""
        wide = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        real, imag, log_dt, B, C = (
            t.to(wide) for t in (self.Lambda_real, self.Lambda_imag, self.log_dt, self.B, self.C)
        )
        Lambda = torch.complex(-torch.exp(real), imag)
        h = torch.exp(log_dt) * Lambda
        return h, (torch.expm1(h) / Lambda)[:, None] * torch.view_as_complex(B), torch.view_as_complex(C)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}"


def _normal(rows: int, columns: int, fan_in: int) -> Tensor:
    """A real matrix with variance 1 / fan_in, as complex128."""
    return (torch.randn(rows, columns, dtype=torch.float64) / math.sqrt(fan_in)).to(torch.complex128)
