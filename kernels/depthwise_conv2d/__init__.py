"""The depthwise convolution of channel-last maps with its activation, as one op.

``depthwise_conv2d`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.depthwise_conv2d``, whose arguments are the same by position; checks and dispatch are inside the op.

B batch, H W map, D channels, U V height and width of the kernel.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import recompute
from kernels.backend import resolve
from kernels.checks import check_float, check_shape, owned
from kernels.depthwise_conv2d.reference import conv
from kernels.registration import op

__all__ = ["depthwise_conv2d"]

ACTIVATIONS = ("", "silu", "gelu")
MAX_TAPS = 9  # of the GPU kernels: the backward keeps a sum for each in registers


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu", "gelu"] | None = None,
    backend: str = "auto",
) -> Tensor:
    """``y[h, w] = act(sum_uv weight[u, v] x[h + u - U // 2, w + v - V // 2] + bias)``, zeros around the map.

    A cross-correlation, as ``torch.nn.functional.conv2d`` computes. Sums are float32 (float64 for float64 x). Real
    dtypes may be mixed; everything is differentiable. The backward computes the sums again, so that only x is kept.

    Args:
        x: ``(B, H, W, D)``.
        weight: ``(D, 1, U, V)``, both sides odd.
        bias: ``(D,)`` or None.
        activation: ``silu``, ``gelu`` (exact) or None.
        backend: ``auto``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``. The Triton kernels
            take up to 9 taps; kernels with more run on PyTorch's convolution.

    Returns:
        y ``(B, H, W, D)`` in x's dtype.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    if backend in ("torch", "reference"):  # plain operators: differentiable twice, exportable
        _check(x, weight, bias, activation or "")
        return conv(x, weight, bias, activation or "")
    return _depthwise_conv2d(x, weight, bias, activation or "", backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Raises unless the arguments fit each other."""
    check_float(x, weight=weight, bias=bias)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, H, W, D), channels last; use .permute(0, 2, 3, 1)")
    if weight.ndim != 4 or weight.shape[:2] != (x.shape[3], 1) or not (weight.shape[2] % 2 and weight.shape[3] % 2):
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, wanted ({x.shape[3]}, 1, U, V) = (D, 1, U, V), U and V odd"
        )
    check_shape("bias", bias, (x.shape[3],), "(D,)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted 'silu', 'gelu' or None")


def _runs_triton(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether the Triton kernels run; on the CPU PyTorch's convolution is the kernel."""
    name = resolve("depthwise_conv2d", backend, x.device)
    return name == "triton" and weight.shape[2] * weight.shape[3] <= MAX_TAPS


@op
def _depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str) -> Tensor:
    """y ``(B, H, W, D)``, dense."""
    _check(x, weight, bias, activation)
    if _runs_triton(x, weight, backend):
        from kernels.depthwise_conv2d import triton

        return triton.forward(x, weight, bias, activation)
    return owned(conv(x, weight, bias, activation), x.shape)


@_depthwise_conv2d.register_fake
def _(x, weight, bias, activation, backend):
    _check(x, weight, bias, activation)
    return x.new_empty(x.shape)


@op
def _depthwise_conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty without one), shaped as these."""
    if _runs_triton(x, weight, backend):
        from kernels.depthwise_conv2d import triton

        return triton.backward(dy, x, weight, bias, activation)
    found = recompute.gradients(lambda *t: (conv(t[0], t[1], t[2], activation),), (x, weight, bias), (dy,))
    return found[0], found[1], found[2] if bias is not None else x.new_empty(0)


@_depthwise_conv2d_backward.register_fake
def _(dy, x, weight, bias, activation, backend):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _depthwise_conv2d_backward(dy, x, weight, bias, ctx.activation, ctx.backend)
    return dx, dweight, None if bias is None else dbias, None, None


_depthwise_conv2d.register_autograd(_backward, setup_context=_setup_context)


def _flops(x: Any, weight: Any) -> int:
    """A multiplication and an addition a tap."""
    return 2 * x[0] * x[1] * x[2] * x[3] * weight[2] * weight[3]


@register_flop_formula(torch.ops.triscan.depthwise_conv2d)
def _forward_flops(x, weight, *args, **kwargs) -> int:
    return _flops(x, weight)


@register_flop_formula(torch.ops.triscan.depthwise_conv2d_backward)
def _backward_flops(dy, x, weight, *args, **kwargs) -> int:
    return 3 * _flops(x, weight)  # the sums again, dx and dweight
