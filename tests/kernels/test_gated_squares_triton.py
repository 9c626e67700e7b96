"""The two parts of a gated norm, kernels and PyTorch's operators, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from contract import triton_device
from torch import Tensor

from kernels import gated_squares
from kernels.gated_squares import divide_by_root, divide_by_root_backward, gate_with_squares

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-13}
DEVICE = triton_device()
EPS = 0.1  # not lost beside the squares


@pytest.fixture(params=["kernel", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether kernels run: where there is no GPU, Triton's interpreter takes them."""
    monkeypatch.setattr(gated_squares, "_by_kernel", lambda t: request.param == "kernel" and t.dtype != torch.float64)
    return request.param


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("uses", ["both", "gated", "squares"])
def test_gate_with_squares(backend: str, dtype: torch.dtype, uses: str) -> None:
    y = numbers(5, 24, dtype=dtype, seed=1)
    wide = numbers(5, 41, dtype=dtype, seed=2)  # the gate is some of its columns
    dout, dsquares = numbers(5, 24, dtype=dtype, seed=3), numbers(5, dtype=torch.float64, seed=4)
    exact = [t.double().clone().requires_grad_() for t in (y, wide)]
    gated = exact[0] * F.silu(exact[1][:, 7:31])
    given = [t.clone().requires_grad_() for t in (y, wide)]
    found, squares = gate_with_squares(given[0], given[1][:, 7:31])
    assert found.dtype == dtype
    assert squares.dtype == torch.promote_types(dtype, torch.float32)
    assert error(found, gated) < TOLERANCE[dtype]
    assert error(squares, gated.square().sum(1)) < min(TOLERANCE[dtype], 2e-6)
    pairs = {"gated": ((gated, found, dout),), "squares": ((gated.square().sum(1), squares, dsquares),)}
    for reference, own, grad in pairs["gated"] + pairs["squares"] if uses == "both" else pairs[uses]:
        reference.backward(grad.double(), retain_graph=True)
        own.backward(grad.to(own.dtype), retain_graph=True)
    for own, reference in zip(given, exact, strict=True):
        assert own.grad is not None
        assert reference.grad is not None
        assert error(own.grad, reference.grad) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_divide_by_root(backend: str, dtype: torch.dtype) -> None:
    x, dout = (numbers(5, 24, dtype=dtype, seed=seed) for seed in (1, 2))
    squares = numbers(5, dtype=torch.promote_types(dtype, torch.float32), seed=3).square() * 40
    exact, sums = (t.double().clone().requires_grad_() for t in (x, squares))
    wanted = exact / (sums / 48 + EPS).sqrt()[:, None]
    wanted.backward(dout.double())
    found = divide_by_root(x, squares, 48, EPS)
    dx, dsquares = divide_by_root_backward(dout, x, squares, 48, EPS)
    assert exact.grad is not None
    assert sums.grad is not None
    assert found.dtype == dx.dtype == dtype
    for own, reference in ((found, wanted), (dx, exact.grad)):
        assert error(own, reference) < TOLERANCE[dtype]
    assert error(dsquares, sums.grad) < min(TOLERANCE[dtype], 4e-6)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"y, z: got shapes \(2, 3\), \(2, 4\), wanted \(T, E\) of both"):
        gate_with_squares(torch.zeros(2, 3), torch.zeros(2, 4))
