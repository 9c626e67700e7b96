"""The decoding step of the causal convolution as one op: a few tokens, the state updated in place.

``conv_update`` is the function to call, ``torch.ops.triscan.conv_update`` the custom op behind it, whose arguments are
the same by position. It is to ``causal_conv1d`` what ``state_update`` is to the scans.

B batch, T tokens, D channels, W conv width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import choose, resolve
from kernels.checks import check_float, check_shape

__all__ = ["conv_update"]


def conv_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Continues ``causal_conv1d`` and leaves the last W - 1 inputs in ``state``.

    Sums are formed in float32 (float64 for float64 x). No gradients; nothing waits for the device. Float dtypes may be
    mixed.

    Args:
        x: ``(B, T, D)``.
        state: ``(B, W - 1, D)``: the inputs before the first one, oldest first; updated in place, in its own dtype.
        weight: ``(D, W)`` with any W >= 1. The last tap is the current token's.
        bias: ``(D,)``.
        activation: ``silu`` or None.
        backend: ``auto``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y ``(B, T, D)`` in x's dtype.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    return torch.ops.triscan.conv_update(x, state, weight, bias, activation or "", backend)


def _check(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_float(x, state=state, weight=weight, bias=bias)
    if activation not in ("", "silu"):
        raise ValueError(f"activation: got {activation!r}, wanted 'silu' or None")
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, T, D); a single token has T = 1: x.unsqueeze(1)")
    if weight.ndim != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted (D, W) with W >= 1")
    batch, _, channels = x.shape
    check_shape("weight", weight, (channels, weight.shape[1]), "(D, W)")
    check_shape("bias", bias, (channels,), "(D,)")
    check_shape("state", state, (batch, weight.shape[1] - 1, channels), "(B, W - 1, D)")


@torch.library.custom_op("triscan::conv_update", mutates_args=("state",))
def _conv_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> Tensor:
    """y in the shape of x."""
    _check(x, state, weight, bias, activation)
    name = "cpu"
    if x.device.type != "cpu" or not choose(backend, x.device)[1].startswith("device cpu"):
        name = resolve("conv_update", backend, x.device)
    if name == "triton":
        from kernels.conv_update import triton as module
    else:
        from kernels.conv_update import reference as module
    return module.update(x, state, weight, bias, activation == "silu")


@_conv_update.register_fake
def _(x, state, weight, bias, activation, backend):
    _check(x, state, weight, bias, activation)
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.triscan.conv_update)
def _flops(x, state, weight, *args, **kwargs) -> int:
    """A multiplication and an addition per tap."""
    return 2 * x[0] * x[1] * x[2] * weight[1]
