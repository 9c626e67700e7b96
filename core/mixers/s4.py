"""S4, a time-invariant state space whose A is diagonal plus low rank (Gu et al. 2021, "Efficiently modeling long
sequences with structured state spaces"), in the Hurwitz form of SaShiMi (Goel et al. 2022, section 4.2).

Legend: B batch, L length, D model width, N real states of a channel, M = N/2 complex ones, T chunk, F frequencies.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import hippo
from core.mixers.s4_block import S4Block
from core.mixers.s4d import add_parameters, check_names, continuous, spread
from kernels.checks import full_precision
from kernels.diagonal_ssm.chunks import by_pieces, run_chunks

CHUNK = 128  # T, see kernels.diagonal_ssm
BLOCK = 1 << 24  # entries of the Cauchy matrix that are held at a time


class S4(S4Block):
    """Mixes a sequence by state spaces with A = Lambda - P P*, (B, L, D) -> (B, L, D).

    x' = A x + B u and y = C x + D u, discretised by the bilinear rule; out = GLU(output_linear(GELU(y))). A begins as
    HiPPO-LegS (Gu et al. 2020), and any Re(Lambda) < 0 keeps it stable.

    Parameters have the published names and shapes, but C is the plain output matrix whatever the length (published
    weights hold C (I - Ā^L)); ``core.mixers.s4_layouts`` converts.

    Args:
        d_model: Width D.
        d_state: Real states N of a channel, even.
        n_ssm: Copies S of A, B and P, a divisor of D; channel d has copy d mod S. D by default.
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_transform: How ``inv_dt`` becomes the time step: "exp" or "softplus".
        glu: Whether the output is gated.
        dropout: Probability, after the GELU.
        method: See ``S4Block``; "convolution" uses the Cauchy kernel.
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
        kernel = S4Kernel(d_model, d_state, n_ssm, dt_min, dt_max, dt_transform, lr=lr, device=device, dtype=dtype)
        super().__init__(d_model, kernel, glu, dropout, method, device, dtype)


