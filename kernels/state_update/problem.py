"""The arguments of ``state_update``, checked and brought to one form that every implementation reads.

S6 and SSD are one recurrence over states ``(H, P, N)``: the heads of S6 are its groups of channels.

B batch, T tokens, H heads, P head dim, N state, G groups, D channels (S6), S rows of states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import check_float, check_rows, check_shape


@dataclass(frozen=True)
class Problem:
    """One call of ``state_update``; what does not vary along P or N has size 1 there.

    Attributes:
        state: ``(S, H, P, N)``, a view of what the caller gave.
        x: ``(B, T, H, P)``.
        dt: ``(B, T, H, P or 1)`` before bias, softplus and limits.
        A: ``(H, P or 1, N or 1)``.
        B, C: ``(B, T, G, N)``.
        D: ``(H, P or 1)`` or None.
        z: ``(B, T, H, P)`` or None.
        dt_bias: ``(H, P or 1)`` or None.
        indices: ``(B,)`` the row of ``state`` that belongs to each row of x, -1 for padding; None: row b.
        dt_softplus: dt = softplus(dt + dt_bias) instead of dt + dt_bias.
        dt_limit: Then dt is clamped between these two.
    """

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    indices: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]

    @property
    def heads(self) -> int:
        return self.x.shape[2]

    @property
    def groups(self) -> int:
        """Groups of heads that share B and C."""
        return self.B.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything in between; the state is rounded to its own at the end."""
        wide = torch.float64 in (self.x.dtype, self.state.dtype)
        return torch.float64 if wide else torch.float32

    @property
    def clamped(self) -> bool:
        """Whether the limits of dt can change it: softplus is not negative anyway."""
        low, high = self.dt_limit
        return low > (0.0 if self.dt_softplus else -math.inf) or high < math.inf


def make_problem(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Problem:
    """Checks the arguments of ``state_update`` and returns them in the form of ``Problem`` (views).

    Raises:
        ValueError: With the tensor's name, what it is, what was wanted and how to fix it.
    """
    if not dt_min <= dt_max:
        raise ValueError(f"dt_limit: got ({dt_min}, {dt_max}), wanted (low, high) with low <= high; swap them")
    check_float(x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if state.ndim not in (3, 4):
        raise ValueError(f"state: got shape {tuple(state.shape)}, wanted (S, D, N) for S6 or (S, H, P, N) for SSD")
    if x.ndim != state.ndim:
        letters = "(B, T, D)" if state.ndim == 3 else "(B, T, H, P)"
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, wanted {letters} with a state {tuple(state.shape)}; "
            "a single token has T = 1: x.unsqueeze(1)"
        )
    _check_shapes(state, x, dt, A, B, C, D, z, dt_bias)
    _check_rows(state, x, state_indices)
    if state.ndim == 3:  # S6: a group's channels are a head
        groups = B.shape[2]
        state, A = (t.unflatten(t.ndim - 2, (groups, -1)) for t in (state, A))
        x, dt = (t.unflatten(2, (groups, -1)) for t in (x, dt))
        z = None if z is None else z.unflatten(2, (groups, -1))
        D, dt_bias = (None if t is None else t.unflatten(0, (groups, -1)) for t in (D, dt_bias))
    else:
        dt = dt.unsqueeze(3) if dt.ndim == 3 else dt
        A = A[:, None, None] if A.ndim == 1 else A
        D, dt_bias = (t.unsqueeze(1) if t is not None and t.ndim == 1 else t for t in (D, dt_bias))
    return Problem(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, (dt_min, dt_max))


def _check_shapes(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Raises unless every shape follows from those of x and the state."""
    lead, inner, states = tuple(x.shape[:2]), tuple(x.shape[2:]), state.shape[-1]
    check_shape("state", state, (state.shape[0], *inner, states), "(S, D, N) or (S, H, P, N) as x")
    check_shape("z", z, tuple(x.shape), "the shape of x")
    if B.ndim != 4:
        raise ValueError(f"B: got shape {tuple(B.shape)}, wanted (B, T, G, N); one group has G = 1: B.unsqueeze(2)")
    check_shape("B", B, (*lead, B.shape[2], states), "(B, T, G, N)")
    check_shape("C", C, tuple(B.shape), "the shape of B")
    if B.shape[2] < 1 or inner[0] % B.shape[2]:
        of = "channels" if len(inner) == 1 else "heads"
        raise ValueError(f"B: got {B.shape[2]} groups for {inner[0]} {of}, wanted a divisor of {inner[0]}")
    if len(inner) == 1:
        check_shape("dt", dt, (*lead, *inner), "(B, T, D)")
        check_shape("A", A, (*inner, states), "(D, N)")
        check_shape("D", D, inner, "(D,)")
        check_shape("dt_bias", dt_bias, inner, "(D,)")
        return
    tied = inner[:1]
    check_shape("dt", dt, (*lead, *(tied if dt.ndim == 3 else inner)), "(B, T, H) or (B, T, H, P)")
    check_shape("A", A, tied if A.ndim == 1 else (*inner, states), "(H,) or (H, P, N)")
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        check_shape(name, t, tied if t is not None and t.ndim == 1 else inner, "(H,) or (H, P)")


def _check_rows(state: Tensor, x: Tensor, indices: Tensor | None) -> None:
    """Raises unless every row of x has a state. Indices are looked at on the CPU only: elsewhere that would wait."""
    if indices is None:
        if state.shape[0] != x.shape[0]:
            raise ValueError(
                f"state: got {state.shape[0]} rows for a batch of {x.shape[0]}, wanted as many; "
                "state_indices chooses rows of a larger pool"
            )
        return
    check_rows("state_indices", indices, x, state.shape[0])
