"""Ops as PyTorch sees them, and plans: what is kept between calls must not change what a call does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import causal_conv1d, norm, selective_scan, ssd
from kernels.plans import Plans
from kernels.registration import op


@op
def _twice_for_tests(x: Tensor, times: int) -> Tensor:
    return x * (2 * times)


@_twice_for_tests.register_fake
def _(x: Tensor, times: int) -> Tensor:
    return torch.empty_like(x)


class Seen(TorchDispatchMode):
    """Notes the ops that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_op_and_its_backward() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4)
    with Seen() as seen:
        y = norm(x, weight)
        assert isinstance(y, Tensor)
        y.sum().backward()
    assert "triscan.norm.default" in seen.names
    assert "triscan.norm_backward.default" in seen.names


def test_an_op_without_a_derivative_says_so() -> None:
    y = torch.ops.triscan.twice_for_tests(torch.randn(3, requires_grad=True), 2)
    with pytest.raises(RuntimeError, match="twice_for_tests has no derivative"):
        y.sum().backward()


def _in_one_argument() -> dict[str, tuple[Any, Tensor]]:
    """Functions of one tensor, and a tensor for each."""
    steps, keys = torch.randn(2, 5, 3), torch.randn(2, 5, 1, 2)
    return {
        "norm": (lambda x, **o: norm(x, torch.ones(3), **o), torch.randn(2, 3)),
        "causal_conv1d": (lambda x, **o: causal_conv1d(x, torch.ones(3, 2), **o), steps),
        "selective_scan": (lambda x, **o: selective_scan(x, steps, -torch.ones(3, 2), keys, keys, **o), steps),
        "ssd": (lambda x, **o: ssd(x, steps, -torch.ones(3), keys, keys, **o), torch.randn(2, 5, 3, 4)),
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of one call for each of a batch
@pytest.mark.parametrize("name", ["norm", "causal_conv1d", "selective_scan", "ssd"])
def test_transforms_go_through_the_functions(name: str) -> None:
    function, x = _in_one_argument()[name]
    x = torch.stack([x, 2 * x]).requires_grad_()
    (wanted,) = torch.autograd.grad(torch.stack([function(part) for part in x]).square().sum(), x)
    got = torch.func.vmap(torch.func.grad(lambda part: function(part).square().sum()))(x.detach())
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["norm", "causal_conv1d", "selective_scan", "ssd"])
def test_forward_mode_is_refused_and_never_zero(name: str) -> None:
    function, x = _in_one_argument()[name]
    with pytest.raises(RuntimeError, match=f"{name} has no derivative in forward mode; use backend='reference'"):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=f"{name} has no derivative in forward mode; use backend='reference'"):
            function(forward_ad.make_dual(x, x))
        torch.testing.assert_close(function(x), function(x, backend="reference"))
    y, tangent = torch.func.jvp(lambda x: function(x, backend="reference"), (x.double(),), (x.double(),))[:2]
    torch.testing.assert_close((function(x.double() * (1 + 1e-6)) - y) / 1e-6, tangent, rtol=1e-3, atol=1e-4)


def test_an_op_called_by_its_name_inside_a_transform_says_what_to_call() -> None:
    def loss(x: Tensor) -> Tensor:
        return torch.ops.triscan.norm(x, torch.ones(3), None, None, None, "rms", 1e-5, 0, True, True, "auto")[0].sum()

    with pytest.raises(RuntimeError, match=r"torch.ops.triscan.norm: got called inside grad, .* kernels.norm"):
        torch.func.grad(loss)(torch.randn(2, 3))


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(1, 5, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y = causal_conv1d(x, weight)
    assert isinstance(y, Tensor)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_backward has no derivative; use backend='torch'"):
        dx.sum().backward()


def test_inference_mode_and_frozen_inputs() -> None:
    x, weight = torch.randn(3, 4), torch.ones(4)
    wanted = norm(x, weight)
    with torch.inference_mode():
        assert torch.equal(norm(x, weight), wanted)  # type: ignore[arg-type]
    assert isinstance(wanted, Tensor)
    assert not wanted.requires_grad


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.triscan.twice_for_tests, (torch.randn(3), 2))


def test_a_plan_is_of_one_signature() -> None:
    plans, t = Plans(), torch.zeros(4, 8)
    plan = plans.find((t, None), (True,))
    assert plans.find((t.clone(), None), (True,)) is plan
    others = (t.mT, t[:2], t.double(), t.reshape(-1)[1:].as_strided((3, 8), (8, 1)), None)
    assert all(plans.find((other, None), (True,)) is not plan for other in others)
    assert plans.find((t, None), (False,)) is not plan


def test_a_plan_is_of_one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 4), torch.ones(4)
    norm(x, weight)
    monkeypatch.setenv("TRISCAN_BACKEND", "refrence")
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        norm(x, weight)


def test_values_of_indices_are_checked_at_every_call() -> None:
    x, A, B = torch.randn(1, 6, 2), -torch.ones(2, 3), torch.randn(1, 6, 1, 3)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    selective_scan(x, x, A, B, B, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="ascending bounds from 0 to L = 6"):
        selective_scan(x, x, A, B, B, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="ascending bounds from 0 to L = 6"):
        causal_conv1d(x, torch.ones(2, 4), cu_seqlens=torch.tensor([0, 4, 3], dtype=torch.int32))


@pytest.mark.parametrize("low_rank", [False, True])
def test_autocast_does_not_change_what_is_kept(low_rank: bool) -> None:
    x, A, B, weight = torch.randn(1, 6, 2), -torch.ones(2, 3), torch.randn(1, 6, 1, 3), torch.randn(2, 1)
    dt = x[..., :1].contiguous() if low_rank else x
    arguments = (x, dt, A, B, B)
    extra = {"dt_weight": weight} if low_rank else {}
    first = selective_scan(*arguments, **extra)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        selective_scan(*arguments, **extra)  # type: ignore[arg-type]
    assert torch.equal(selective_scan(*arguments, **extra), first)  # type: ignore[arg-type]
