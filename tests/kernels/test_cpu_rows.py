"""Rows of bfloat16 on the CPU: PyTorch's rounding, bit by bit, and kernels that read and write them."""

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.causal_conv1d import cpu_direct as convolution
from kernels.cpu_rows import flat, read_row
from kernels.norm import cpu_direct as normalisation
from kernels.norm import norm as norm_op
from kernels.selective_scan import selective_scan


@numba.njit
def move(source, start, target, to, width):
    read_row(source, start, target, to, width)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int16)


@pytest.mark.parametrize("width", [1, 16, 45])
def test_rounding_is_that_of_torch(width: int) -> None:
    """Ties to even, infinities, overflow, subnormal numbers, NaN; nothing beyond the row is touched."""
    special = [0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1e-40, 9.2e-41]
    x = torch.cat((torch.tensor(special), torch.randn(89, generator=torch.Generator().manual_seed(0))))
    for start in (0, 11, len(x) - width):
        y = torch.full((len(x) + 2,), 7.0, dtype=torch.bfloat16)
        move(flat(x), start, flat(y), 1, width)
        wanted = torch.full_like(y, 7.0)
        wanted[1 : 1 + width] = x[start : start + width].bfloat16()
        nan = wanted.isnan()
        assert torch.equal(y.isnan(), nan)
        assert torch.equal(bits(y[~nan]), bits(wanted[~nan]))
        back = torch.full((width,), 7.0)
        move(flat(y), 1, flat(back), 0, width)
        assert torch.equal(back.nan_to_num(1.5), y[1 : 1 + width].float().nan_to_num(1.5))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels", [20, 300])
def test_convolution_is_the_rounded_one_of_float32(channels: int, reverse: bool, monkeypatch: pytest.MonkeyPatch):
    """Over edges of tiles and of blocks of channels, of rows that lie apart in memory."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 70, 2 * channels, generator=generator).bfloat16()[..., :channels]
    weight, bias = torch.randn(channels, 4, generator=generator), torch.randn(channels, generator=generator)
    state = torch.randn(2, 3, channels, generator=generator)
    calls = []
    monkeypatch.setattr(convolution, "forward", lambda *a, run=convolution.forward: calls.append(a) or run(*a))
    options = {"activation": "silu", "reverse": reverse, "initial_state": state, "backend": "cpu"}
    y = causal_conv1d(x, weight, bias, **options)
    assert isinstance(y, Tensor)
    assert len(calls) == 1
    wide = causal_conv1d(x.float(), weight, bias, **options)
    assert isinstance(wide, Tensor)
    assert torch.equal(bits(y), bits(wide.bfloat16()))
    exact = causal_conv1d(x.double(), weight.double(), bias.double(), **{**options, "backend": "reference"})
    torch.testing.assert_close(wide.double(), exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
def test_norm_is_the_rounded_one_of_float32(residual: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 21, 37, generator=generator).bfloat16(), torch.randn(37, generator=generator)
    before = None if residual is None else torch.randn(3, 21, 37, generator=generator).to(residual)
    calls = []
    monkeypatch.setattr(normalisation, "forward", lambda *a, run=normalisation.forward: calls.append(a) or run(*a))
    y, total = norm_op(x, weight, residual=before, return_residual=True, backend="cpu")
    wide = None if before is None else before.float()
    y_wide, total_wide = norm_op(x.float(), weight, residual=wide, return_residual=True, backend="cpu")
    assert len(calls) == 2
    assert torch.equal(bits(y), bits(y_wide.bfloat16()))
    assert torch.equal(total, total_wide if total.dtype == torch.float32 else total_wide.bfloat16())
    s = x.double() if before is None else x.double() + before.double()
    exact = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    np.testing.assert_allclose(y_wide.double(), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [20, 300])
def test_scan_of_bfloat16_has_the_state_of_float32(channels: int) -> None:
    """Its exponentials take a term less: y within a rounding of bfloat16, the state as good, of each rate."""
    generator = torch.Generator().manual_seed(3)

    def rows(*size: int) -> Tensor:
        return torch.randn(2, 700, *size, generator=generator).bfloat16()

    x, z, B, C = rows(channels), rows(2 * channels)[..., channels:], rows(1, 8), rows(1, 8)
    dt, A = rows(channels), -torch.logspace(-4, 2, 8).repeat(channels, 1)
    options = {"z": z, "dt_softplus": True, "return_final_state": True, "backend": "cpu"}
    y, state = selective_scan(x, dt, A, B, C, **options)
    _, wide = selective_scan(x.float(), dt.float(), A, B.float(), C.float(), **{**options, "z": z.float()})
    exact = {**options, "z": z.double(), "backend": "reference"}
    y_exact, state_exact = selective_scan(*(t.double() for t in (x, dt, A, B, C)), **exact)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), y_exact, rtol=2**-8, atol=1e-5 * float(y_exact.abs().max()))
    error, error_wide = ((s - state_exact).abs().amax((0, 1)) / state_exact.abs().amax((0, 1)) for s in (state, wide))
    assert bool((error <= 1.5 * error_wide + 4e-7).all()), (error, error_wide)
