"""The causal convolution on the CPU, for what ``cpu_walk`` doesn't take: routes, packed sequences, other dtypes.

    s_q = bias + sum_w weight_w in_{q - W + 1 + w}      in_j: the input at place j, older state before the start
    y at token(q) = silu(s_q)

    g_q  = dy at token(q) * silu'(s_q)
    dx at token(q) = sum_w weight_w g_{q + W - 1 - w}   over the places of the same sequence
    dweight_w = sum_q g_q in_{q - W + 1 + w},   dbias = sum_q g_q

B batch, L tokens, D channels, K routes, P places, W conv width, S sequences.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.order import Order, inverse
from kernels.causal_conv1d.problem import Problem
from kernels.jit import compiled
from kernels.threads import parts, run

PLACES = 128  # places in a job; a job sums its own part of dweight


@compiled(inline="always")
def _source(place, start, token):
    """Token read at a place: -1 for a zero, -2 for a place before the start of the sequence."""
    if place < start:
        return -2
    return token[place] if token.shape[0] > 0 else place


@compiled(fastmath={"contract"})
def _sums(x, weight, bias, state, tables, steps, sizes, out, at_tokens, first, last):
    """Writes s at tokens (B, L, K, D) or at places (B, K, P, D) for the jobs first <= j < last."""
    token_table, start_table, row_table = tables
    routes, places, columns, width = sizes
    channels = weight.shape[2]
    blocks = (places + PLACES - 1) // PLACES
    for job in range(first, last):
        b, k, block = job // (routes * blocks), job // blocks % routes, job % blocks
        token = token_table[b if token_table.shape[0] > 1 else 0, k if token_table.shape[1] > 1 else 0]
        tb, tk = (b if start_table.shape[0] > 1 else 0), (k if start_table.shape[1] > 1 else 0)
        for q in range(block * PLACES, min(places, (block + 1) * PLACES)):
            here = token[q] if token.shape[0] > 0 else q
            start = start_table[tb, tk, q] if start_table.shape[2] > 0 else 0
            row = row_table[tb, tk, q] if row_table.shape[2] > 0 else b
            if here < 0:
                if not at_tokens:
                    out[b, k, q, :] = 0
                continue
            y = out[b, here, k] if at_tokens else out[b, k, q]
            for d in range(channels):
                y[d] = bias[k, d]
            for w in range(width):
                j = q - (width - 1 - w)
                source = _source(j, start, token)
                wr = weight[k, w]
                if source >= 0:
                    base = b * steps[0] + source * steps[1] + (k if columns > 1 else 0) * steps[2]
                    xr = x[base : base + channels]
                    for d in range(channels):
                        y[d] += wr[d] * xr[d]
                elif source == -2 and row >= 0 and state.shape[0] > 0:
                    sr = state[row, k, j - start + width - 1]
                    for d in range(channels):
                        y[d] += wr[d] * sr[d]


@compiled(fastmath={"contract"})
def _input_gradient(g, weight, places, starts, dx, first, last):
    """Writes dx (B, L, K or 1, D) for the rows first <= b L + t < last; one column is the sum over the routes."""
    length, columns, channels = dx.shape[1], dx.shape[2], dx.shape[3]
    routes, total, width = g.shape[1], g.shape[2], weight.shape[1]
    for job in range(first, last):
        b, t = job // length, job % length
        for k in range(routes):
            row = dx[b, t, k if columns > 1 else 0]
            if columns > 1 or k == 0:
                row[:] = 0
            q = t
            if places.shape[2] > 0:
                q = places[b if places.shape[0] > 1 else 0, k if places.shape[1] > 1 else 0, t]
            if q < 0:
                continue
            for w in range(width):
                j = q + width - 1 - w
                if j >= total:
                    continue
                if starts.shape[2] > 0 and (
                    starts[b if starts.shape[0] > 1 else 0, k if starts.shape[1] > 1 else 0, j] > q
                ):
                    continue
                gr, wr = g[b, k, j], weight[k, w]
                for d in range(channels):
                    row[d] += wr[d] * gr[d]


@compiled(fastmath={"contract"})
def _weight_gradient(x, g, state, tables, steps, sizes, dweight, dbias, first, last):
    """Writes each job's part of dweight (jobs, W, D) and dbias (jobs, D)."""
    token_table, start_table, row_table = tables
    routes, places, columns, width = sizes
    channels = dweight.shape[2]
    blocks = (places + PLACES - 1) // PLACES
    for job in range(first, last):
        b, k, block = job // (routes * blocks), job // blocks % routes, job % blocks
        token = token_table[b if token_table.shape[0] > 1 else 0, k if token_table.shape[1] > 1 else 0]
        tb, tk = (b if start_table.shape[0] > 1 else 0), (k if start_table.shape[1] > 1 else 0)
        dweight[job] = 0
        dbias[job] = 0
        db = dbias[job]
        for q in range(block * PLACES, min(places, (block + 1) * PLACES)):
            start = start_table[tb, tk, q] if start_table.shape[2] > 0 else 0
            row = row_table[tb, tk, q] if row_table.shape[2] > 0 else b
            gr = g[b, k, q]
            for d in range(channels):
                db[d] += gr[d]
            for w in range(width):
                j = q - (width - 1 - w)
                source = _source(j, start, token)
                dw = dweight[job, w]
                if source >= 0:
                    base = b * steps[0] + source * steps[1] + (k if columns > 1 else 0) * steps[2]
                    xr = x[base : base + channels]
                    for d in range(channels):
                        dw[d] += gr[d] * xr[d]
                elif source == -2 and row >= 0 and state.shape[0] > 0:
                    sr = state[row, k, j - start + width - 1]
                    for d in range(channels):
                        dw[d] += gr[d] * sr[d]


