"""The published functions by ours, and the reference that their tests import. D channels."""

from __future__ import annotations

from typing import cast

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
    """Our reference op: RMSNorm of ``x (..., D)`` with a gate.

    ``upcast`` is accepted: the reference computes in float32 at least, which only tightens what is compared with it.
    """
    y = norm(
        x, weight, bias, z=z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate, backend="reference"
    )
    return cast(Tensor, y)
