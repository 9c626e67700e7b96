"""What the CUDA kernels make of a problem's states: complex numbers as pairs of reals, and not too many states at once.

y = <C, h> adds up over the states, so a problem with many is several problems with few, whose y and whose gradients of
x, dt and z are added up in float32, in the order of the states. With h = a + bi, 2 Re(C h) = 2 Re(C) a - 2 Im(C) b:
once C is doubled and conjugated, the parts of a complex number are two real states, except where the decay turns them.

K routes, D channels, N state, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.selective_scan.problem import Problem

MOST = 64  # real states at once: what threads of a block hold


@dataclass(frozen=True)
class Part:
    """Some of a problem's states.

    Attributes:
        p: The problem of these states alone, real; every part has D and z.
        first: Number of the first of them, reals counted.
        of: Real states of the whole problem.
        pairs: Whether each two are the parts of a complex number.
    """

    p: Problem
    first: int
    of: int
    pairs: bool


def parts_of(p: Problem) -> list[Part]:
    """The parts of a problem, in the order of the states."""
    whole = in_pairs(p) if p.is_complex else p
    state = whole.state
    if state <= MOST:
        return [Part(whole, 0, state, p.is_complex)]
    return [Part(_slice(whole, n, min(n + MOST, state)), n, state, p.is_complex) for n in range(0, state, MOST)]


def reals(p: Problem) -> int:
    """Real states of a problem."""
    return 2 * p.state if p.is_complex else p.state


def real(t: Tensor) -> Tensor:
    """``(..., N)`` complex as ``(..., 2 N)`` real."""
    return torch.view_as_real(t.resolve_conj().contiguous()).flatten(-2)


def joined(parts: list[Tensor], is_complex: bool) -> Tensor:
    """The states of all parts again, ``(..., N)``."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return torch.view_as_complex(whole.unflatten(-1, (-1, 2)).contiguous()) if is_complex else whole


def doubled(t: Tensor) -> Tensor:
    """Twice the conjugate of complex numbers that lie in pairs: C on its way in, and its gradient on its way out."""
    out = 2 * t
    out[..., 1::2].neg_()
    return out


def in_pairs(p: Problem) -> Problem:
    """A complex problem with the parts of its numbers as neighbouring real states."""
    initial = None if p.initial_state is None else real(p.initial_state)
    return replace(p, A=real(p.A), B=real(p.B), C=doubled(real(p.C)), initial_state=initial)


def _slice(p: Problem, start: int, stop: int) -> Problem:
    cut = {n: t[..., start:stop] for n in ("A", "B", "C", "initial_state") if (t := getattr(p, n)) is not None}
    return replace(p, **cut)


def saved_from(saved: Tensor, part: Part) -> Tensor:
    """The saved states ``(slots, K, N, D)`` from a part's first on."""
    flat = torch.view_as_real(saved).flatten() if saved.is_complex() else saved.flatten()
    return flat[part.first * saved.shape[-1] :]
