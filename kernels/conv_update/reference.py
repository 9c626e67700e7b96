"""``conv_update`` in plain operators: the definition, and fast enough on the CPU, where a step is a few rows.

B batch, T tokens, D channels, W conv width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Updates ``state (B, W - 1, D)`` in place and returns y ``(B, T, D)`` in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    width, tokens = weight.shape[1], x.shape[1]
    joined = torch.cat([state.to(wide), x.to(wide)], 1)
    y = torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format)
    for w in range(width):
        y.addcmul_(joined[:, w : w + tokens], weight[:, w].to(wide))
    if bias is not None:
        y.add_(bias.to(wide))
    state.copy_(joined[:, tokens:])
    return (F.silu(y) if silu else y).to(x.dtype)
