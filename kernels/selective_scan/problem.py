"""The arguments of a selective scan, checked and brought to one form that every implementation reads.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, R dt rank, S sequences (B unless packed).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import (
    autocast_dtype,
    check_float,
    check_index,
    check_packing,
    check_route,
    check_shape,
    check_values,
)
from kernels.plans import Plan

CHUNK = 64  # positions between two saved states: 4 N / CHUNK bytes a channel and position


@dataclass(frozen=True)
class Problem:
    """One selective scan in routed form: K = 1 and P = L where no route was given.

    Attributes:
        x: ``(B, L, K or 1, D)``.
        dt: ``(B, L, K, D)`` before bias and softplus; low-rank dt is already projected.
        A: ``(K, D, N)``, real or complex.
        B, C: ``(B, L, K, G, N)``, or constant ``(K, D, N)``.
        D, dt_bias: ``(K, D)`` or None.
        z: ``(B, L, D)`` or None.
        route: ``(K, P)`` int32 token of each position, -1 for padding; None means the tokens in order.
        initial_state: ``(S, K, D, N)`` or None.
        cu_seqlens: ``(S + 1,)`` int32 bounds of packed sequences, or None.
        code: ``(B, K, P)`` int8 or None: 0 go on, 1 set the state to zero before this position, 2 skip it.
        dt_softplus: dt = softplus(dt + dt_bias) instead of dt + dt_bias.
        route_params: dt, B and C are read at the token, not at the scan position.
        merge: Routes are summed, else kept.
        reverse: Positions are visited from the last to the first.
        seq_idx: ``(B, L)`` or None: negative at tokens that are skipped.
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
    dt_softplus: bool
    route_params: bool
    merge: bool
    reverse: bool
    seq_idx: Tensor | None = None
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
    def channels(self) -> int:
        return self.A.shape[1]

    @property
    def state(self) -> int:
        return self.A.shape[2]

    @property
    def positions(self) -> int:
        return self.x.shape[1] if self.route is None else self.route.shape[1]

    @property
    def groups(self) -> int:
        """Groups of channels that share B and C: of whichever of the two is not constant."""
        return next((t.shape[3] for t in (self.B, self.C) if t.ndim == 5), 1)

    @property
    def sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def is_complex(self) -> bool:
        return self.A.is_complex()

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype in which the scan computes."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of the state: ``dtype``, or its complex counterpart."""
        if not self.is_complex:
            return self.dtype
        return torch.complex128 if self.dtype == torch.float64 else torch.complex64  # to_complex() doesn't compile

    @property
    def chunks(self) -> int:
        """Chunks of CHUNK positions that a row takes."""
        return -(-self.positions // CHUNK)

    @property
    def per_row(self) -> int:
        """Slots of saved states that a row has: of packed sequences, all of them."""
        return self.chunks if self.cu_seqlens is None else self.slots

    @property
    def slots(self) -> int:
        """Number of saved states: one per CHUNK positions of a sequence."""
        return self.batch * self.chunks if self.cu_seqlens is None else self.chunks + self.sequences


def make_problem(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    route_params: bool,
    merge: str,
    reverse: bool,
    plan: Plan | None = None,
) -> Problem:
    """Checks the arguments of ``selective_scan`` and returns them in routed form (views where possible).

    With the plan of an earlier problem of the same signature only values of indices are checked again.

    Raises:
        ValueError: With the tensor's name, what it is, what was wanted and how to fix it.
    """
    if not plan:
        _check(x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx, route_params, merge)
    else:
        check_values(x, route, cu_seqlens, seq_idx)
    routed = route is not None

    def routes(t: Tensor, axis: int) -> Tensor:
        return t if routed else t.unsqueeze(axis)

    return Problem(
        x=x if x.ndim == 4 else x.unsqueeze(2),
        dt=routes(dt if dt_weight is None else project(low_rank(dt, seq_idx, route, route_params), dt_weight), 2),
        A=routes(A, 0),
        B=routes(B, 0 if B.ndim == A.ndim else 2),
        C=routes(C, 0 if C.ndim == A.ndim else 2),
        D=None if D is None else routes(D, 0),
        z=z,
        dt_bias=None if dt_bias is None else routes(dt_bias, 0),
        route=None if route is None else route.to(torch.int32),
        initial_state=None if initial_state is None else routes(initial_state, 1),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        code=None if seq_idx is None else restarts(seq_idx, route, reverse),
        seq_idx=seq_idx,
        dt_softplus=dt_softplus,
        route_params=route_params,
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
    dt_weight: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    route_params: bool,
    merge: str,
) -> None:
    """Raises unless the arguments fit each other."""
    if merge not in ("sum", "keep"):
        raise ValueError(f"merge: got {merge!r}, wanted 'sum' (add the routes) or 'keep' (return them one by one)")
    real = {"dt": dt, "D": D, "z": z, "dt_bias": dt_bias, "dt_weight": dt_weight}
    check_float(x, **real)
    _check_state_kinds(x.device, A, B=B, C=C, initial_state=initial_state)
    _check_ranks(x, A, route, route_params)
    check_packing(x, route, cu_seqlens, seq_idx)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_shapes(x, A, B, C, route, sequences, initial_state, **real)


def _check_state_kinds(device: torch.device, A: Tensor, **others: Tensor | None) -> None:
    """Raises unless the others are complex where A is, real where A is, and all are on ``device``."""
    for name, t in {"A": A, **others}.items():
        if t is None:
            continue
        if t.is_complex() != A.is_complex() or not (t.is_complex() or t.is_floating_point()):
            wanted = "complex" if A.is_complex() else "real floating-point"
            raise ValueError(f"{name}: got dtype {t.dtype}, wanted a {wanted} one, as A is {A.dtype}")
        if t.device != device:
            raise ValueError(f"{name}: got device {t.device}, wanted {device} as x; move it with .to(x.device)")


def _check_ranks(x: Tensor, A: Tensor, route: Tensor | None, route_params: bool) -> None:
    """Raises unless x and A have the dimensions that go with a route, or with none."""
    if route is None and x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, L, D); (B, L, K, D) needs a route (K, P)")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, L, D) or (B, L, K, D)")
    if A.ndim != (2 if route is None else 3):
        wanted = "(D, N); (K, D, N) needs a route (K, P)" if route is None else "(K, D, N), one matrix per route"
        raise ValueError(f"A: got shape {tuple(A.shape)}, wanted {wanted}")
    if route is None:
        return
    check_index("route", route, x.device)
    check_route(route, x.shape[1])
    if not route_params and route.shape[1] > x.shape[1]:
        raise ValueError(
            f"route: got {route.shape[1]} positions, wanted at most L = {x.shape[1]} with route_params=False, "
            "which reads dt, B and C at the scan position"
        )


