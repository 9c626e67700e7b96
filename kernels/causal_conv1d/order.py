"""The order in which a convolution visits tokens, as tables: what lets one kernel serve routes, packing and reversal.

A *place* counts the inputs of one scan from 0: reversal and the padding tokens of ``seq_idx`` are gone there, so that
the taps of place q are q, q - 1, ..., back to the start of its sequence; what lies before that is the state.

B batch, L tokens, D channels, K routes, P places, W conv width, S sequences (rows of the state).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.causal_conv1d.problem import Problem


@dataclass(frozen=True)
class Order:
    """Tables of int32; an axis of size 1 in place of B or K is shared by all. None stands for the plain case.

    Attributes:
        token: ``(B, K, P)`` token at a place, -1 where a zero is read and nothing is written; None: place q is token q.
        start: ``(B, K, P)`` first place of the sequence that holds a place; None: 0.
        row: ``(B, K, P)`` row of the state that enters this sequence, -1 for none; None: the batch index.
        begin: ``(S, K)`` first place of the sequence whose end is final state s; None: 0.
        end: ``(S, K)`` place after its last; None: P.
    """

    token: Tensor | None
    start: Tensor | None
    row: Tensor | None
    begin: Tensor | None
    end: Tensor | None


def scan_order(p: Problem) -> Order:
    """Builds the tables of a convolution; never waits for a device."""
    if p.cu_seqlens is not None:
        return _packed(p)
    if p.seq_idx is not None and p.length:
        return _restarting(p)
    token = p.route
    if token is None and p.reverse:
        token = torch.arange(p.length - 1, -1, -1, device=p.x.device)[None]
    elif token is not None and p.reverse:
        token = token.flip(-1)
    return Order(_int32(token), None, None, None, None)


def inverse(token: Tensor, length: int) -> Tensor:
    """``(B, K, L)`` int32: the place at which each token is visited, -1 where it is not."""
    place = torch.arange(token.shape[-1], device=token.device, dtype=torch.int32).expand_as(token)
    table = torch.full((*token.shape[:2], length + 1), -1, dtype=torch.int32, device=token.device)
    return table.scatter(2, torch.where(token < 0, length, token).long(), place)[:, :, :length].contiguous()


def _packed(p: Problem) -> Order:
    """Sequences end to end: every one has its own row of the state."""
    assert p.cu_seqlens is not None
    bounds = p.cu_seqlens.long()
    place = torch.arange(p.length, device=p.x.device)
    token = None
    if p.reverse:
        token = _int32(torch.arange(p.length - 1, -1, -1, device=p.x.device)[None])
        row = torch.searchsorted(bounds, p.length - 1 - place, right=True) - 1
        begin, end = p.length - bounds[1:], p.length - bounds[:-1]
    else:
        row = torch.searchsorted(bounds, place, right=True) - 1
        begin, end = bounds[:-1], bounds[1:]
    row = row.clamp(0, p.sequences - 1)
    return Order(token, _int32(begin[row][None]), _int32(row[None]), begin[:, None], end[:, None])


def _restarting(p: Problem) -> Order:
    """Sequences by ``seq_idx``: padding tokens are taken out, the state restarts where the number changes."""
    assert p.seq_idx is not None
    if p.route is None:
        token = torch.arange(p.length, device=p.x.device).expand(p.batch, 1, -1)
    else:
        token = p.route.long().expand(p.batch, -1, -1)
    if p.reverse:
        token = token.flip(-1)
    index = torch.gather(p.seq_idx.long()[:, None].expand(-1, token.shape[1], -1), 2, token.clamp(min=0))
    padding = (index < 0) & (token >= 0)
    order = torch.argsort(padding.int(), dim=-1, stable=True)  # real tokens and slots of a route first
    token, index = torch.gather(token, 2, order), torch.gather(index, 2, order)
    gone = torch.gather(padding, 2, order)
    place = torch.arange(p.positions, device=p.x.device).expand_as(token)
    real = (token >= 0) & ~gone
    last = torch.where(real, place, -1).cummax(-1).values  # slots belong to the sequence of the last real token
    before = torch.cat([torch.full_like(last[..., :1], -1), last[..., :-1]], -1)[..., : p.positions]
    previous = torch.gather(index, 2, before.clamp(min=0))
    restart = real & (before >= 0) & (previous != index)
    start = torch.where(restart, place, 0).cummax(-1).values
    count = (~gone).sum(-1)  # (B, K)
    row = torch.where((start == 0) & ~gone, torch.arange(p.batch, device=p.x.device)[:, None, None], -1)
    begin = torch.where(gone, 0, start).amax(-1) if p.positions else count
    token = torch.where(gone, -1, token)
    start = torch.where(gone, place, start)
    return Order(_int32(token), _int32(start), _int32(row), begin, count)


def _int32(t: Tensor | None) -> Tensor | None:
    """The table with all three axes, ``(1, K, P)`` where it was ``(K, P)``."""
    if t is None:
        return None
    return (t if t.ndim == 3 else t[None]).to(torch.int32).contiguous()


def final_state(p: Problem, o: Order) -> Tensor:
    """The last W - 1 inputs of each sequence, ``(S, K, W - 1, D)`` in x's dtype; differentiable."""
    place, from_x, token = _window(p, o)
    k = torch.arange(p.routes, device=p.x.device)[:, None]
    shape = (p.sequences, p.routes, p.width - 1, p.channels)
    state = p.x.new_zeros(shape)
    if p.length:
        rows = p.x[_batch(p)[:, None, None], token.clamp(min=0), k if p.x.shape[2] > 1 else k * 0]
        state = torch.where((from_x & (token >= 0))[..., None], rows, 0)
    if p.initial_state is not None:
        slot, from_state = _slots(p, o, place)
        old = torch.gather(p.initial_state.to(p.x.dtype), 2, slot[..., None].expand(shape))
        state = torch.where(from_state[..., None], old, state)
    return state


