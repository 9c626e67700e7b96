"""The arguments of ``ssd``, checked and brought to one form that every implementation reads.

B batch, L tokens, H heads, P head dim, N state, G groups, K routes, T scan positions, S sequences (B unless packed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.checks import check_float, check_index, check_packing, check_route, check_shape, check_values
from kernels.plans import Plan
from kernels.selective_scan.problem import restarts


@dataclass(frozen=True)
class Problem:
    """One call of ``ssd`` in routed form: K = 1 and T = L where no route was given.

    Attributes:
        x: ``(B, L, K or 1, H, P)``.
        dt: ``(B, L, K, H)`` before bias, softplus and limits.
        A: ``(K, H)``.
        B, C: ``(B, L, K, G, N)``.
        D: ``(K, H)`` or ``(K, H, P)``, or None.
        z: ``(B, L, H, P)`` or None.
        dt_bias: ``(K, H)`` or None.
        route: ``(K, T)`` int32 token of each position, -1 for padding; None means the tokens in order.
        initial_state: ``(S, K, H, P, N)`` or None.
        cu_seqlens: ``(S + 1,)`` int32 bounds of packed sequences, or None.
        code: ``(B, K, T)`` int8 or None: 0 go on, 1 set the state to zero before this position, 2 skip it.
        padding: ``(B, L)`` bool or None: tokens that are skipped.
        dt_softplus: dt = softplus(dt + dt_bias) instead of dt + dt_bias.
        dt_limit: Then dt is clamped between these two.
        merge: Routes are summed, else kept.
        reverse: Positions are visited from the last to the first.
        plan: What implementations keep for the next problem of the same sizes.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    route: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    code: Tensor | None
    padding: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    merge: bool
    reverse: bool
    plan: Plan = field(default_factory=dict, repr=False, compare=False)

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def length(self) -> int:
        return self.x.shape[1]

    @property
    def routes(self) -> int:
        return self.A.shape[0]

    @property
    def heads(self) -> int:
        return self.A.shape[1]

    @property
    def head_dim(self) -> int:
        return self.x.shape[4]

    @property
    def groups(self) -> int:
        """Groups of heads that share B and C."""
        return self.B.shape[3]

    @property
    def state(self) -> int:
        return self.B.shape[4]

    @property
    def positions(self) -> int:
        return self.x.shape[1] if self.route is None else self.route.shape[1]

    @property
    def sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state, and of everything that is summed up."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def clamped(self) -> bool:
        """Whether the limits of dt can change it: softplus is not negative anyway."""
        low, high = self.dt_limit
        return low > (0.0 if self.dt_softplus else -math.inf) or high < math.inf


def make_problem(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    merge: str,
    reverse: bool,
    plan: Plan | None = None,
) -> Problem:
    """Checks the arguments of ``ssd`` and returns them in routed form (views).

    With the plan of an earlier problem of the same signature only values of indices are checked again.

    Raises:
        ValueError: With the tensor's name, what it is, what was wanted and how to fix it.
    """
    if not plan:
        _check(x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx, dt_min, dt_max, merge)
    else:
        check_values(x, route, cu_seqlens, seq_idx)

    def routes(t: Tensor, axis: int) -> Tensor:
        return t if route is not None else t.unsqueeze(axis)

    return Problem(
        x=x if x.ndim == 5 else x.unsqueeze(2),
        dt=routes(dt, 2),
        A=routes(A, 0),
        B=routes(B, 2),
        C=routes(C, 2),
        D=None if D is None else routes(D, 0),
        z=z,
        dt_bias=None if dt_bias is None else routes(dt_bias, 0),
        route=None if route is None else route.to(torch.int32),
        initial_state=None if initial_state is None else routes(initial_state, 1),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        code=None if seq_idx is None else restarts(seq_idx, route, reverse),
        padding=None if seq_idx is None else seq_idx < 0,
        dt_softplus=dt_softplus,
        dt_limit=(dt_min, dt_max),
        merge=merge == "sum",
        reverse=reverse,
        plan={} if plan is None else plan,
    )


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_min: float,
    dt_max: float,
    merge: str,
) -> None:
    """Raises unless the arguments fit each other."""
    if merge not in ("sum", "keep"):
        raise ValueError(f"merge: got {merge!r}, wanted 'sum' (add the routes) or 'keep' (return them one by one)")
    if not dt_min <= dt_max:
        raise ValueError(f"dt_limit: got ({dt_min}, {dt_max}), wanted (low, high) with low <= high; swap them")
    check_float(x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    _check_ranks(x, A, route)
    check_packing(x, route, cu_seqlens, seq_idx)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, route, sequences, initial_state)


def _check_ranks(x: Tensor, A: Tensor, route: Tensor | None) -> None:
    """Raises unless x and A have the dimensions that go with a route, or with none."""
    if route is None and x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, L, H, P); (B, L, K, H, P) needs a route (K, T)")
    if x.ndim not in (4, 5):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, L, H, P) or (B, L, K, H, P)")
    if A.ndim != (1 if route is None else 2):
        wanted = "(H,), one number per head" if route is None else "(K, H), one number per route and head"
        raise ValueError(f"A: got shape {tuple(A.shape)}, wanted {wanted}; a state matrix needs selective_scan")
    if route is not None:
        check_index("route", route, x.device)
        check_route(route, x.shape[1])


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    route: Tensor | None,
    sequences: int,
    initial_state: Tensor | None,
) -> None:
    """Raises unless every shape follows from x, B and the route."""
    batch, length, heads, width = *x.shape[:2], *x.shape[-2:]
    lead, k = ((), "") if route is None else ((route.shape[0],), "K, ")
    if x.ndim == 5:
        check_shape("x", x, (batch, length, *lead, heads, width), "(B, L, K, H, P)")
    check_shape("dt", dt, (batch, length, *lead, heads), f"(B, L, {k}H)")
    check_shape("A", A, (*lead, heads), f"({k}H)")
    check_shape("dt_bias", dt_bias, (*lead, heads), f"({k}H)")
    check_shape("z", z, (batch, length, heads, width), "(B, L, H, P)")
    groups, state = B.shape[-2:] if B.ndim > 1 else (1, 1)
    check_shape("B", B, (batch, length, *lead, groups, state), f"(B, L, {k}G, N)")
    check_shape("C", C, (batch, length, *lead, groups, state), f"(B, L, {k}G, N) as B")
    if groups < 1 or heads % groups:
        raise ValueError(f"B: got {groups} groups for {heads} heads, wanted a divisor of {heads}")
    if D is not None and D.ndim == len(lead) + 2:
        check_shape("D", D, (*lead, heads, width), f"({k}H, P) or ({k}H)")
    else:
        check_shape("D", D, (*lead, heads), f"({k}H) or ({k}H, P)")
    letters = f"(B or sequences, {k}H, P, N)"
    check_shape("initial_state", initial_state, (sequences, *lead, heads, width, state), letters)
