"""DSS, diagonal state spaces before S4D (Gupta, Gu & Berant 2022, "Diagonal state spaces are as effective as structured
state spaces", proposition 1).

Legend: B batch, L length, D model width, N real states of a channel, M = N/2 complex ones.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core import hippo
from core.mixers.s4_block import S4Block
from kernels.diagonal_ssm import vandermonde


class DSS(S4Block):
    """Mixes a sequence by diagonal state spaces without B, (B, L, D) -> (B, L, D).

    out = GLU(output_linear(GELU(K * u + D u))) with, for channel d, K_k = 2 Re sum_m W_dm S_dmk and

    - "exp": S_k = (exp(dt lambda) - 1) / lambda exp(k dt lambda), Re(lambda) < 0 (proposition 1a): a zero-order hold
      with B = 1, which runs as a recurrence too;
    - "softmax": S = row softmax of (k dt lambda), k < ``l_max``, over lambda (proposition 1b): any lambda, for the sum
      over all of ``l_max`` bounds it. A sum over what is to come is no recurrence: whole sequences only.

    The states lambda are shared by the channels and begin as the eigenvalues of HiPPO-LegS' normal part.

    Args:
        d_model: D.
        d_state: N, even.
        variant: "exp" or "softmax".
        l_max: Longest sequence of the softmax variant, which needs it; a shorter sequence has the first taps.
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        glu: Whether the output is gated.
        dropout: Probability, after the GELU.
        lr: Kept as the state space's ``_optim`` mark; None leaves it out.
        device: Where the parameters live.
        dtype: Of ``output_linear``; the others are float32, float64 where this is.

    Raises:
        ValueError: For sizes that do not fit, or an unknown variant.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        variant: Literal["exp", "softmax"] = "exp",
        l_max: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        glu: bool = True,
        dropout: float = 0.0,
        *,
        lr: float | None = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if variant not in ("exp", "softmax"):
            raise ValueError(f'variant: got {variant!r}, wanted "exp" or "softmax"')
        if variant == "softmax" and (l_max is None or l_max < 1):
            raise ValueError(f"l_max: got {l_max}, wanted the longest sequence: the softmax is over it")
        length = l_max if variant == "softmax" else None
        kernel = DSSKernel(d_model, d_state, length, dt_min, dt_max, lr=lr, device=device, dtype=dtype)
        super().__init__(d_model, kernel, glu, dropout, "scan" if length is None else "convolution", device, dtype)


class DSSKernel(nn.Module):
    """The state spaces of ``DSS``, without skip connection: a ``StateSpace``; see there for the arguments.

    Args:
        d_model: D.
        d_state: N.
        softmax_over: ``l_max`` of the softmax variant; None is the exp variant.
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        lr: Mark for optimisers, on all but W.
        device: Where the parameters live.
        dtype: float64 gives float64 parameters, all else float32.
    """

    Lambda_real: nn.Parameter  # (M,): log(-Re(lambda)) of the exp variant, which keeps Re(lambda) < 0; else Re(lambda)
    Lambda_imag: nn.Parameter  # (M,)
    log_dt: nn.Parameter  # (D,)
    W: nn.Parameter  # (D, M, 2)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        softmax_over: int | None = None,
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
        self.d_model, self.d_state, self.l_max = d_model, d_state, softmax_over
        Lambda = hippo.s4d_legs(d_state)
        real = torch.log(-Lambda.real) if softmax_over is None else Lambda.real
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, tensor in (
            ("Lambda_real", real),
            ("Lambda_imag", Lambda.imag),
            ("log_dt", torch.log(hippo.log_uniform_dt(d_model, dt_min, dt_max))),
            ("W", torch.randn(d_model, len(Lambda), 2) * math.sqrt(0.5)),
        ):
            parameter = nn.Parameter(tensor.to(device=device, dtype=wide))
            if name != "W":
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
                if lr is not None:
                    parameter._optim = {"lr": lr, "weight_decay": 0.0}  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ``StateSpace``.

        Raises:
            ValueError: For the softmax variant, which has no recurrence.
        """
        log_a, B, W = self._discrete()
        initial = None if state is None else torch.view_as_complex(state.to(log_a.real.dtype).contiguous())
        given = u.to(log_a.real.dtype)
        y, after = torch.ops.triscan.diagonal_ssm(given, log_a, B, W, initial, "auto")
        return y.to(u.dtype), torch.view_as_real(after)

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """See ``StateSpace``."""
        log_a, B, W = self._discrete()
        a, x, outputs = torch.exp(log_a), torch.view_as_complex(state), []
        for token in u.to(state.dtype).unbind(1):
            x = a * x + B * token[..., None]
            outputs.append(2 * (W * x).real.sum(-1))
        state.copy_(torch.view_as_real(x))
        return torch.stack(outputs, dim=1).to(u.dtype)

    def taps(self, length: int) -> Tensor:
        """See ``StateSpace``.

        Raises:
            ValueError: Past ``l_max`` of the softmax variant.
        """
        if self.l_max is None:
            log_a, B, W = self._discrete()
            return vandermonde(log_a, B * W, length)
        if length > self.l_max:
            raise ValueError(
                f"DSS: got {length:,} positions, wanted at most l_max = {self.l_max:,}: the softmax is over so many; "
                "cut the sequence, or build the layer with a longer l_max"
            )
        real, imag, dt, W = self._values()
        h = dt * torch.complex(real, imag)
        grows = h.real > 0
        h = torch.where(grows, -h, h)  # a row that grows is one that decays, backwards from l_max
        weights = W / _sum_of_powers(h, self.l_max)
        backwards = vandermonde(h, weights * grows, self.l_max).flip(1)[:, :length]
        return vandermonde(h, weights * ~grows, length) + backwards

    def _values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lambda_real and Lambda_imag (M,), the time steps (D, 1) and W (D, M) complex, in float32 at least."""
        wide = torch.float64 if self.W.dtype == torch.float64 else torch.float32
        real, imag, log_dt, W = (t.to(wide) for t in (self.Lambda_real, self.Lambda_imag, self.log_dt, self.W))
        return real, imag, torch.exp(log_dt)[:, None], torch.view_as_complex(W)

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log Ā, B̄ and W of the exp variant, each (D, M) complex."""
        if self.l_max is not None:
            raise ValueError("DSS: the softmax variant takes whole sequences only, it has no state; use variant='exp'")
        real, imag, dt, W = self._values()
        Lambda = torch.complex(-torch.exp(real), imag)
        return dt * Lambda, torch.expm1(dt * Lambda) / Lambda, W


def _sum_of_powers(h: Tensor, length: int) -> Tensor:
    """The sum of exp(k h) over k < length, in complex128 on the way: the phase of the last one is long."""
    exact = h.to(torch.complex128)
    return (torch.expm1(length * exact) / torch.expm1(exact)).to(h.dtype)