def last_inputs(p: Problem) -> Tensor:
    """``final_state`` of tokens in order, without tables; a tensor of its own."""
    kept = min(p.width - 1, p.length)
    x = p.x.transpose(1, 2)
    last = x[:, :, :kept].flip(2) if p.reverse else x[:, :, p.length - kept :].clone()
    if kept == p.width - 1:
        return last
    if p.initial_state is None:
        before = last.new_zeros(p.batch, 1, p.width - 1 - kept, p.channels)
    else:
        before = p.initial_state[:, :, kept:].to(last.dtype)
    return torch.cat((before, last), 2)


def final_state_backward(p: Problem, o: Order, dstate: Tensor, dx: Tensor, dinitial: Tensor | None) -> None:
    """Adds the gradients of ``final_state`` to dx ``(B, L, K or 1, D)`` and dinitial ``(S, K, W - 1, D)``, in place."""
    if p.in_order:
        _last_inputs_backward(p, dstate, dx, dinitial)
        return
    place, from_x, token = _window(p, o)
    dstate = dstate.to(dx.dtype)
    if p.length:
        keep = (from_x & (token >= 0))[..., None]
        for k in range(p.routes):  # one route after the other: then every row is added to once, in a fixed order
            column = torch.full_like(token[:, k], k if dx.shape[2] > 1 else 0)
            index = (_batch(p)[:, None], token[:, k].clamp(min=0), column)
            dx.index_put_(index, torch.where(keep[:, k], dstate[:, k], 0), accumulate=True)
    if dinitial is not None:
        slot, from_state = _slots(p, o, place)
        values = torch.where(from_state[..., None], dstate, 0).to(dinitial.dtype)
        dinitial.scatter_add_(2, slot[..., None].expand_as(values), values)


