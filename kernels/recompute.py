"""Gradients inside a custom op whose implementation is plain differentiable operators: run it again, with autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*inputs)`` with respect to its real and complex inputs, in their shapes and dtypes.

    Args:
        function: Takes ``inputs`` by position and returns a tuple of tensors.
        inputs: What it was called with; None and integer tensors have no gradient.
        grads: One gradient per output, None where it is zero.

    Returns:
        One tensor per input; an empty one where there is no gradient.
    """
    first = next(t for t in inputs if t is not None)
    leaves = [t.detach().requires_grad_() if t is not None and not _is_index(t) else t for t in inputs]
    with torch.enable_grad(), _autograd_inside_op():
        pairs = [(y, g) for y, g in zip(function(*leaves), grads, strict=True) if g is not None and y.requires_grad]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            outputs = [y for y, _ in pairs]
            douts = [g.reshape(y.shape).to(y.dtype) for y, g in pairs]
            found = torch.autograd.grad(outputs, wanted, douts, allow_unused=True)
    remaining = iter(found)
    result = []
    for t in leaves:
        if t is None or not t.requires_grad:
            result.append(first.new_empty(0))
        else:
            grad = next(remaining)
            shaped = torch.zeros_like(t) if grad is None else grad
            result.append(shaped.detach().clone(memory_format=torch.contiguous_format))
    return tuple(result)


def _is_index(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


def _autograd_inside_op() -> Any:
    """Lets autograd record again: inside a custom op's implementation its dispatch keys are switched off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
