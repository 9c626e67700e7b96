"""The sequence ops on parts of a sequence, one part a rank: what crosses a part's edge is exchanged, no more.

A scan's state h at the end of a part follows from the state before it by h' = a h + s, with the part's decay a =
exp(A sum(dt)) and the state s that the part leaves when it begins with zeros (Gu & Dao 2023, section 3.3.2: the scan is
associative). Ranks gather (s, sum(dt)), each works out the state before its part, and runs its part once with it. The
backward pass does the same with the adjoint state, from the other side. What a state forgets need not be looked at:
s takes the last tokens of the part only, as many as it takes for the slowest channel to decay below rounding (all of
them, if it does not), and likewise the gradient of the state before a part takes its first tokens only. As many as
took it at the last step are taken at once, so that the GPU need not wait for the host to read how many it takes; ranks
tell each other whether they were enough, and go over it again where they were not.

The functions have the arguments of the custom ops in ``torch.ops.triscan``, and are these where no group is active.

Legend: R ranks, B batch, L tokens of a part, D channels, H heads, P head dim, N state, W convolution width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels  # noqa: F401  registers torch.ops.triscan
from core.parallel.edge import Edge
from core.parallel.group import SequenceGroup, active, in_parts
from kernels.checks import autocast_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.triscan.causal_conv1d``; of a part (B, L, D), whose neighbour's last W - 1 inputs come before it.

    Raises:
        ValueError: For packed sequences, routes or states of a part, or one shorter than W - 1.
    """
    if in_parts():
        _refuse_options(route, cu_seqlens, seq_idx, return_final_state or initial_state is not None)
        initial_state = _inputs_before(x, weight.shape[-1] - 1, reverse)
    return torch.ops.triscan.causal_conv1d(
        x, weight, bias, route, initial_state, cu_seqlens, seq_idx, activation, reverse, return_final_state, backend
    )


