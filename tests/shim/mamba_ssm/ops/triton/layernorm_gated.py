"""The published functions by ours, and the reference that their tests import. D channels."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import norm
from kernels.compat import layernorm_fn, rmsnorm_fn

__all__ = ["layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """Our reference op: RMSNorm of ``x (..., D)`` with a gate; without ``upcast`` step by step, in dtypes as they are.

    What the tests allow follows from how far the second is from the first.
    """
    if upcast:
        y = norm(
            x, weight, bias, z=z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate, backend="reference"
        )
        return cast(Tensor, y)
    gate = 1.0 if z is None else F.silu(z)
    inner = x if norm_before_gate else x * gate
    groups = inner.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y = y if bias is None else y + bias
    return (y * gate if norm_before_gate else y).to(x.dtype)
