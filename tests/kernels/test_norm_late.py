"""A norm behind a product: the definition against norm and product, the kernel against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from contract import triton_device

from kernels.norm import triton_late
from kernels.norm.late import Late, add_norm

DEVICE = triton_device()
EPS = 1e-3


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def test_late_is_norm_product_sum_and_norm() -> None:
    x, inner, matrix = draw("x", 2, 5, 6), draw("i", 6), draw("m", 7, 6)
    residual, weight = draw("r", 2, 5, 7), draw("w", 7)
    want = F.rms_norm(x, (6,), inner, EPS) @ matrix.T + residual
    squares = x.square().unflatten(-1, (3, 2)).sum(-1)
    y, total = add_norm(Late((x * inner) @ matrix.T, squares, 6, EPS), residual, weight)
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(y, F.rms_norm(want, (7,), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels", "parts"), [(3, 7, 1), (2, 1100, 5), (77, 24, 24)])
def test_kernel(rows: int, channels: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_late, "processors", lambda device: 1)  # a program then takes many tiles
    x, residual, weight = draw("x", 1, rows, channels), draw("r", 1, rows, channels), draw("w", channels)
    given, squares = [t.to(dtype) for t in (x, weight)], draw("s", 1, rows, parts).abs() * 9
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    residual, squares = residual.to(wide), squares.to(wide)

    def run(device: str, backend: str, kind: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, stream, parts_ = (t.to(device, kind) for t in (*given, residual, squares))
        return add_norm(Late(x, parts_, 40, EPS), stream, weight, backend=backend)

    found, want = run(DEVICE, "triton"), run("cpu", "reference")
    truth = run("cpu", "reference", torch.float64)
    for name, got, plain, exact in zip(("y", "sum"), found, want, truth, strict=True):
        assert_as_accurate(name, got.cpu(), plain, exact)


def test_what_does_not_fit_is_refused() -> None:
    late = Late(draw("x", 2, 3), draw("s", 2, 1), 4, EPS)
    with pytest.raises(ValueError, match=r"residual: got shape \(2, 4\), wanted \(\.\.\., D\) = \(2, 3\)"):
        add_norm(late, draw("r", 2, 4), draw("w", 3))
    with pytest.raises(ValueError, match="squares: got shape"):
        add_norm(late._replace(squares=draw("s", 3, 1)), draw("r", 2, 3), draw("w", 3))
