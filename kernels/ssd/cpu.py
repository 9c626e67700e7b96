"""``ssd`` on the CPU: the recurrence, step by step, and a backward of matrix products that keeps one state a chunk.

With numba the forward is the selective scan's compiled kernel, whose states stay in registers; it reads the tokens
where they lie. Without numba it is the chunks of ``aten.py``.

A chunk's gradients come from autograd of that chunk alone, from the last to the first, so that memory beyond the
gradients is the states between the chunks (P N / Q numbers a token and head) and one chunk's intermediates.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, Q positions of a chunk, S
sequences.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import recompute
from kernels.backend import has
from kernels.checks import full_precision
from kernels.ssd import Gradients
from kernels.ssd.aten import at, chunk, chunks, scan
from kernels.ssd.problem import Problem
from kernels.ssd.reference import gate, gather, limited, sequences, start_state

PARAMETERS = ("A", "D", "dt_bias")


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Runs the scan: y ``(B, L, [K,] H, P)`` in x's dtype and the final state ``(S, K, H, P, N)``."""
    with torch.no_grad():
        y, state = _walk(p) if has("numba") and _walks(p) else scan(p)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (y, state))  # type: ignore[return-value]


def _walks(p: Problem) -> bool:
    """Whether ``_walk`` takes the problem: a limit of dt must not change what padding of a route decays by."""
    return p.x.numel() * p.state > 0 and not (p.clamped and p.route is not None and bool((p.route < 0).any()))


def _walk(p: Problem) -> tuple[Tensor, Tensor]:
    """``forward`` as a selective scan of H P channels whose states decay alike."""
    from kernels.selective_scan import cpu
    from kernels.selective_scan.problem import Problem as Selective

    size, dt, bias = p.head_dim, p.dt, p.dt_bias
    if p.clamped:
        dt, bias = limited(p, dt), None

    def each(t: Tensor) -> Tensor:  # (..., H) for each channel of a head
        return t.unsqueeze(-1).expand(*t.shape, size).flatten(-2)

    y, state, _ = cpu.forward(
        Selective(
            x=p.x.flatten(3),
            dt=each(dt),
            A=each(p.A).unsqueeze(-1).expand(-1, -1, p.state),
            B=p.B,
            C=p.C,
            D=None if p.D is None else each(p.D) if p.D.ndim == 2 else p.D.flatten(1),
            z=None if p.z is None else p.z.flatten(2),
            dt_bias=None if bias is None else each(bias),
            route=p.route,
            initial_state=None if p.initial_state is None else p.initial_state.flatten(2, 3),
            cu_seqlens=p.cu_seqlens,
            code=p.code,
            dt_softplus=p.dt_softplus and not p.clamped,
            route_params=True,
            merge=p.merge,
            reverse=p.reverse,
            plan=p.plan.setdefault("walk", {}),
        )
    )
    return y.unflatten(-1, (p.heads, size)), state.unflatten(2, (p.heads, size))


def backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    """Gradients of everything.

    Args:
        p: The problem of the forward call.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, H, P, N)``, or None.
    """
    with torch.no_grad(), full_precision(p.x.device):
        if p.cu_seqlens is None:
            return _backward(p, dy, dstate)
        return _packed(p, p.cu_seqlens, dy, dstate)


def _packed(p: Problem, cu_seqlens: Tensor, dy: Tensor, dstate: Tensor | None) -> Gradients:
    """Sequence by sequence: rows laid end to end, parameters' gradients added up."""
    parts, start = [], 0
    for s, part in enumerate(sequences(p, cu_seqlens)):
        end = start + part.length
        parts.append(_backward(part, dy[:, start:end], None if dstate is None else dstate[s : s + 1]))
        start = end
    joined = {}
    for name in Gradients._fields:
        found = [getattr(part, name) for part in parts]
        if found[0] is None:
            joined[name] = None
        elif name in PARAMETERS:
            joined[name] = torch.stack(found).sum(0)
        else:
            joined[name] = torch.cat(found, 0 if name == "initial_state" else 1)
    return Gradients(**joined)


def _backward(p: Problem, dy: Tensor, dstate: Tensor | None) -> Gradients:
    dy, dz = _ungate(p, dy)
    rows = gather(p)
    dys = _at_positions(p, dy)
    states, h = [], start_state(p)
    spans = list(chunks(p))
    for span in spans:
        states.append(h)
        x, dt, B, C = (t[:, span] for t in rows)
        h = chunk(at(p, span), x, dt, B, C, h)[1]
    dh = torch.zeros_like(h) if dstate is None else dstate.to(p.dtype, copy=True)
    found: dict[str, Tensor] = {}
    grads = [torch.zeros(t.shape, dtype=p.dtype, device=t.device) for t in rows]
    for span, h in zip(reversed(spans), reversed(states), strict=True):
        parts = _chunk_gradients(at(p, span), tuple(t[:, span] for t in rows), h, dys[:, span], dh)
        for grad, part in zip(grads, parts[:4], strict=True):
            grad[:, span] = part
        dh = parts[4]
        for name, part in zip(PARAMETERS, parts[5:], strict=True):
            found[name] = found[name] + part if name in found else part
    dx, ddt, dB, dC = _at_tokens(p, grads)
    given = {n: getattr(p, n) for n in PARAMETERS}
    totals = {n: None if t is None else found.get(n, torch.zeros_like(t)) for n, t in given.items()}
    return Gradients(x=dx, dt=ddt, B=dB, C=dC, z=dz, initial_state=None if p.initial_state is None else dh, **totals)  # type: ignore[arg-type]


def _chunk_gradients(p: Problem, rows: tuple[Tensor, ...], h: Tensor, dy: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a chunk's rows, of its first state, and of the parameters, all in the dtype of the scan."""
    parameters = tuple(None if getattr(p, n) is None else getattr(p, n).to(p.dtype) for n in PARAMETERS)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        part = dataclasses.replace(p, **dict(zip(PARAMETERS, inputs[5:], strict=True)))
        x, dt, B, C, h = inputs[:5]
        return chunk(part, x, dt, B, C, h)

    return recompute.gradients(function, (*(t.to(p.dtype) for t in rows), h, *parameters), (dy, dh))


def _ungate(p: Problem, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient before the gate in the dtype of the scan, and that of z ``(B, L, H, P)``."""
    dy = dy.to(p.dtype)
    if p.z is None:
        return dy, None
    y = scan(dataclasses.replace(p, z=None, x=p.x.to(p.dtype)))[0]
    z = gate(p, p.z)
    silu, sigmoid = F.silu(z), torch.sigmoid(z)
    dz = dy * y
    dz = (dz.sum(2) if dz.ndim == 5 else dz) * sigmoid * (1 + z * (1 - sigmoid))
    return dy * (silu if dy.ndim == 4 else silu[:, :, None]), dz


def _at_positions(p: Problem, dy: Tensor) -> Tensor:
    """dy ``(B, L, [K,] H, P)`` at the positions, ``(B, T, K, H, P)``."""
    dy = dy if dy.ndim == 5 else dy.unsqueeze(2).expand(-1, -1, p.routes, -1, -1)
    return gather(dataclasses.replace(p, x=dy))[0]


def _at_tokens(p: Problem, grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of what ``gather`` returned to those of its inputs."""
    if p.route is None:
        return tuple(grads)
    names = ("x", "dt", "B", "C")
    inputs = tuple(getattr(p, n).to(p.dtype) for n in names)
    return recompute.gradients(
        lambda *t: gather(dataclasses.replace(p, **dict(zip(names, t, strict=True)))), inputs, grads
    )
