"""Losses and their slope over the logits: Triton (interpreted without a GPU) against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import triton_device

from kernels import softmax_slope

DEVICE = triton_device()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slope_over_the_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_slope, "BLOCK", 64)
    torch.manual_seed(0)
    logits = (torch.randn(7, 150) * torch.tensor([0.1, 1, 3, 30, 3, 3, 100])[:, None]).to(DEVICE)
    targets = torch.tensor([0, 149, 64, 3, -100, 63, 5], device=DEVICE)
    logits[6, 5] = 900  # no loss is left, and no slope
    logits[5, 7] = -torch.inf
    wide = logits.double().requires_grad_()
    wanted = F.cross_entropy(wide, targets, reduction="none")
    wanted.sum().backward()
    losses, slope = softmax_slope.softmax_slope(logits, targets, dtype, -100)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    assert wide.grad is not None
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, wide.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert softmax_slope.softmax_slope(logits, targets.clamp(min=0) + 150, dtype, -100)[0].isnan().all()
