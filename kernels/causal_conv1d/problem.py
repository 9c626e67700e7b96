"""The arguments of a causal convolution, checked and brought to one form that every implementation reads.

B batch, L tokens, D channels, K routes, P scan positions, W conv width, S sequences (B unless packed).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.checks import check_float, check_index, check_packing, check_route, check_shape, check_values
from kernels.plans import Plan

ACTIVATIONS = ("", "silu")


@dataclass(frozen=True)
class Problem:
    """One causal convolution in routed form: K = 1 and P = L where no route was given.

    Attributes:
        x: ``(B, L, K or 1, D)``.
        weight: ``(K, D, W)``.
        bias: ``(K, D)`` or None.
        route: ``(K, P)`` token of each position, -1 for padding; None means the tokens in order.
        initial_state: ``(S, K, W - 1, D)``, oldest input first, or None.
        cu_seqlens: ``(S + 1,)`` bounds of packed sequences, or None.
        seq_idx: ``(B, L)`` sequence of each token, -1 for padding, or None.
        silu: SiLU follows.
        reverse: Positions are visited from the last to the first.
        plan: What implementations keep for the next problem of the same sizes.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    route: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    silu: bool
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
        return self.weight.shape[0]

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        return self.weight.shape[2]

    @property
    def positions(self) -> int:
        return self.x.shape[1] if self.route is None else self.route.shape[1]

    @property
    def in_order(self) -> bool:
        """Whether a row is one sequence whose tokens are visited from the first to the last, or backwards."""
        return self.route is None and self.cu_seqlens is None and self.seq_idx is None

    @property
    def sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the sums are formed."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Shape of the output as the caller sees it."""
        middle = () if self.route is None else (self.routes,)
        return (self.batch, self.length, *middle, self.channels)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a state as the caller sees it."""
        middle = () if self.route is None else (self.routes,)
        return (self.sequences, *middle, self.width - 1, self.channels)


def make_problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
    reverse: bool,
    plan: Plan | None = None,
) -> Problem:
    """Checks the arguments of ``causal_conv1d`` and returns them in routed form (views).

    With the plan of an earlier problem of the same signature only values of indices are checked again.

    Raises:
        ValueError: With the tensor's name, what it is, what was wanted and how to fix it.
    """
    routed = route is not None
    if not plan:
        _check(x, weight, bias, route, initial_state, cu_seqlens, seq_idx, activation)
    else:
        check_values(x, route, cu_seqlens, seq_idx)

    def routes(t: Tensor | None, axis: int) -> Tensor | None:
        return t if t is None or routed else t.unsqueeze(axis)

    return Problem(
        x=x if x.ndim == 4 else x.unsqueeze(2),
        weight=weight if routed else weight.unsqueeze(0),
        bias=routes(bias, 0),
        route=route,
        initial_state=routes(initial_state, 1),
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        silu=activation == "silu",
        reverse=reverse,
        plan={} if plan is None else plan,
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> None:
    """Raises unless shapes, dtypes and devices fit each other."""
    check_float(x, weight=weight, bias=bias, initial_state=initial_state)
    if route is not None:
        check_index("route", route, x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted None or 'silu'; apply another one to the output")
    routed = route is not None
    letters = "K, " if routed else ""
    if x.ndim != 3 and not (routed and x.ndim == 4):
        wanted = "(B, L, D) or (B, L, K, D)" if routed else "(B, L, D); (B, L, K, D) needs a route (K, P)"
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted {wanted}")
    if weight.ndim != 2 + routed or weight.shape[-1] < 1:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted ({letters}D, W) with W >= 1")
    batch, length, channels, width = x.shape[0], x.shape[1], x.shape[-1], weight.shape[-1]
    if routed:
        check_route(route, length)
    lead = (route.shape[0],) if routed else ()
    if x.ndim == 4:
        check_shape("x", x, (batch, length, *lead, channels), "(B, L, K, D)")
    check_shape("weight", weight, (*lead, channels, width), f"({letters}D, W)")
    check_shape("bias", bias, (*lead, channels), f"({letters}D)")
    check_packing(x, route, cu_seqlens, seq_idx)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = "B" if cu_seqlens is None else "S"
    check_shape("initial_state", initial_state, (sequences, *lead, width - 1, channels), f"({rows}, {letters}W - 1, D)")