class S4Kernel(nn.Module):
    """The state spaces of ``S4``, without skip connection: a ``StateSpace``; see there for the arguments."""

    inv_dt: Tensor
    P: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
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
        check_names(d_model, d_state, copies, "legs", ("legs",), dt_transform)
        self.d_model, self.d_state, self.dt_transform = d_model, d_state, dt_transform
        legs = hippo.nplr_legs(d_state)
        add_parameters(self, legs.Lambda, legs.B, copies, dt_min, dt_max, lr, device, dtype, P=legs.P)

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ``StateSpace``. Gradients compute everything again: only the inputs are kept."""
        A, B, C, dt = continuous(self)
        P = self._P()
        if state is None:
            state = A.real.new_zeros(u.shape[0], *A.shape, 2)
        with full_precision(u.device):
            return checkpoint(_run, u, state, A, B, C, P, dt, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """See ``StateSpace``."""
        A, B, C, dt = continuous(self)
        P, x, outputs = self._P(), torch.view_as_complex(state), []
        for token in u.to(state.dtype).unbind(1):
            x = advance(x, token[..., None] * B, A, P, dt)
            outputs.append(2 * (C * x).real.sum(-1))
        state.copy_(torch.view_as_real(x))
        return torch.stack(outputs, dim=1).to(u.dtype)

    def taps(self, length: int) -> Tensor:
        """See ``StateSpace``: by ``cauchy_kernel``."""
        A, B, _, dt = continuous(self)
        with full_precision(A.device):
            return cauchy_kernel(A, B, self.shortened(length), self._P(), dt, length)

    def shortened(self, length: int) -> Tensor:
        """C (I - Ā^L), (D, M): what published weights hold in the place of C."""
        A, _, C, dt = continuous(self)
        matrix = transition(A.to(torch.complex128), self._P().to(torch.complex128), dt.double())
        power = torch.linalg.matrix_power(matrix, length).to(dt.dtype)
        column = real_row(C)
        return complex_row(column - (power @ column[..., None])[..., 0])

    def _P(self) -> Tensor:
        wide = torch.float64 if self.inv_dt.dtype == torch.float64 else torch.float32
        return spread(torch.view_as_complex(self.P.to(wide))[0], self)


def advance(x: Tensor, Bu: Tensor, A: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """One step of the bilinear rule, x' = (I - dt/2 A)^-1 ((I + dt/2 A) x + dt B u), in O(N) by Woodbury's identity
    (Gu et al. 2021, appendix C.2).

    Args:
        x: (..., D, M) states, one of each conjugate pair.
        Bu: (..., D, M).
        A: (D, M) the diagonal part, Lambda.
        P: (D, M).
        dt: (D, 1).
    """
    half = dt / 2
    inverse = 1 / (1 - half * A)
    z = x + half * (A * x - P * _with_conjugates(P.conj() * x)) + dt * Bu
    z = inverse * z
    scale = half / (1 + half * _with_conjugates(P.conj() * P * inverse))
    return z - inverse * P * (scale * _with_conjugates(P.conj() * z))


def _with_conjugates(terms: Tensor) -> Tensor:
    """The sum over all states of terms given for one of each pair, (..., M) -> (..., 1) real."""
    return 2 * terms.real.sum(-1, keepdim=True)


def transition(A: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """Ā as real matrices (D, N, N) for rows of states, real and imaginary parts in turn: x' = x Ā.

    Ā = 2 (I - dt/2 A)^-1 - I, which is ``advance`` without an input: a 2x2 matrix for each pair, and one outer product.
    """
    half = dt / 2
    inverse = 1 / (1 - half * A)
    scale = dt / (1 + half * _with_conjugates(P.conj() * P * inverse))
    turn = torch.view_as_real(2 * inverse - 1)  # (D, M, 2)
    pairs = torch.stack([turn, torch.stack([-turn[..., 1], turn[..., 0]], dim=-1)], dim=2)  # (D, M, 2, 2)
    apart = torch.eye(A.shape[1], device=A.device, dtype=dt.dtype)[:, None, :, None] * pairs[:, :, :, None]
    onto = torch.view_as_real(inverse * P * scale).flatten(1)
    return apart.flatten(3).flatten(1, 2) - real_row(P.conj() * inverse)[:, :, None] * onto[:, None]


def real_row(C: Tensor) -> Tensor:
    """The column c (D, N) with x c = 2 Re(C x), for C (D, M) and real rows x."""
    return torch.view_as_real(2 * C.conj()).flatten(1)


def complex_row(c: Tensor) -> Tensor:
    """The inverse of ``real_row``."""
    return torch.view_as_complex(c.unflatten(1, (-1, 2)).contiguous()).conj() / 2


def cauchy_kernel(A: Tensor, B: Tensor, C: Tensor, P: Tensor, dt: Tensor, length: int) -> Tensor:
    """The convolution kernel of length L from its generating function (Gu et al. 2021, section 3.2, appendix C.3).

    At z = exp(-i t), the sum over k < L of C Ā^k B̄ z^k is C (I - Ā^L) (I - Ā z)^-1 B̄. With s = sin(t/2),
    w = dt/2 cos(t/2) and S_xy = sum x y / (i s - w Lambda), over all states, Woodbury's identity makes it
    exp(i t/2) dt/2 (S_CB - w S_CP S_P*B / (1 + w S_P*P)). In this form nothing is singular at any t, the Nyquist
    frequency included.

    Args:
        A: (D, M) Lambda.
        B: (D, M).
        C: (D, M) times (I - Ā^L).
        P: (D, M).
        dt: (D, 1).
        length: L.

    Returns:
        (D, L) real.
    """
    angle = math.pi / length * torch.arange(length // 2 + 1, device=A.device, dtype=torch.float64)  # t / 2
    size = max(1, BLOCK // A.numel())
    parts = [
        checkpoint(_frequencies, A, B, C, P, dt, part, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        for part in angle.split(size)
    ]
    return torch.fft.irfft(torch.cat(parts, dim=1), n=length)  # type: ignore[arg-type]


def _frequencies(A: Tensor, B: Tensor, C: Tensor, P: Tensor, dt: Tensor, angle: Tensor) -> Tensor:
    """The generating function (D, F) at angles t/2 (F,), in real numbers.

    A pair of conjugate states is x / (i s - p) + x* / (i s - p*) = 2 (i s Re x - w Re(x Lambda*)) / (a - i b) with
    p = w Lambda, a = Re(p)^2 + (Im p - s) (Im p + s) and b = 2 s Re p: two matrices (D, F, M) of half the size.
    """
    s, c = (t.to(dt.dtype) for t in (torch.sin(angle), torch.cos(angle)))
    turn = torch.polar(torch.ones_like(angle), angle).to(A.dtype)
    s, w = s[:, None], (dt / 2 * c)[..., None]  # (F, 1), (D, F, 1)
    re, im = w * A.real[:, None], w * A.imag[:, None]  # (D, F, M)
    a, b = re * re + (im - s) * (im + s), 2 * s * re
    inverse = 1 / (a * a + b * b)
    pairs = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], dim=-1)  # (D, M, 4)
    both = torch.cat([pairs.real, (pairs * A.conj()[..., None]).real], dim=-1)  # (D, M, 8)
    (re1, re2), (im1, im2) = (((part * inverse) @ both).split(4, dim=-1) for part in (a, b))  # (D, F, 4) each
    sums = torch.complex(-2 * (s * im1 + w * re2), 2 * (s * re1 - w * im2))
    cb, cp, pb, pp = sums.unbind(-1)
    w = w[..., 0]
    return turn * dt / 2 * (cb - w * cp * pb / (1 + w * pp))


def _run(u: Tensor, state: Tensor, A: Tensor, B: Tensor, C: Tensor, P: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """``S4Kernel.run`` from a state (B, D, M, 2)."""
    # The system over a chunk in float64: its rounding errors would grow with the memory, and it is small.
    dtype, exact = dt.dtype, (A.to(torch.complex128), P.to(torch.complex128), dt.double())
    matrix = transition(*exact)
    inputs = torch.view_as_real(advance(torch.zeros_like(exact[0]), B.to(torch.complex128), *exact)).flatten(1)  # B̄
    column = real_row(C.to(torch.complex128))

    def run(u: Tensor, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
        reach, power = _krylov(inputs, matrix, size)  # reach: B̄ Ā^j, (D, T, N)
        back, _ = _krylov(column, matrix.mT, size + 1)  # Ā^i C
        kernel = (reach @ column[..., None])[..., 0].to(dtype)

        def scan(added: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
            states = _doubling(torch.cat([first[:, :, None], added], dim=2), power)
            return states[:, :, :-1], states[:, :, -1]

        write, read = reach.flip(1).to(dtype), back[:, 1:].mT.to(dtype)
        return run_chunks(u, state, kernel, write, read, scan)

    y, rows = by_pieces(u.permute(2, 0, 1).to(dtype), CHUNK, run, state.flatten(2).transpose(0, 1))
    return y.permute(1, 2, 0).to(u.dtype), rows.transpose(0, 1).unflatten(2, (-1, 2))


def _krylov(row: Tensor, matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """row matrix^j for j < count, (D, N) -> (D, count, N), by doubling; and matrix^count."""
    rows, power = row[:, None], matrix
    while rows.shape[1] < count:
        rows = torch.cat([rows, rows @ power], dim=1)
        power = power @ power
    return rows[:, :count], torch.linalg.matrix_power(matrix, count)


def _doubling(x: Tensor, step: Tensor) -> Tensor:
    """x_j = x_{j-1} step + x_j along dim 2 of (D, B, J, N), with a float64 step."""
    reach = 1
    while reach < x.shape[2]:
        before = x[:, :, :-reach]
        moved = torch.bmm(before.flatten(1, 2), step.to(x.dtype)).view(before.shape)
        x = torch.cat([x[:, :, :reach], x[:, :, reach:] + moved], dim=2)
        step, reach = step @ step, 2 * reach
    return x
