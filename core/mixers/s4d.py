"""S4D, a diagonal time-invariant state space on each channel (Gu et al. 2022, "On the parameterization and
initialization of diagonal state space models"), in the block of S4 (Gu et al. 2021, section 3.4).

Legend: B batch, L length, D model width, N real states of a channel, M = N/2 complex ones, S copies of A and B.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core import hippo
from core.mixers.s4_block import S4Block, S4State, StateSpace
from kernels.diagonal_ssm import vandermonde

__all__ = [
    "S4D",
    "S4Block",
    "S4DKernel",
    "S4State",
    "StateSpace",
    "add_parameters",
    "check_names",
    "continuous",
    "spread",
]

INITS = {
    "lin": hippo.s4d_lin,
    "inv": hippo.s4d_inv,
    "quad": hippo.s4d_quad,
    "real": lambda d_state: hippo.s4d_real(d_state // 2).to(torch.complex128),
    "legs": hippo.s4d_legs,
}
DISCRETIZATIONS = ("zoh", "bilinear")


class S4D(S4Block):
    """Mixes a sequence by diagonal state spaces, (B, L, D) -> (B, L, D).

    x_t = Ā x_{t-1} + B̄ u_t; y_t = 2 Re(C x_t) + D u_t; out = GLU(output_linear(GELU(y))), where Ā, B̄ are A, B
    discretised with a step of each channel.

    Parameters have the published names and shapes; foreign layouts are converted by ``core.mixers.s4_layouts``.

    Args:
        d_model: Width D.
        d_state: Real states N of a channel, even: N/2 complex ones and their conjugates.
        init: Of A: "lin", "inv", "quad", "real" or "legs"; see ``core.hippo``. "legs" also sets B.
        disc: "zoh" or "bilinear".
        n_ssm: Copies S of A and B, a divisor of D; channel d has copy d mod S. D by default.
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_transform: How ``inv_dt`` becomes the time step: "exp" or "softplus".
        glu: Whether the output is gated.
        dropout: Probability, after the GELU.
        method: See ``S4Block``.
        lr: Kept as the state space's ``_optim`` mark, as published; None leaves it out.
        device: Where the parameters live.
        dtype: Of ``output_linear``; the others are float32, float64 where this is.

    Raises:
        ValueError: For sizes that do not fit, or an unknown name.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: Literal["lin", "inv", "quad", "real", "legs"] = "lin",
        disc: Literal["zoh", "bilinear"] = "zoh",
        n_ssm: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_transform: Literal["exp", "softplus"] = "exp",
        glu: bool = True,
        dropout: float = 0.0,
        *,
        method: Literal["scan", "convolution"] = "scan",
        lr: float | None = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = S4DKernel(
            d_model, d_state, init, disc, n_ssm, dt_min, dt_max, dt_transform, lr=lr, device=device, dtype=dtype
        )
        super().__init__(d_model, kernel, glu, dropout, method, device, dtype)


class S4DKernel(nn.Module):
    """The diagonal state spaces of ``S4D``, without skip connection: a ``StateSpace``; see there for the arguments."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: str = "lin",
        disc: str = "zoh",
        n_ssm: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_transform: str = "exp",
        *,
        lr: float | None = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        copies = d_model if n_ssm is None else n_ssm
        check_names(d_model, d_state, copies, init, tuple(INITS), dt_transform)
        if disc not in DISCRETIZATIONS:
            raise ValueError(f"disc: got {disc!r}, wanted one of {', '.join(DISCRETIZATIONS)}")
        self.d_model, self.d_state, self.disc, self.dt_transform = d_model, d_state, disc, dt_transform
        A = INITS[init](d_state)
        B = hippo.nplr_legs(d_state).B if init == "legs" else torch.ones_like(A)
        add_parameters(self, A, B, copies, dt_min, dt_max, lr, device, dtype)

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ``StateSpace``."""
        log_a, B, C = self.discrete()
        initial = None if state is None else torch.view_as_complex(state.to(log_a.real.dtype).contiguous())
        given = u if (u.dtype == torch.float64) == (log_a.dtype == torch.complex128) else u.to(log_a.real.dtype)
        y, after = torch.ops.triscan.diagonal_ssm(given, log_a, B, C, initial, "auto")
        return y.to(u.dtype), torch.view_as_real(after)

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """See ``StateSpace``."""
        log_a, B, C = self.discrete()
        a, x, outputs = torch.exp(log_a), torch.view_as_complex(state), []
        for token in u.to(state.dtype).unbind(1):
            x = a * x + B * token[..., None]
            outputs.append(2 * (C * x).real.sum(-1))
        state.copy_(torch.view_as_real(x))
        return torch.stack(outputs, dim=1).to(u.dtype)

    def taps(self, length: int) -> Tensor:
        """See ``StateSpace``."""
        log_a, B, C = self.discrete()
        return vandermonde(log_a, B * C, length)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """The discrete system: log Ā, B̄ and C, each (D, M) complex.

        Zero-order hold: Ā = exp(dt A), B̄ = (Ā - 1)/A B. Bilinear: Ā = (1 + dt A/2)/(1 - dt A/2), B̄ = dt B/(1 - dt A/2)
        (Gu et al. 2022, S4D, section 3.1). The forms here do not cancel at small steps.
        """
        A, B, C, dt = continuous(self)
        h = A * dt
        if self.disc == "zoh":
            return h, B * torch.expm1(h) / A, C
        return torch.log1p(h / 2) - torch.log1p(-h / 2), B * dt / (1 - h / 2), C