def _check_shapes(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    route: Tensor | None,
    sequences: int,
    initial_state: Tensor | None,
    dt: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
) -> None:
    """Raises unless every shape follows from x, A and the route."""
    batch, length, channels, state = *x.shape[:2], x.shape[-1], A.shape[-1]
    lead, k = ((), "") if route is None else ((route.shape[0],), "K, ")
    if x.ndim == 4:
        check_shape("x", x, (batch, length, *lead, channels), "(B, L, K, D)")
    check_shape("A", A, (*lead, channels, state), f"({k}D, N)")
    rank = channels if dt_weight is None else dt_weight.shape[-1]
    check_shape("dt", dt, (batch, length, *lead, rank), f"(B, L, {k}{'D' if dt_weight is None else 'R'})")
    check_shape("dt_weight", dt_weight, (*lead, channels, rank), f"({k}D, R)")
    check_shape("D", D, (*lead, channels), f"({k}D)")
    check_shape("dt_bias", dt_bias, (*lead, channels), f"({k}D)")
    check_shape("z", z, (batch, length, channels), "(B, L, D)")
    check_shape("initial_state", initial_state, (sequences, *lead, channels, state), f"(B or sequences, {k}D, N)")
    for name, t in (("B", B), ("C", C)):
        if t.ndim == A.ndim:
            check_shape(name, t, tuple(A.shape), f"constant ({k}D, N)")
            continue
        groups = t.shape[-2] if t.ndim > 1 else 1
        letters = f"(B, L, {k}G, N) or constant ({k}D, N)"
        check_shape(name, t, (batch, length, *lead, groups, state), letters)
        if groups < 1 or channels % groups:
            raise ValueError(f"{name}: got {groups} groups for {channels} channels, wanted a divisor of {channels}")
    if B.ndim == C.ndim and B.shape[-2] != C.shape[-2]:
        raise ValueError(f"C: got {C.shape[-2]} groups, wanted {B.shape[-2]} as in B")