def _last_inputs_backward(p: Problem, dstate: Tensor, dx: Tensor, dinitial: Tensor | None) -> None:
    """The same of ``last_inputs``, in a few operations: a sequence read in pieces has one of these a piece."""
    kept = min(p.width - 1, p.length)
    late = dstate[:, :, p.width - 1 - kept :].transpose(1, 2)  # (B, kept, 1, D), the oldest first
    if p.reverse:
        dx[:, :kept] += late.flip(1).to(dx.dtype)
    else:
        dx[:, p.length - kept :] += late.to(dx.dtype)
    if dinitial is not None and kept < p.width - 1:
        dinitial[:, :, kept:] += dstate[:, :, : p.width - 1 - kept].to(dinitial.dtype)


def initial_state_backward(p: Problem, o: Order, g: Tensor) -> Tensor:
    """Gradient of the initial state ``(S, K, W - 1, D)`` from that of the sums at the places, g ``(B, K, P, D)``."""
    out = g.new_zeros(p.sequences, p.routes, p.width - 1, p.channels)
    if not p.positions:
        return out
    weight = p.weight.to(g.dtype)
    if p.in_order:
        for m in range(min(p.width - 1, p.positions)):
            out[:, :, m:] += g[:, :, m : m + 1] * weight[:, :, : p.width - 1 - m].transpose(1, 2)
        return out
    enter = torch.zeros(p.sequences, 1, dtype=torch.int64, device=g.device)
    if p.cu_seqlens is not None and o.begin is not None:
        enter = o.begin
    b = _batch(p)[:, None]
    k = torch.arange(p.routes, device=g.device)
    for m in range(p.width - 1):  # place m of a sequence reads slots m, m + 1, ... with weights 0, 1, ...
        place = enter + m
        inside = place < p.positions
        place = place.clamp(max=p.positions - 1)
        if o.row is not None:
            row = o.row.expand(p.batch, p.routes, -1)[b, k, place]
            inside = inside & (row == torch.arange(p.sequences, device=g.device)[:, None])
        gm = torch.where(inside[..., None], g[b, k, place], 0)  # (S, K, D)
        out[:, :, m:] += gm[:, :, None] * weight[:, :, : p.width - 1 - m].transpose(1, 2)
    return out


def _window(p: Problem, o: Order) -> tuple[Tensor, Tensor, Tensor]:
    """``(S, K, W - 1)``: places of the final state's slots, whether inputs are there (not old state), their tokens."""
    end = p.positions if o.end is None else o.end[..., None]
    place = (end - (p.width - 1) + torch.arange(p.width - 1, device=p.x.device)).expand(p.sequences, p.routes, -1)
    from_x = place >= _begin(p, o)
    token = place.clamp(min=0, max=max(p.positions - 1, 0))
    if o.token is not None and p.positions:
        table = o.token.expand(p.batch, p.routes, -1)
        token = table[_batch(p)[:, None, None], torch.arange(p.routes, device=p.x.device)[:, None], token].long()
    return place, from_x, token


def _begin(p: Problem, o: Order) -> Tensor:
    """``Order.begin`` with a last axis, ``(S, K, 1)``."""
    return torch.zeros(1, 1, 1, dtype=torch.int64, device=p.x.device) if o.begin is None else o.begin[..., None]


def _batch(p: Problem) -> Tensor:
    """Batch index of each row of the state ``(S,)``."""
    if p.cu_seqlens is None:
        return torch.arange(p.batch, device=p.x.device)
    return torch.zeros(p.sequences, dtype=torch.int64, device=p.x.device)


def _slots(p: Problem, o: Order, place: Tensor) -> tuple[Tensor, Tensor]:
    """Which slot of the initial state the window reaches back to, and where it does."""
    begin = _begin(p, o)
    slot = place - begin + p.width - 1
    first = torch.ones_like(begin, dtype=torch.bool) if p.cu_seqlens is not None else begin == 0
    return slot.clamp(0, max(p.width - 2, 0)), first & (place < begin)
