"""The definition of the depthwise convolution, in plain differentiable operators, any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y ``(B, H, W, D)`` in x's dtype of x ``(B, H, W, D)``; sums in float32, float64 for float64.

    Args:
        x: See ``depthwise_conv2d``.
        weight: See ``depthwise_conv2d``.
        bias: See ``depthwise_conv2d``.
        activation: ``silu``, ``gelu`` or an empty string.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(
            x.permute(0, 3, 1, 2).to(wide), weight.to(wide), None if bias is None else bias.to(wide),
            padding=padding, groups=x.shape[3],
        )  # fmt: skip
        y = F.silu(y) if activation == "silu" else F.gelu(y) if activation == "gelu" else y
    return y.permute(0, 2, 3, 1).to(x.dtype)