def project(dt: Tensor, dt_weight: Tensor) -> Tensor:
    """Low-rank dt ``(B, L, [K,] R)`` to ``(B, L, [K,] D)``, in float32 (float64 for float64) or autocast's dtype."""
    if _narrow(dt, dt_weight):
        weight = dt_weight if dt_weight.ndim == 2 else dt_weight.squeeze(0)
        flat = torch.mm(dt.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return flat.unflatten(0, dt.shape[:-1])
    if dt.dtype == torch.float64 or autocast_dtype(dt.device) is None:
        dtype = torch.float64 if dt.dtype == torch.float64 else torch.float32
        dt, dt_weight = dt.to(dtype), dt_weight.to(dtype)
    if dt.ndim == 3:
        return F.linear(dt, dt_weight)
    if dt_weight.shape[0] == 1:
        return F.linear(dt.squeeze(2), dt_weight.squeeze(0)).unsqueeze(2)
    return torch.einsum("blkr,kdr->blkd", dt, dt_weight)


def low_rank(dt: Tensor, seq_idx: Tensor | None, route: Tensor | None, route_params: bool) -> Tensor:
    """A low-rank dt with zeros where a token is skipped: what stands there must not reach the weight's gradient."""
    if seq_idx is None:
        return dt
    skip = seq_idx < 0
    if route is not None and not route_params:  # a row of dt goes with the token at its scan position
        skip = skip[:, route.long().clamp(min=0)] | (route < 0)
        skip = F.pad(skip, (0, dt.shape[1] - route.shape[1]), value=True).transpose(1, 2)
    return torch.where(skip.reshape(*skip.shape, *[1] * (dt.ndim - skip.ndim)), 0, dt)


def restarts(seq_idx: Tensor, route: Tensor | None, reverse: bool) -> Tensor:
    """``Problem.code``: what the sequence numbers mean at each scan position, in scan direction.

    A position restarts the state when its sequence differs from that of the last real token before it. Padding slots
    of a route belong to no token: they go on (the state decays there).
    """
    if route is not None and not seq_idx.shape[1]:  # padding slots alone: there is no token to look at
        return seq_idx.new_zeros((seq_idx.shape[0], *route.shape), dtype=torch.int8)
    index = seq_idx.unsqueeze(1) if route is None else seq_idx[:, route.long().clamp(min=0)]  # (B, K, P)
    if reverse:
        index = index.flip(-1)
    skip = index < 0
    slot = torch.zeros_like(skip)
    if route is not None:
        slot = ((route.flip(-1) if reverse else route) < 0).expand_as(skip)
        skip = skip & ~slot
    real = ~(skip | slot)
    place = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    last = torch.where(real, place, -1).cummax(-1).values  # the last real token up to here
    before = torch.cat([torch.full_like(last[..., :1], -1), last[..., :-1]], -1)
    previous = torch.gather(index, -1, before.clamp(min=0))
    restart = real & (before >= 0) & (previous != index)
    code = restart.to(torch.int8) + 2 * skip.to(torch.int8)
    return code.flip(-1) if reverse else code


def _narrow(dt: Tensor, dt_weight: Tensor) -> bool:
    """Whether tensor cores can multiply 16-bit numbers to float32: it is the float32 product, but has no derivative."""
    one = dt_weight.ndim == 2 or dt_weight.shape[0] == 1
    same = dt.dtype == dt_weight.dtype and dt.dtype in (torch.bfloat16, torch.float16)
    return one and same and dt.is_cuda and not torch.is_grad_enabled() and autocast_dtype(dt.device) is None