class _Arrays:
    """The tensors of a problem as numba takes them: absent ones have size 0."""

    def __init__(self, p: Problem, o: Order) -> None:
        self.dtype = np.float64 if p.dtype == torch.float64 else np.float32
        x = p.x.detach().to(p.dtype)
        if x.stride(3) != 1 and p.channels > 1:
            x = x.contiguous()
        span = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        self.x = x.as_strided((span,), (1,)).numpy()  # rows may lie apart, as in a slice of a wider projection
        self.steps = x.stride()[:3]
        self.weight = p.weight.detach().to(p.dtype).transpose(1, 2).contiguous().numpy()  # (K, W, D)
        bias = torch.zeros(p.routes, p.channels, dtype=p.dtype) if p.bias is None else p.bias.detach().to(p.dtype)
        self.bias = bias.contiguous().numpy()
        state = torch.empty(0, 0, 0, 0) if p.initial_state is None or p.width == 1 else p.initial_state.detach()
        self.state = state.to(p.dtype).contiguous().numpy()
        self.tables = tuple(_table(t) for t in (o.token, o.start, o.row))
        self.sizes = (p.routes, p.positions, p.x.shape[2], p.width)
        self.jobs = p.batch * p.routes * -(-p.positions // PLACES)


def _table(t: Tensor | None) -> np.ndarray:
    return np.empty((1, 1, 0), np.int32) if t is None else t.numpy()


def _run_sums(p: Problem, a: _Arrays, out: Tensor, at_tokens: bool) -> None:
    """``out`` = the sums of all places; rows of tokens that are not visited keep what they hold."""
    arguments = (a.x, a.weight, a.bias, a.state, a.tables, a.steps, a.sizes, out.numpy(), at_tokens)
    run(_sums, [(*arguments, *part) for part in parts(a.jobs)])


def forward(p: Problem, o: Order) -> Tensor:
    """y ``(B, L, K, D)`` in x's dtype."""
    a = _Arrays(p, o)
    make = torch.empty if o.token is None else torch.zeros
    y = make(p.batch, p.length, p.routes, p.channels, dtype=p.dtype)
    _run_sums(p, a, y, at_tokens=True)
    if p.silu:
        F.silu(y, inplace=True)
    return y.to(p.x.dtype)


def backward(p: Problem, o: Order, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx ``(B, L, K or 1, D)`` in x's dtype, dweight, dbias, and g ``(B, K, P, D)``, the gradient of the sums."""
    a = _Arrays(p, o)
    g = _slope(p, o, a, dy)
    dweight = torch.empty(a.jobs, p.width, p.channels, dtype=p.dtype)
    dbias = torch.empty(a.jobs, p.channels, dtype=p.dtype)
    dx = torch.empty(p.x.shape, dtype=p.dtype)
    places = _table(None if o.token is None else inverse(o.token, p.length))
    arguments = (a.x, g.numpy(), a.state, a.tables, a.steps, a.sizes, dweight.numpy(), dbias.numpy())
    run(_weight_gradient, [(*arguments, *part) for part in parts(a.jobs)])
    arguments = (g.numpy(), a.weight, places, a.tables[1], dx.numpy())
    run(_input_gradient, [(*arguments, *part) for part in parts(p.batch * p.length)])
    dweight = dweight.view(p.batch, p.routes, -1, p.width, p.channels).sum((0, 2)) if a.jobs else dweight.sum(0)[None]
    dbias = dbias.view(p.batch, p.routes, -1, p.channels).sum((0, 2)) if a.jobs else dbias.sum(0)[None]
    dweight = dweight.expand(p.routes, -1, -1).transpose(1, 2)
    return dx.to(p.x.dtype), dweight, dbias.expand(p.routes, -1), g


def _slope(p: Problem, o: Order, a: _Arrays, dy: Tensor) -> Tensor:
    """g at the places: dy read along the order, times the activation's slope at the sums, which are formed again."""
    g = dy.to(p.dtype).transpose(1, 2)
    if o.token is not None:
        index = o.token.long().expand(p.batch, p.routes, -1)[..., None]
        rows = torch.gather(g, 2, index.clamp(min=0).expand(-1, -1, -1, p.channels)) if p.length else g
        g = torch.where(index >= 0, rows, 0)
    g = g.contiguous()
    if not p.silu:
        return g
    sums = torch.empty_like(g)
    _run_sums(p, a, sums, at_tokens=False)
    return torch.ops.aten.silu_backward(g, sums)
