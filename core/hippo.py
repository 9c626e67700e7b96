"""Initial values of state-space layers: time steps, HiPPO matrices and their diagonal forms.

Everything is computed and returned in float64 or complex128; cast where a value becomes a parameter. Of a complex
conjugate pair one member is kept, the one with Im <= 0, so N real states are N/2 complex ones and an output is
``2 Re(...)``.

Legend: N state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def log_uniform_dt(
    size: int,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    floor: float = 0.0,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws time steps log-uniformly from [dt_min, dt_max] (Gu et al. 2022, "How to train your HiPPO").

    Args:
        size: Number of time steps.
        dt_min: Smallest step, in units of the sampling interval.
        dt_max: Largest step.
        floor: Steps below it are raised to it (Mamba's ``dt_init_floor``).
        device: Where to draw.
        generator: Source of randomness; the global one by default.

    Returns:
        dt (size,), float64.

    Raises:
        ValueError: Unless 0 < dt_min <= dt_max.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min and dt_max: got {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")
    uniform = torch.rand(size, device=device, dtype=torch.float64, generator=generator)
    return torch.exp(math.log(dt_min) + uniform * (math.log(dt_max) - math.log(dt_min))).clamp(min=floor)


def inverse_softplus(y: Tensor) -> Tensor:
    """The x with softplus(x) = y > 0: x = y + log(1 - exp(-y)), which neither overflows nor cancels."""
    return y + torch.log(-torch.expm1(-y))


def s4d_real(d_state: int) -> Tensor:
    """S4D-Real: A_n = -(n + 1), the default of Mamba (Gu et al. 2022, "On the parameterization and initialization of
    diagonal state space models", section 4; Gu & Dao 2023, section 3.6).

    Returns:
        A (N,), float64.
    """
    return -torch.arange(1, d_state + 1, dtype=torch.float64)


def s4d_lin(d_state: int) -> Tensor:
    """S4D-Lin: A_n = -1/2 - i pi n, n < N/2 (Gu et al. 2022, S4D, section 4; here the conjugate).

    Returns:
        A (N/2,), complex128.
    """
    n = torch.arange(_half(d_state), dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), -math.pi * n)


def s4d_inv(d_state: int) -> Tensor:
    """S4D-Inv: A_n = -1/2 - i N/pi (N/(2n + 1) - 1), n < N/2 (Gu et al. 2022, S4D, section 4;
    here the conjugate).

    It approximates the eigenvalues of HiPPO-LegS' normal part (``s4d_legs``) in closed form.

    Returns:
        A (N/2,), complex128.
    """
    n = torch.arange(_half(d_state), dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), -d_state / math.pi * (d_state / (2 * n + 1) - 1))


def s4d_quad(d_state: int) -> Tensor:
    """S4D-Quad: A_n = -1/2 - i (1 + 2n)^2 / pi, n < N/2 (Gu et al. 2022, S4D, an ablation of
    S4D-Lin; here the conjugate).

    Returns:
        A (N/2,), complex128.
    """
    n = torch.arange(_half(d_state), dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), -((1 + 2 * n) ** 2) / math.pi)


def s4d_legs(d_state: int) -> Tensor:
    """S4D-LegS: the eigenvalues of HiPPO-LegS' normal part (Gu et al. 2022, S4D, section 4; Gupta et al. 2022,
    DSS).

    Returns:
        A (N/2,), complex128, by increasing imaginary part.
    """
    return nplr_legs(d_state).Lambda


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: x' = A x + B u projects the past of u on scaled Legendre polynomials (Gu et al. 2020, theorem 2).

    A_nk = -sqrt(2n + 1) sqrt(2k + 1) for n > k, -(n + 1) for n = k, 0 for n < k; B_n = sqrt(2n + 1). The sign of A is
    that of the time-invariant system of S4 (Gu et al. 2021, equation 2).

    Returns:
        A (N, N) and B (N,), float64.
    """
    if d_state < 1:
        raise ValueError(f"d_state: got {d_state}, wanted at least 1")
    n = torch.arange(d_state, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    A = -torch.tril(torch.outer(B, B), diagonal=-1) - torch.diag(n + 1)
    return A, B


class NPLR(NamedTuple):
    """A = V (diag(Lambda) - P P*) V* and B in the basis V; half of the conjugate pairs.

    The full matrices append the conjugates: V_full = [V, conj(V)], Lambda_full = [Lambda, conj(Lambda)], and so on.
    """

    Lambda: Tensor  # (N/2,)
    P: Tensor  # (N/2,)
    B: Tensor  # (N/2,)
    V: Tensor  # (N, N/2), orthonormal columns


def nplr_legs(d_state: int) -> NPLR:
    """HiPPO-LegS as normal plus low rank (Gu et al. 2021, S4, theorem 1 and appendix C.1).

    With P_n = sqrt(n + 1/2), A + P P^T = -I/2 + S where S is skew-symmetric: a normal matrix whose eigenvalues have
    real part -1/2. The eigenvectors of the Hermitian -i S come from ``eigh``, so V is unitary to machine precision
    (an eigendecomposition of A itself is exponentially ill-conditioned). The phase of each eigenvector is free; it is
    set so that P is real and positive, which makes the result the same on every machine.

    Returns:
        Lambda, P, B (N/2,) and V (N, N/2), complex128, by increasing imaginary part of Lambda.

    Raises:
        ValueError: If d_state is odd or not positive.
    """
    half = _half(d_state)
    A, B = hippo_legs(d_state)
    P = torch.sqrt(torch.arange(d_state, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(P, P)
    skew.diagonal().zero_()  # A_nn + P_n^2 = -1/2 exactly: the real part of every eigenvalue
    imaginary, V = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    imaginary, V = imaginary[:half], V[:, :half]
    pairs = torch.cat([V, V.conj()], 1)  # whose halves eigh makes orthogonal to its own error over a gap only:
    V = 1.5 * V - 0.5 * pairs @ (pairs.mH @ V)  # one Newton step to the nearest unitary matrix
    projected = V.mH @ P.to(V.dtype)
    V = V * (projected / projected.abs())
    Lambda = torch.complex(torch.full_like(imaginary, -0.5), imaginary)
    return NPLR(Lambda, V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V)


def _half(d_state: int) -> int:
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state: got {d_state}, wanted a positive even number (states come in conjugate pairs)")
    return d_state // 2
