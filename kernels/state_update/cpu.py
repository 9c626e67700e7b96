"""``state_update`` in few large operators: for the CPU, and for devices without a kernel.

A token takes one pass over the states for the decay and the outer product, and one matrix-vector product a head for y.

B batch, T tokens, H heads, P head dim, N state, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.state_update.problem import Problem
from kernels.state_update.reference import drop_padding, finish, read_rows, time_step, write_rows


def update(p: Problem) -> Tensor:
    """Updates ``p.state`` in place and returns y ``(B, T, H, P)`` in x's dtype."""
    batch, tokens, heads, width = p.x.shape
    in_place = p.indices is None and p.state.dtype == p.dtype and p.state.is_contiguous()
    h = p.state if in_place else read_rows(p)
    matrices = h.view(batch * heads, width, h.shape[3])
    A, y = p.A.to(p.dtype), torch.empty_like(p.x)
    for t in range(tokens):
        x, dt, B, C = (v[:, t].to(p.dtype) for v in (p.x, p.dt, p.B, p.C))
        dt = time_step(p, dt)
        B, C = (v.repeat_interleave(heads // p.groups, 1).flatten(0, 1) for v in (B, C))  # (B H, N)
        h.mul_(torch.exp(dt[..., None] * A))
        matrices.baddbmm_((dt * x).reshape(batch * heads, width, 1), B[:, None])
        y[:, t] = finish(p, t, torch.bmm(matrices, C[:, :, None]).view(batch, heads, width), x)
    if not in_place:
        write_rows(p, h)
    return drop_padding(p, y)
