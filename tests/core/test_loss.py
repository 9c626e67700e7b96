"""``linear_cross_entropy`` against PyTorch's linear layer and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.loss import linear_cross_entropy

T, D, V = 13, 6, 11


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((2, T, D), (V, D)))
    targets = torch.randint(0, V, (2, T))
    targets[0, :3] = -100
    return hidden, weight, targets


def both(dtype: torch.dtype, chunk: int, device: str = "cpu") -> list[list[Tensor]]:
    """Loss and gradients of ours, and of PyTorch's operators in float64."""
    results = []
    for ours in (True, False):
        hidden, weight, targets = drawn(dtype)
        hidden, weight, targets = (t.detach().to(device) for t in (hidden, weight, targets))
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        if not ours:
            hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
        loss = (
            linear_cross_entropy(hidden, weight, targets, chunk=chunk)
            if ours
            else F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())
        )
        (3.0 * loss).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results.append([loss.detach(), hidden.grad, weight.grad])
    return results


@pytest.mark.parametrize("chunk", [1, 5, 26, 100])
def test_equals_cross_entropy(chunk: int) -> None:
    ours, wanted = both(torch.float64, chunk)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)


def test_low_precision_sums_in_float32() -> None:
    ours, wanted = both(torch.bfloat16, 5)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for got, truth in zip(ours, wanted, strict=True):  # a product of 6 and of 13 terms rounded to bfloat16
        assert (got.double() - truth).norm() < 2 * torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    ours, wanted = both(dtype, 5, device="cuda")
    for got, truth in zip(ours, wanted, strict=True):
        assert (got.double() - truth).norm() < 4 * max(torch.finfo(dtype).eps, 1e-3) * truth.norm()  # tf32 may be on


def test_autocast_keeps_the_weights_gradient_in_float32() -> None:
    hidden, weight, targets = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    loss.backward()
    assert weight.grad is not None
    assert (loss.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


def test_without_gradients_and_with_one_of_them() -> None:
    hidden, weight, targets = drawn()
    wanted = linear_cross_entropy(hidden, weight, targets, chunk=4)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, chunk=4), wanted)
    (truth,) = torch.autograd.grad(wanted, weight)
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets, chunk=4), weight)
    assert torch.equal(alone, truth)


def test_no_target_counts() -> None:
    hidden, weight, targets = drawn()
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(2, T - 1, dtype=torch.int64)}, "targets: got shape .* shift"),
        ({"targets": torch.zeros(2, T, dtype=torch.int32)}, "targets: got dtype .* int64"),
        ({"weight": torch.zeros(V, D + 1)}, "weight: got shape .* D = 6"),
        ({"chunk": 0}, "chunk: got 0"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    hidden, weight, targets = drawn()
    arguments: dict[str, object] = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)  # type: ignore[arg-type]
