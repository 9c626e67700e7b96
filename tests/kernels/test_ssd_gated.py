"""A gated scan on its way through a norm: the definition against scan and norm, the kernel against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from kernels import norm, ssd
from kernels.norm.late import Late, add_norm
from kernels.ssd import gated
from kernels.ssd.gated import gated_scan, saves_a_pass

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
EPS = 1e-5


def arguments(batch: int, length: int, heads: int, width: int, groups: int, states: int) -> dict[str, Any]:
    """In float64; rows are parts of wider ones, as a layer's projection makes them."""
    g = torch.Generator().manual_seed(0)
    inner, keys = heads * width, groups * states
    sizes = [inner, inner, keys, keys, heads]
    row = torch.randn(batch, length, sum(sizes) + -sum(sizes) % 8, generator=g, dtype=torch.float64)
    z, x, B, C, dt = row[..., : sum(sizes)].split(sizes, dim=-1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "x": x.unflatten(-1, (heads, width)), "dt": dt, "A": -draw(heads).exp(),
        "B": B.unflatten(-1, (groups, states)), "C": C.unflatten(-1, (groups, states)), "D": draw(heads),
        "z": z.unflatten(-1, (heads, width)), "dt_bias": draw(heads) - 2, "norm_weight": draw(inner),
        "initial_state": draw(batch, heads, width, states),
    }  # fmt: skip


def cast(made: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The same in another dtype, parameters and states in float32 at least; rows stay parts of wider ones."""
    wide = dtype if dtype == torch.float64 else torch.float32
    found = {}
    for name, t in made.items():
        kind = dtype if name in ("x", "B", "C", "z", "dt", "norm_weight") else wide
        found[name] = torch.empty_strided(t.shape, t.stride(), dtype=kind, device=device).copy_(t)
    return found


def test_gated_is_scan_gate_and_norm() -> None:
    made = arguments(2, 7, 4, 3, 2, 5)
    y, squares, state = gated_scan(**made, dt_limit=(0.1, 0.5))
    assert gated_scan(**made, state_dtype=torch.float32)[2].dtype == torch.float32
    weight, z = made.pop("norm_weight"), made.pop("z")
    scanned, want_state = ssd(**made, dt_limit=(0.1, 0.5), return_final_state=True)
    assert isinstance(scanned, Tensor)
    want = norm(scanned.flatten(2), weight, z=z.flatten(2), eps=EPS, norm_before_gate=False)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(y * torch.rsqrt(squares.sum(-1, keepdim=True) / 12 + EPS), want)
    torch.testing.assert_close(state, want_state)
    matrix, residual = torch.randn(6, 12).double(), torch.randn(2, 7, 6).double()
    _, total = add_norm(Late(y @ matrix.T, squares, 12, EPS), residual, torch.ones(6).double())
    torch.testing.assert_close(total, F.linear(want, matrix) + residual)


def test_a_named_backend_is_taken_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made, taken = arguments(2, 7, 4, 3, 2, 5), []
    resolve = gated._resolve
    monkeypatch.setattr(gated, "_resolve", lambda p, backend: taken.append(resolve(p, backend)) or taken[-1])
    for backend in ("auto", "reference"):
        gated_scan(**made, backend=backend)
    assert taken == ["cpu", "reference"]


def test_what_does_not_fit_is_refused() -> None:
    made = arguments(2, 7, 4, 3, 2, 5)
    with pytest.raises(ValueError, match="norm_weight: got shape"):
        gated_scan(**made | {"norm_weight": made["norm_weight"][1:]})
    assert not saves_a_pass(**{n: t for n, t in made.items() if n != "norm_weight"})


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="tiles are copied in boxes on GPUs of compute capability 9.0")
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize(
    "sizes", [(8, 128, 24, 64, 1, 128), (40, 64, 4, 64, 2, 64), (70, 192, 2, 64, 1, 32), (4, 640, 40, 64, 1, 128)]
)
def test_kernel(sizes: tuple[int, ...], initial: bool) -> None:
    made = arguments(*sizes)
    if not initial:
        del made["initial_state"]
    low = cast(made, torch.bfloat16, "cuda")
    assert saves_a_pass(**{n: t for n, t in low.items() if n != "norm_weight"})
    found, want = gated_scan(**low, state_dtype=torch.bfloat16), gated_scan(**low, backend="reference")
    assert found[2].dtype == torch.bfloat16
    truth = gated_scan(**cast(low, torch.float64, "cuda"), backend="reference")
    for name, got, plain, exact in zip(("y", "squares", "state"), found, want, truth, strict=True):
        if name == "y":
            assert_as_accurate(name, got, plain, exact)
        else:  # products are of bfloat16
            error = (got.double() - exact).norm() / exact.norm()
            assert error < 0.01, f"{name}: {error}"
