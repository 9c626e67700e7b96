"""What the ops return is the caller's: it may be changed in place, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import causal_conv1d, norm, selective_scan

OPS: dict[str, Callable[[torch.Tensor], object]] = {
    "selective_scan": lambda x: selective_scan(
        x, torch.ones_like(x), -torch.ones(4, 3), *torch.ones(2, 2, 9, 1, 3), return_final_state=True
    ),
    "causal_conv1d": lambda x: causal_conv1d(x, torch.ones(4, 4), return_final_state=True),
    "norm": lambda x: norm(x, torch.ones(4)),
}


@pytest.mark.parametrize("op", OPS)
def test_outputs_may_be_changed_in_place(op: str) -> None:
    x = torch.randn(2, 9, 4, requires_grad=True)

    def outputs() -> tuple[torch.Tensor, ...]:
        found = OPS[op](x)
        return found if isinstance(found, tuple) else (found,)

    loss = sum(t.mul(2).sum() for t in outputs())
    wanted = torch.autograd.grad(loss, x)[0]
    loss = sum(t.mul_(2).sum() for t in outputs())
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)