def add_parameters(
    module: Any,
    A: Tensor,
    B: Tensor,
    copies: int,
    dt_min: float,
    dt_max: float,
    lr: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    **more: Tensor,
) -> None:
    """Gives a module the published parameters of a state space: inv_dt, C, B, A_real, A_imag and, as B, ``more``.

    Args:
        module: With ``d_model`` and ``dt_transform``.
        A: (M,) complex, Re < 0.
        B: (M,) complex.
        copies: S.
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        lr: Mark for optimisers, on all but C.
        device: Where.
        dtype: float64 gives float64 parameters, all else float32.
        more: Further vectors (M,) complex by name.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dt = hippo.log_uniform_dt(module.d_model, dt_min, dt_max)
    inverse = torch.log(dt) if module.dt_transform == "exp" else hippo.inverse_softplus(dt)
    pairs = {name: torch.view_as_real(t).repeat(1, copies, 1, 1) for name, t in {"B": B, **more}.items()}
    C = torch.view_as_real(torch.randn(1, module.d_model, len(A), dtype=torch.complex64))
    tensors = {
        "inv_dt": inverse[:, None],
        "C": C,
        **pairs,
        "A_real": torch.log(-A.real).repeat(copies, 1),
        "A_imag": -A.imag.repeat(copies, 1),
    }
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor.to(device=device, dtype=wide).contiguous())
        if name != "C":
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
            if lr is not None:
                parameter._optim = {"lr": lr, "weight_decay": 0.0}  # type: ignore[attr-defined]
        module.register_parameter(name, parameter)


def continuous(module: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, C, each (D, M) complex, and the time steps (D, 1), of a module with the published parameters.

    A = -exp(A_real) - i A_imag, so that the real part stays negative (Goel et al. 2022, section 4.2).
    """
    wide = torch.float64 if module.inv_dt.dtype == torch.float64 else torch.float32
    inv_dt, A_real, A_imag = (t.to(wide) for t in (module.inv_dt, module.A_real, module.A_imag))
    dt = torch.exp(inv_dt) if module.dt_transform == "exp" else F.softplus(inv_dt)
    A = spread(torch.complex(-torch.exp(A_real), -A_imag), module)
    B, C = (spread(torch.view_as_complex(t.to(wide))[0], module) for t in (module.B, module.C))
    return A, B, C, dt


def spread(copies: Tensor, module: Any) -> Tensor:
    """(S, M) -> (D, M): channel d has copy d mod S."""
    return copies.repeat(module.d_model // copies.shape[0], 1)


def check_names(d_model: int, d_state: int, copies: int, init: str, inits: tuple[str, ...], dt_transform: str) -> None:
    """Refuses sizes and names that no state space has."""
    if d_model < 1:
        raise ValueError(f"d_model: got {d_model}, wanted at least 1")
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state: got {d_state}, wanted a positive even number (states come in conjugate pairs)")
    if copies < 1 or d_model % copies:
        raise ValueError(f"n_ssm: got {copies}, wanted a divisor of d_model = {d_model}")
    if init not in inits:
        raise ValueError(f"init: got {init!r}, wanted one of {', '.join(inits)}")
    if dt_transform not in ("exp", "softplus"):
        raise ValueError(f'dt_transform: got {dt_transform!r}, wanted "exp" or "softplus"')
