"""The causal convolution in plain ATen operators: for devices without a kernel, export and higher derivatives.

W shifted multiply-adds; memory of a few tensors of x's size.

B batch, L tokens, D channels, K routes, P places, W conv width, S sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.order import Order, final_state, inverse, scan_order
from kernels.causal_conv1d.problem import Problem


def conv(p: Problem) -> tuple[Tensor, Tensor]:
    """Returns y ``(B, L, K, D)`` and the final state ``(S, K, W - 1, D)``, both in x's dtype."""
    o = scan_order(p)
    y = _sums_in_order(p) if o.token is None and o.start is None else _sums_by_table(p, o)
    if p.bias is not None:
        y = y + p.bias.to(p.dtype)[:, None]
    if p.silu:
        y = F.silu(y)
    return _at_tokens(p, o, y), final_state(p, o)


def _sums_in_order(p: Problem) -> Tensor:
    """``sum_w weight_w x_{t - W + 1 + w}`` at the places ``(B, 1, L, D)`` where places are tokens."""
    x = p.x.transpose(1, 2).to(p.dtype)
    past = x.new_zeros(p.batch, 1, p.width - 1, p.channels)
    if p.initial_state is not None:
        past = p.initial_state.to(p.dtype)
    x = torch.cat([past, x], 2)
    weight = p.weight.to(p.dtype)
    y = weight[:, None, :, 0] * x[:, :, : p.length]
    for w in range(1, p.width):
        y = y + weight[:, None, :, w] * x[:, :, w : w + p.length]
    return y


def _sums_by_table(p: Problem, o: Order) -> Tensor:
    """The same ``(B, K, P, D)`` for any order: each tap gathers its rows from x, the state and one row of zeros."""
    x = p.x.to(p.dtype)
    columns = x.shape[2]
    rows = [x.reshape(-1, p.channels)]
    if p.initial_state is not None:
        rows.append(p.initial_state.to(p.dtype).reshape(-1, p.channels))
    rows.append(x.new_zeros(1, p.channels))
    table = torch.cat(rows)
    place = torch.arange(p.positions, device=x.device)
    b = torch.arange(p.batch, device=x.device)[:, None, None]
    k = torch.arange(p.routes, device=x.device)[:, None]
    start = torch.zeros_like(place) if o.start is None else o.start.long()
    row = b if o.row is None else o.row.long()
    shape = (p.batch, p.routes, p.positions)
    y = x.new_zeros(*shape, p.channels)
    for w in range(p.width):
        source = (place - (p.width - 1 - w)).expand(shape)
        token = source.clamp(min=0)
        if o.token is not None:
            token = torch.gather(o.token.long().expand(shape), 2, token)
        at_x = (b * p.length + token) * columns + k.clamp(max=columns - 1)
        index = torch.where((source >= start) & (token >= 0), at_x, table.shape[0] - 1)
        if p.initial_state is not None:
            slot = source - start + p.width - 1
            at_state = p.batch * p.length * columns + (row * p.routes + k) * (p.width - 1) + slot
            index = torch.where((source < start) & (row >= 0), at_state, index)
        y = y + p.weight.to(p.dtype)[:, None, :, w] * table[index]
    return y


def _at_tokens(p: Problem, o: Order, y: Tensor) -> Tensor:
    """``(B, K, P, D)`` at places to ``(B, L, K, D)`` at tokens, zeros where a token is not visited, rounded once."""
    if o.token is not None and p.positions:
        place = inverse(o.token, p.length).expand(p.batch, p.routes, -1).long()
        rows = torch.gather(y, 2, place.clamp(min=0)[..., None].expand(-1, -1, -1, p.channels))
        y = torch.where((place >= 0)[..., None], rows, 0)
    elif o.token is not None:
        y = y.new_zeros(p.batch, p.routes, p.length, p.channels)
    return y.transpose(1, 2).to(p.x.dtype)
