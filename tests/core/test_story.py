"""The claims of docs/story.md, in float64 to 1e-12, and that its pictures can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fill import fill_input
from torch import Tensor

from core import hippo, story
from kernels import selective_scan, ssd
from kernels.diagonal_ssm import diagonal_ssm, vandermonde

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def filled(name: str, *shape: int) -> Tensor:
    return fill_input(name, shape).double()


def test_convolution_and_recurrence_are_one() -> None:
    A = hippo.s4d_lin(8).expand(3, -1)
    dt = torch.tensor([[0.1], [0.02], [0.3]], dtype=torch.float64)
    B, C = torch.expm1(dt * A) / A, torch.complex(filled("c", 3, 4), filled("d", 3, 4))
    u = filled("u", 2, 40, 3)
    y, _ = diagonal_ssm(u, dt * A, B, C)
    taps = vandermonde(dt * A, B * C, 40)
    convolved = torch.stack([sum(taps[:, s] * u[:, t - s] for s in range(t + 1)) for t in range(40)], dim=1)
    torch.testing.assert_close(y, convolved, **EXACT)


def test_zero_order_hold_is_exact_for_a_constant_input() -> None:
    """The sampled system and the integral of the continuous one, x' = A x + B u, by its closed form."""
    A, dt = torch.tensor(-0.7 + 2j, dtype=torch.complex128), 0.3
    x = torch.tensor(0j, dtype=torch.complex128)
    for _ in range(5):
        x = torch.exp(dt * A) * x + torch.expm1(dt * A) / A
    torch.testing.assert_close(x, (torch.exp(5 * dt * A) - 1) / A, **EXACT)


def test_selection_generalises_gates() -> None:
    """Theorem 1 of Gu & Dao 2023: with N = 1, A = -1, B = 1 and dt = softplus(s), h_t = (1 - g) h_{t-1} + g x_t with
    g = sigmoid(s). By zero-order hold: the scan takes Euler's rule, so x comes with (1 - exp(-dt)) / dt."""
    x, s = filled("x", 2, 60, 5), 3 * filled("s", 2, 60, 5)
    dt = F.softplus(s)
    A = -torch.ones(5, 1, dtype=torch.float64)
    y = selective_scan(x * -torch.expm1(-dt) / dt, s, A, -A, -A)
    h, gate = torch.zeros(2, 5, dtype=torch.float64), torch.sigmoid(s)
    for t in range(60):
        h = (1 - gate[:, t]) * h + gate[:, t] * x[:, t]
        torch.testing.assert_close(y[:, t], h, **EXACT)


def test_duality() -> None:
    """The recurrence, the chunked algorithm and the multiplication by the matrix are one function."""
    x, dt = filled("x", 2, 70, 4, 3), filled("dt", 2, 70, 4)
    B, C = filled("B", 2, 70, 2, 5), filled("C", 2, 70, 2, 5)
    A = -torch.arange(1.0, 5, dtype=torch.float64)
    one, *others = (ssd(x, dt, A, B, C, mode=mode) for mode in ("recurrent", "quadratic", "chunked"))
    for other in others:
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize(("d_state", "least", "most"), [(8, 0.3, 0.6), (32, 0.0, 0.06)])
def test_memory_grows_with_the_state(d_state: int, least: float, most: float) -> None:
    u = story.signal(1000)
    back = story.reconstruct(story.legs_memory(u, d_state)[-1], 1000)
    assert least <= ((back - u).norm() / u.norm()) < most


def test_memory_holds_a_polynomial() -> None:
    """The coefficients of a parabola are those of its Legendre polynomials, up to the rule's error."""
    t = torch.linspace(0, 1, 4000, dtype=torch.float64)
    back = story.reconstruct(story.legs_memory(3 * t**2 - t, 8)[-1], 4000)
    torch.testing.assert_close(back, 3 * t**2 - t, rtol=0, atol=0.01)


def test_pictures(tmp_path: Path) -> None:
    for picture in (story.memory, story.discretisation, story.kernels, story.decay, story.matrix):
        picture().savefig(tmp_path / "a.png", dpi=30)
        assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.slow
def test_all_pictures(tmp_path: Path) -> None:
    story.draw(str(tmp_path), steps=60)
    assert len(list(tmp_path.glob("*.png"))) == 6
