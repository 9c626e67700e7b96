"""The definition of the norms in plain differentiable operators: the tests' truth, and the path without a kernel.

    s = x + residual                               u = s, or s silu(z) with the gate first
    o = (u - mean) / sqrt(var + eps) weight + bias      LayerNorm (Ba et al. 2016, equation 4), over groups of channels
    o = u / sqrt(mean(u^2) + eps) weight + bias         RMSNorm (Zhang & Sennrich 2019, equation 4)
    y = o, or o silu(z) with the gate last         (Mamba-2: Dao & Gu 2024, section 7.1)

D channels, G groups.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.norm.problem import Problem


def norm(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y in x's dtype, x + residual (empty without a residual), and mean and rstd ``(..., G)``."""
    s = p.x.to(p.dtype)
    if p.residual is not None:
        s = s + p.residual.to(p.dtype)
    residual = p.x.new_empty(0, dtype=p.residual_dtype) if p.residual is None else s.to(p.residual_dtype)
    gate = None if p.z is None else F.silu(p.z.to(p.dtype))
    u = s if gate is None or p.norm_before_gate else s * gate
    u = u.unflatten(-1, (p.groups, p.channels // p.groups))
    mean = u.mean(-1)
    if p.layer:
        u = u - mean[..., None]
    else:
        mean = mean * 0
    rstd = (u.square().mean(-1) + p.eps).rsqrt()
    y = (u * rstd[..., None]).flatten(-2) * p.weight.to(p.dtype)
    if p.bias is not None:
        y = y + p.bias.to(p.dtype)
    if gate is not None and p.norm_before_gate:
        y = y * gate
    return y.to(p.x.dtype), residual, mean, rstd
