"""Hyena's convolution on GPUs against sums written out in float64, and the layer with it against the layer without.

On a machine without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_long_convolution_triton.py``.
"""

from __future__ import annotations

import pytest
import torch
from contract import triton_device
from torch import Tensor

from core.mixers.hyena import Hyena
from kernels.backend import interpreting
from kernels.long_convolution import gated_convolution, takes

DEVICE = triton_device()


def written_out(u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    last, gate, v = u.chunk(3, dim=2)
    v = v * gate
    length = v.shape[1]
    shift = torch.arange(length)[:, None] - torch.arange(length)
    matrix = torch.where((shift >= 0)[:, :, None], taps[shift.clamp(min=0)], 0.0)  # (L, L, C)
    y = torch.einsum("tsc,bsc->btc", matrix, v)
    return last * (y if bias is None else y + bias * v)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "more", "has_bias"),
    [(2, 70, 6, 0, True), (1, 65, 34, 3, True), (3, 33, 2, 0, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(
    batch: int, length: int, channels: int, more: int, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    u = torch.randn(batch, length, 3 * channels).to(dtype)
    taps, bias = torch.randn(length + more, channels) / 8, torch.randn(channels) if has_bias else None
    dy = torch.randn(batch, length, channels).to(dtype)
    inputs = [t for t in (u, taps, bias) if t is not None]
    exact = [t.double().requires_grad_() for t in inputs]
    y = written_out(*exact, *([] if has_bias else [None]))
    wanted = [y, *torch.autograd.grad(y, exact, dy.double())]
    ours = [t.to(DEVICE).requires_grad_() for t in inputs]
    y = gated_convolution(*ours, *([] if has_bias else [None]))
    found = [y, *torch.autograd.grad(y, ours, dy.to(DEVICE))]
    for name, a, b in zip(("y", "du", "dtaps", "dbias"), found, wanted, strict=False):
        # In bfloat16 two roundings by half an ulp, 2^-8: of the result and of the sum that is kept. Triton's
        # interpreter cuts off instead, which is up to one.
        bound = 2e-6 if a.dtype == torch.float32 else 2 * (2**-7 if DEVICE == "cpu" else 2**-8) + 1e-4
        error = (a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max()
        assert error < bound, f"{name}: {error:.1e}"


def test_the_layer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the same layer, and not where the channels are odd in number or in float64."""
    torch.manual_seed(0)
    monkeypatch.setattr("kernels.long_convolution.SHORTEST", 1)
    layer = Hyena(4, 64, emb_dim=5, lr_pos_emb=0.0).to(DEVICE)
    x = torch.randn(2, 50, 4, device=DEVICE, requires_grad=True)
    calls, results = [], []
    real = gated_convolution
    monkeypatch.setattr("core.mixers.hyena.gated_convolution", lambda *a: calls.append(1) or real(*a))
    for fused in (True, False):
        monkeypatch.setattr("core.mixers.hyena.takes", takes if fused else lambda *_: False)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert len(calls) == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    taps = torch.zeros(50, 3, device=DEVICE)
    assert not takes(torch.zeros(2, 50, 9, device=DEVICE), taps)
    assert not takes(torch.zeros(2, 50, 12, dtype=torch.float64, device=DEVICE), taps.double())
    monkeypatch.setenv("TRISCAN_BACKEND", "torch")
    assert takes(torch.zeros(2, 50, 12, device=DEVICE), taps[:, :2]) == interpreting()