def selective_scan(
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
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and the final state of ``torch.ops.triscan.selective_scan``; of a part, the initial state is the sequence's.

    Raises:
        ValueError: For packed sequences, routes or final states of a part.
    """
    if in_parts():
        _refuse_options(route, cu_seqlens, seq_idx, return_final_state)
        tensors = [x, dt, A, B, C, D, z, dt_bias, dt_weight, initial_state]
        return _selective_part(tensors, dt_softplus, reverse, backend)
    y, final, _ = torch.ops.triscan.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_weight, route, initial_state, cu_seqlens, seq_idx,
        dt_softplus, route_params, merge, reverse, return_final_state, backend,
    )  # fmt: skip
    return y, final


def ssd(
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
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.triscan.ssd``; of a part, the initial state is the sequence's.

    Raises:
        ValueError: For packed sequences, routes or final states of a part.
    """
    if in_parts():
        _refuse_options(route, cu_seqlens, seq_idx, return_final_state)
        tensors = [x, dt, A, B, C, D, z, dt_bias, initial_state]
        return _duality_part(tensors, dt_softplus, dt_min, dt_max, reverse, backend)
    return torch.ops.triscan.ssd(
        x, dt, A, B, C, D, z, dt_bias, route, initial_state, cu_seqlens, seq_idx,
        dt_softplus, dt_min, dt_max, merge, reverse, return_final_state, backend,
    )  # fmt: skip


@torch.jit.unused
def _inputs_before(x: Tensor, size: int, reverse: bool) -> Tensor | None:
    """The inputs (B, size, D) that the neighbour has before this part, in the order of the convolution."""
    if x.shape[1] < size:
        raise ValueError(
            f"x: got a part of {x.shape[1]} tokens, wanted at least {size} for a convolution of width {size + 1}; "
            "take fewer processes or longer sequences"
        )
    group = active()
    if not size or group is None:
        return None
    # A reverse convolution takes the tokens that follow, the farthest first.
    edge = x[:, :size].flip(1) if reverse else x[:, -size:]
    return group.neighbour(edge, following=reverse)


@torch.jit.unused
def _selective_part(tensors: list[Tensor | None], softplus: bool, reverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    """y, and no state."""
    y: Any = _Scan.apply(active(), _Selective(softplus, reverse, backend), *tensors)
    return y, y.new_empty(0)


@torch.jit.unused
def _duality_part(
    tensors: list[Tensor | None], softplus: bool, low: float, high: float, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """y, and no state."""
    y: Any = _Scan.apply(active(), _Duality(softplus, low, high, reverse, backend), *tensors)
    return y, y.new_empty(0)


@torch.jit.unused
def _refuse_options(route: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None, state: bool) -> None:
    for name, given in (("route", route), ("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx)):
        if given is not None:
            raise ValueError(f"{name}: got it for a part of a sequence, wanted None; give each process whole sequences")
    if state:
        raise ValueError("state: got a part of a sequence, wanted the whole one to go on from a state or to return it")


@dataclass(frozen=True)
class _Selective:
    """``selective_scan``: its arguments are x, dt, A, B, C, D, z, dt_bias, dt_weight, and the state apart."""

    softplus: bool
    reverse: bool
    backend: str

    along = (0, 1, 3, 4, 6)  # arguments with a length (B and C only where they vary)
    extras = (5, 6)  # arguments that the state does not depend on: D and z

    def run(self, t: Sequence[Any], state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y, the final state and what the backward needs."""
        flags = (self.softplus, True, "sum", self.reverse, keep, self.backend)
        return torch.ops.triscan.selective_scan(*t, None, state, None, None, *flags)

    def gradients(self, t: Sequence[Any], state: Tensor | None, dy: Tensor, dstate: Any, saved: Tensor) -> list[Tensor]:
        """Of the arguments and the state."""
        flags = (self.softplus, True, "sum", self.reverse, self.backend)
        return list(torch.ops.triscan.selective_scan_backward(dy, dstate, saved, *t, None, state, None, None, *flags))

    def steps(self, dt: Tensor, t: Sequence[Any]) -> Tensor:
        """The time steps of the tokens of ``dt``, (B, L, D)."""
        bias, weight = t[7:]
        dt = dt if weight is None else F.linear(dt, weight.to(dt.dtype))
        dt = dt if bias is None else dt + bias
        return F.softplus(dt) if self.softplus else dt

    def exponent(self, A: Tensor, steps: Tensor) -> Tensor:
        """The logarithm of the decay, (..., D, N), of sums of time steps (..., D)."""
        return A * steps[..., None]


@dataclass(frozen=True)
class _Duality:
    """``ssd``: its arguments are x, dt, A, B, C, D, z, dt_bias, and the state apart."""

    softplus: bool
    low: float
    high: float
    reverse: bool
    backend: str

    along = (0, 1, 3, 4, 6)
    extras = (5, 6)

    def run(self, t: Sequence[Any], state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y and the final state; the backward needs nothing else."""
        flags = (self.softplus, self.low, self.high, "sum", self.reverse, keep, self.backend)
        y, final = torch.ops.triscan.ssd(*t, None, state, None, None, *flags)
        return y, final, y.new_empty(0)

    def gradients(self, t: Sequence[Any], state: Tensor | None, dy: Tensor, dstate: Any, saved: Tensor) -> list[Tensor]:
        """Of the arguments and the state."""
        flags = (self.softplus, self.low, self.high, "sum", self.reverse, self.backend)
        return list(torch.ops.triscan.ssd_backward(dy, dstate, *t, None, state, None, None, *flags))

    def steps(self, dt: Tensor, t: Sequence[Any]) -> Tensor:
        """The time steps of the tokens of ``dt``, (B, L, H)."""
        bias = t[7]
        dt = dt if bias is None else dt + bias
        return (F.softplus(dt) if self.softplus else dt).clamp(self.low, self.high)

    def exponent(self, A: Tensor, steps: Tensor) -> Tensor:
        """The logarithm of the decay, (..., H, 1, 1), of sums of time steps (..., H)."""
        return (A * steps)[..., None, None]


class _Scan(torch.autograd.Function):
    """A scan over the parts; what crosses between ranks is spelt out in both passes."""

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, op: Any, *tensors: Any) -> Tensor:
        *inputs, initial = tensors
        first = group.rank == (group.size - 1 if op.reverse else 0)
        plain = [None if i in op.extras else t for i, t in enumerate(inputs)]  # z and D do not touch the state
        edge = Edge(group, op, plain, last=True)
        while True:
            _, left, _ = op.run(edge.cut(plain), initial if first and edge.whole else None, True)
            state = edge.carried(left)
            state = initial if first else state
            y, _, saved = op.run(inputs, state, False)
            if edge.sufficed():
                break
        ctx.group, ctx.op, ctx.first, ctx.state = group, op, first, (left.shape, left.dtype)
        ctx.autocast = autocast_dtype(y.device)
        ctx.save_for_backward(*inputs, initial, state, saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        group, op = ctx.group, ctx.op
        *inputs, initial, state, saved = ctx.saved_tensors
        with torch.autocast(dy.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            edge, start = Edge(group, op, inputs, last=False), dy.new_zeros(ctx.state[0], dtype=ctx.state[1])
            last = group.rank == (0 if op.reverse else group.size - 1)
            while True:
                part, (dedge,) = edge.cut(inputs), edge.cut([dy])
                kept = op.run(part, start, False)[2]
                dstate = edge.carried(op.gradients(part, start, dedge, None, kept)[-1])
                grads = op.gradients(inputs, state, dy, None if last else dstate, saved)
                if edge.sufficed():
                    break
        found: list[Tensor | None] = [
            None if t is None else grad for t, grad in zip(inputs, grads[: len(inputs)], strict=True)
        ]
        if initial is not None:  # every rank has it, and the first one uses it
            found.append(grads[-1] if ctx.first else torch.zeros_like(initial))
        else:
            found.append(None)
        return None, None, *found
