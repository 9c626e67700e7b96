"""Initial values against their defining identities and the recorded ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import golden_cases

from core import hippo

RECORDED = golden_cases("s4d_a")["inits"]["outputs"]


def recorded(name: str) -> torch.Tensor:
    values = torch.tensor(RECORDED[name]["values"], dtype=torch.float64)
    is_complex = name.startswith(("nplr_Lambda", "nplr_P_conj", "diag"))
    return torch.view_as_complex(values) if is_complex else values


def test_legs_recorded():
    A, B = hippo.hippo_legs(8)
    torch.testing.assert_close(A, recorded("legs_A_8"), rtol=1e-10, atol=0)
    torch.testing.assert_close(B, recorded("legs_B_8"), rtol=1e-10, atol=0)


def test_nplr_recorded():
    Lambda, P, B, _ = hippo.nplr_legs(8)
    torch.testing.assert_close(Lambda, recorded("nplr_Lambda"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(P.abs(), recorded("nplr_P_abs"), rtol=1e-10, atol=0)
    torch.testing.assert_close(B.abs(), recorded("nplr_B_abs"), rtol=1e-10, atol=0)
    torch.testing.assert_close(P.conj() * B, recorded("nplr_P_conj_B"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lin", "inv", "quad", "legs"])
def test_diagonal_recorded(name: str):
    A = getattr(hippo, f"s4d_{name}")(8)  # the recording is in float32
    torch.testing.assert_close(A, recorded(f"diag_{name}_A"), rtol=1e-6, atol=1e-6)


def test_real_recorded():
    torch.testing.assert_close(hippo.s4d_real(4).to(torch.complex128), recorded("diag_real_A"))


@pytest.mark.parametrize("n", [2, 6, 64, 128])
def test_nplr_identity(n: int):
    A, B = hippo.hippo_legs(n)
    Lambda, P, B_half, V_half = hippo.nplr_legs(n)
    V = torch.cat([V_half, V_half.conj()], dim=1)
    P_full, Lambda_full = torch.cat([P, P.conj()]), torch.cat([Lambda, Lambda.conj()])
    rebuilt = V @ (torch.diag(Lambda_full) - torch.outer(P_full, P_full.conj())) @ V.mH
    scale = A.abs().max()
    torch.testing.assert_close(rebuilt.real / scale, A / scale, rtol=0, atol=1e-13)
    torch.testing.assert_close(rebuilt.imag / scale, torch.zeros_like(A), rtol=0, atol=1e-13)
    torch.testing.assert_close(V @ V.mH, torch.eye(n, dtype=torch.complex128), rtol=0, atol=1e-12)
    torch.testing.assert_close((V @ torch.cat([B_half, B_half.conj()])).real, B, rtol=1e-11, atol=1e-11)
    assert (Lambda.real == -0.5).all()
    assert (Lambda.imag < 0).all()


def test_nplr_phase_is_fixed():
    P = hippo.nplr_legs(64).P
    assert (P.real > 0).all()
    torch.testing.assert_close(P.imag, torch.zeros_like(P.imag), rtol=0, atol=1e-11)


def test_legs_reconstructs_the_past():
    """The states of LegS are the Legendre coefficients of the input so far (HiPPO, theorem 2): here of u(t) = t."""
    n, steps = 6, 20_000
    A, B = hippo.hippo_legs(n)
    x = torch.zeros(n, dtype=torch.float64)
    for k in range(1, steps + 1):  # x' = (A x + B u) / t, backward Euler
        x = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - A / k, x + B / k * (k / steps))
    # t on [0, 1] in the orthonormal polynomials sqrt(2n+1) P_n(2t - 1): 1/2 and 1/(2 sqrt 3), then zeros.
    want = torch.tensor([0.5, 1 / (2 * math.sqrt(3)), 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(x, want, rtol=0, atol=1e-3)


def test_inv_approximates_legs():
    inv, legs = hippo.s4d_inv(64).imag, hippo.s4d_legs(64).imag
    assert ((inv - legs).abs() / legs.abs()).max() < 0.25
    assert inv[0].item() == pytest.approx(-1283.4, abs=0.1)


def test_dt_is_log_uniform():
    dt = hippo.log_uniform_dt(20_000, 1e-3, 1e-1, generator=torch.Generator().manual_seed(0))
    assert dt.min() >= 1e-3
    assert dt.max() <= 1e-1
    quantiles = torch.quantile(torch.log10(dt), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([-2.5, -2, -1.5], dtype=torch.float64), rtol=0, atol=0.03)


def test_dt_floor():
    assert hippo.log_uniform_dt(100, 1e-5, 1e-4, floor=5e-5).min() == 5e-5


@pytest.mark.parametrize("value", [1e-8, 1e-3, 0.1, 5.0, 800.0])
def test_inverse_softplus(value: float):
    y = torch.tensor([value], dtype=torch.float64)
    back = F.softplus(hippo.inverse_softplus(y), threshold=1000.0)
    torch.testing.assert_close(back if value < 100 else hippo.inverse_softplus(y), y, rtol=1e-7, atol=0)


@pytest.mark.parametrize("d_state", [0, 1, 7])
def test_odd_states_refused(d_state: int):
    with pytest.raises(ValueError, match="positive even"):
        hippo.s4d_lin(d_state)


def test_bad_dt_refused():
    with pytest.raises(ValueError, match="dt_min"):
        hippo.log_uniform_dt(4, 0.1, 0.01)
