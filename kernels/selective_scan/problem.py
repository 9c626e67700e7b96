"""The arguments of a selective scan, checked and brought to one form that every implementation reads.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, R dt rank, S sequences (B unless packed).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        return self.dtype.to_complex() if self.is_complex else self.dtype

    @property
    def slots(self) -> int:
        """Number of saved states: sequence s starts at slot ``slot(s)`` and takes one per CHUNK positions."""
        chunks = -(-self.positions // CHUNK)
        return self.batch * chunks if self.cu_seqlens is None else chunks + self.sequences


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
) -> Problem:
    """Checks the arguments of ``selective_scan`` and returns them in routed form (views where possible).

    Raises:
        ValueError: With the tensor's name, what it is, what was wanted and how to fix it.
    """
    _check_kinds(x, dt, A, B, C, D, z, dt_bias, dt_weight, initial_state)
    if merge not in ("sum", "keep"):
        raise ValueError(f"merge: got {merge!r}, wanted 'sum' (add the routes) or 'keep' (return them one by one)")
    routed = route is not None
    if not routed and x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, L, D); (B, L, K, D) needs a route (K, P)")
    if routed and route.ndim != 2:
        raise ValueError(f"route: got shape {tuple(route.shape)}, wanted (K, P): one row of token indices per route")
    if A.ndim != 2 + routed:
        raise ValueError(f"A: got shape {tuple(A.shape)}, wanted {'(K, D, N) with a route' if routed else '(D, N)'}")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, L, D) or (B, L, K, D)")
    batch, length, channels, state = x.shape[0], x.shape[1], x.shape[-1], A.shape[-1]
    lead = (route.shape[0],) if routed else ()
    names = "K, " if routed else ""
    if x.ndim == 4:
        _shape("x", x, (batch, length, *lead, channels), "(B, L, K, D)")
    _shape("A", A, (*lead, channels, state), f"({names}D, N)")
    rank = channels if dt_weight is None else dt_weight.shape[-1]
    _shape("dt", dt, (batch, length, *lead, rank), f"(B, L, {names}{'D' if dt_weight is None else 'R'})")
    _shape("dt_weight", dt_weight, (*lead, channels, rank), f"({names}D, R)")
    _shape("D", D, (*lead, channels), f"({names}D)")
    _shape("dt_bias", dt_bias, (*lead, channels), f"({names}D)")
    _shape("z", z, (batch, length, channels), "(B, L, D)")
    for name, t in (("B", B), ("C", C)):
        if t.ndim == len(lead) + 2:
            _shape(name, t, (*lead, channels, state), f"({names}D, N)")
        else:
            groups = t.shape[-2] if t.ndim > 1 else 1
            _shape(name, t, (batch, length, *lead, groups, state), f"(B, L, {names}G, N) or constant ({names}D, N)")
            if channels % groups:
                raise ValueError(f"{name}: got {groups} groups for {channels} channels, wanted a divisor of {channels}")
    if B.ndim == C.ndim and B.shape[-2] != C.shape[-2]:
        raise ValueError(f"C: got {C.shape[-2]} groups, wanted {B.shape[-2]} as in B")
    _check_route(route, length, route_params)
    _check_packing(batch, length, route, cu_seqlens, seq_idx)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _shape("initial_state", initial_state, (sequences, *lead, channels, state), f"(B or sequences, {names}D, N)")

    def routes(t: Tensor | None, axis: int) -> Tensor | None:
        return t if t is None or routed else t.unsqueeze(axis)

    return Problem(
        x=x if x.ndim == 4 else x.unsqueeze(2),
        dt=_project(routes(dt, 2), routes(dt_weight, 0)),
        A=routes(A, 0),
        B=routes(B, 0 if B.ndim == len(lead) + 2 else 2),
        C=routes(C, 0 if C.ndim == len(lead) + 2 else 2),
        D=routes(D, 0),
        z=z,
        dt_bias=routes(dt_bias, 0),
        route=None if route is None else route.to(torch.int32),
        initial_state=routes(initial_state, 1),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        code=None if seq_idx is None else _code(seq_idx, route, reverse),
        dt_softplus=dt_softplus,
        route_params=route_params,
        merge=merge == "sum",
        reverse=reverse,
    )


def _check_kinds(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *real: Tensor | None) -> None:
    """Dtypes and devices."""
    state = real[-1]
    for name, t in zip(("x", "dt", "D", "z", "dt_bias", "dt_weight"), (x, dt, *real[:-1]), strict=True):
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name}: got dtype {t.dtype}, wanted a real floating-point dtype")
    for name, t in (("B", B), ("C", C), ("initial_state", state)):
        if t is not None and t.is_complex() != A.is_complex():
            wanted = "complex" if A.is_complex() else "real"
            raise ValueError(f"{name}: got dtype {t.dtype}, wanted a {wanted} one because A is {A.dtype}")
    for name, t in zip(("dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "initial_state"), (dt, A, B, C, *real), strict=True):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, wanted {x.device} as x; move it with .to(x.device)")


def _shape(name: str, t: Tensor | None, wanted: tuple[int, ...], letters: str) -> None:
    """Raises unless ``t`` is None or has the wanted shape."""
    if t is not None and tuple(t.shape) != wanted:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {letters} = {wanted}")


def _is_concrete(t: Tensor) -> bool:
    """Whether the values can be read without waiting for a device: a real CPU tensor, not one being traced."""
    return t.device.type == "cpu" and type(t) is Tensor and not torch.compiler.is_compiling()


def _check_route(route: Tensor | None, length: int, route_params: bool) -> None:
    if route is None:
        return
    if route.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"route: got dtype {route.dtype}, wanted int32 or int64")
    if not route_params and route.shape[1] > length:
        raise ValueError(f"route: got {route.shape[1]} positions, wanted at most L = {length} with route_params=False")
    if _is_concrete(route) and route.numel():
        low, high = int(route.min()), int(route.max())
        if low < -1 or high >= length:
            raise ValueError(f"route: got values in [{low}, {high}], wanted tokens in [0, {length}) or -1 for padding")
        visits = torch.zeros(route.shape[0], length + 1, dtype=torch.int32)
        visits.scatter_add_(1, route.long() % (length + 1), torch.ones_like(route, dtype=torch.int32))  # -1 -> last
        if (visits[:, :length] > 1).any():
            raise ValueError("route: a token is visited twice by one route, wanted at most once; split it in two routes")


def _check_packing(
    batch: int, length: int, route: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> None:
    if seq_idx is not None:
        _shape("seq_idx", seq_idx, (batch, length), "(B, L)")
        if cu_seqlens is not None:
            raise ValueError("seq_idx and cu_seqlens: got both, wanted one; both say where packed sequences start")
    if cu_seqlens is None:
        return
    if route is not None:
        raise ValueError("cu_seqlens: got it together with a route, wanted seq_idx; routes index the tokens of a row")
    if batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} for x with B = {batch}, wanted (S + 1,) and B = 1 (sequences end to end)"
        )
    if _is_concrete(cu_seqlens):
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or (steps < 0).any():
            raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()[:8]}..., wanted ascending bounds from 0 to L = {length}")


def _project(dt: Tensor, dt_weight: Tensor | None) -> Tensor:
    """Low-rank dt ``(B, L, K, R)`` to ``(B, L, K, D)``, in float32 (float64 for float64)."""
    if dt_weight is None:
        return dt
    dtype = torch.float64 if dt.dtype == torch.float64 else torch.float32
    return torch.einsum("blkr,kdr->blkd", dt.to(dtype), dt_weight.to(dtype))


def _code(seq_idx: Tensor, route: Tensor | None, reverse: bool) -> Tensor:
    """``Problem.code``: what the sequence numbers mean at each scan position, in scan direction.

    A position restarts the state when its sequence differs from that of the last real token before it. Padding slots
    of a route belong to no token: they go on (the state decays there).
    """
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
