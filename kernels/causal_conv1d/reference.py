"""The definition of the causal convolution: a loop over the positions, any dtype, differentiable. The tests' truth.

    y_t = act(bias + sum_w weight[:, w] x_{t - W + 1 + w})        w = 0 .. W - 1

with the last W - 1 inputs as the state, as in the short convolution of Mamba (Gu & Dao 2023, section 3.4).

B batch, L tokens, D channels, K routes, P scan positions, W conv width, S sequences.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.problem import Problem


def conv(p: Problem) -> tuple[Tensor, Tensor]:
    """Returns y ``(B, L, K, D)`` and the final state ``(S, K, W - 1, D)``, both in x's dtype."""
    if p.cu_seqlens is not None:
        return _packed(p)
    x = p.x.to(p.dtype).expand(-1, -1, p.routes, -1)
    weight = p.weight.to(p.dtype).transpose(1, 2)  # (K, W, D)
    window = x.new_zeros(p.batch, p.routes, p.width - 1, p.channels)
    if p.initial_state is not None:
        window = p.initial_state.to(p.dtype, copy=True)  # without a position it is the final state
    k = torch.arange(p.routes, device=x.device)
    previous = torch.full((p.batch, p.routes), -1, device=x.device)  # sequence of the last real token, -1 before any
    columns: list[Tensor] = []
    for q in range(p.positions - 1, -1, -1) if p.reverse else range(p.positions):
        token = torch.full_like(k, q) if p.route is None else p.route[:, q].long()
        slot, token = token < 0, token.clamp(min=0)
        skip = torch.zeros_like(previous, dtype=torch.bool)
        if p.seq_idx is not None and p.length:
            index = p.seq_idx[:, token].long()
            skip = (index < 0) & ~slot
            real = ~skip & ~slot
            restart = real & (previous >= 0) & (index != previous)
            window = torch.where(restart[..., None, None], 0, window)
            previous = torch.where(real, index, previous)
        value = x.new_zeros(p.batch, p.routes, p.channels)
        if p.length:
            value = torch.where(slot[:, None] | skip[..., None], 0, x[:, token, k])
        taps = torch.cat([window, value[:, :, None]], 2)
        y = (taps * weight).sum(2)
        if p.bias is not None:
            y = y + p.bias.to(p.dtype)
        columns.append(torch.where(skip[..., None], 0, F.silu(y) if p.silu else y))
        window = torch.where(skip[..., None, None], window, taps[:, :, 1:])
    return _at_tokens(p, columns[::-1] if p.reverse else columns), window.to(p.x.dtype)


def _at_tokens(p: Problem, columns: list[Tensor]) -> Tensor:
    """Outputs at the positions to ``(B, L, K, D)`` in x's dtype, zeros at tokens that a route does not visit."""
    if not columns:
        nowhere = torch.zeros((), dtype=torch.bool, device=p.x.device)
        return torch.where(nowhere, p.x, 0).expand(-1, -1, p.routes, -1).clone()
    y = torch.stack(columns, 1)  # (B, P, K, D)
    if p.route is not None:
        token = torch.where(p.route < 0, p.length, p.route).long().t()  # padding goes to a row that is cut off
        rows = y.new_zeros(p.batch, p.length + 1, p.routes, p.channels)
        k = torch.arange(p.routes, device=y.device)
        y = rows.index_put((torch.arange(p.batch, device=y.device)[:, None, None], token, k), y)[:, :-1]
    return y.to(p.x.dtype)


def _packed(p: Problem) -> tuple[Tensor, Tensor]:
    """Each packed sequence on its own, end to end again."""
    assert p.cu_seqlens is not None
    bounds = p.cu_seqlens.tolist()
    parts = []
    for s, (start, end) in enumerate(pairwise(bounds)):
        state = None if p.initial_state is None else p.initial_state[s : s + 1]
        parts.append(conv(dataclasses.replace(p, x=p.x[:, start:end], initial_state=state, cu_seqlens=None)))
    return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
