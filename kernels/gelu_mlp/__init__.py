"""The two-layer perceptron of vision models as one op that keeps its input alone for the backward.

``gelu_mlp`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.gelu_mlp``, whose arguments are the same by position.

D width, M hidden width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.checks import check_float, check_shape
from kernels.registration import op

__all__ = ["gelu_mlp", "plain"]


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``y = weight2 gelu(weight1 x + bias1) + bias2``, GELU exact (Hendrycks & Gimpel 2016), in x's dtype.

    PyTorch keeps the hidden layer before and after the GELU, 2 M numbers a row, most of what a block keeps. Here the
    backward computes it again: a third more products of the perceptron, which are the cheapest part of a block's time.

    Args:
        x: ``(..., D)``.
        weight1: ``(M, D)``; like all parameters in any real dtype, cast to x's.
        bias1: ``(M,)``.
        weight2: ``(O, M)``.
        bias2: ``(O,)``.

    Returns:
        y ``(..., O)`` in x's dtype.

    Raises:
        ValueError: If a shape, dtype or device doesn't fit; the message names the tensor and the fix.
    """
    return _gelu_mlp(x, weight1, bias1, weight2, bias2)


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    """Raises unless the arguments fit each other."""
    check_float(x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    hidden, out = weight1.shape[:1], weight2.shape[:1]
    check_shape("weight1", weight1, (*hidden, x.shape[-1]), "(M, D)")
    check_shape("bias1", bias1, tuple(hidden), "(M,)")
    check_shape("weight2", weight2, (*out, *hidden), "(O, M)")
    check_shape("bias2", bias2, tuple(out), "(O,)")


def plain(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """The same in plain differentiable operators."""
    weight1, bias1, weight2, bias2 = (t.to(x.dtype) for t in (weight1, bias1, weight2, bias2))
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


@op
def _gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """y ``(..., O)``."""
    _check(x, weight1, bias1, weight2, bias2)
    with torch.autocast(x.device.type, enabled=False):
        return plain(x, weight1, bias1, weight2, bias2)


@_gelu_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2):
    _check(x, weight1, bias1, weight2, bias2)
    return x.new_empty((*x.shape[:-1], weight2.shape[0]))


@op
def _gelu_mlp_backward(
    dy: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2, shaped as these."""
    with torch.autocast(x.device.type, enabled=False):
        rows, dout = x.flatten(0, -2), dy.flatten(0, -2)
        first, second = weight1.to(x.dtype), weight2.to(x.dtype)
        hidden = F.linear(rows, first, bias1.to(x.dtype))
        dweight2 = dout.t() @ F.gelu(hidden)
        dhidden = torch.ops.aten.gelu_backward(dout @ second, hidden)
        dweight1, dx = dhidden.t() @ rows, dhidden @ first
    return (
        dx.view(x.shape),
        dweight1.to(weight1.dtype),
        dhidden.sum(0, dtype=_wide(x)).to(bias1.dtype),
        dweight2.to(weight2.dtype),
        dout.sum(0, dtype=_wide(x)).to(weight2.dtype),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_gelu_mlp_backward.register_fake
def _(dy, x, weight1, bias1, weight2):
    tensors = (x, weight1, bias1, weight2)
    return (*(t.new_empty(t.shape) for t in tensors), weight2.new_empty(weight2.shape[:1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight1, bias1, weight2, bias2 = inputs
    ctx.save_for_backward(x, weight1, bias1, weight2)
    ctx.bias2_dtype = bias2.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    *grads, dbias2 = _gelu_mlp_backward(dy, *ctx.saved_tensors)
    return (*grads, dbias2.to(ctx.bias2_dtype))


_gelu_mlp.register_autograd(_backward, setup_context=_setup_context)


def _flops(x: Any, weight1: Any, weight2: Any) -> int:
    """Multiplications and additions of the two products."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * (weight1[0] * weight1[1] + weight2[0] * weight2[1])


@register_flop_formula(torch.ops.triscan.gelu_mlp)
def _forward_flops(x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return _flops(x, weight1, weight2)


@register_flop_formula(torch.ops.triscan.gelu_mlp_backward)
def _backward_flops(dy, x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return 2 * _flops(x, weight1, weight2) + _flops(x, weight1, (0, 0))  # and the hidden layer again
