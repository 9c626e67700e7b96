"""The sequence ops on parts of a sequence, one part a rank: what crosses a part's edge is exchanged, no more.

A scan's state h at the end of a part follows from the state before it by h' = a h + s, with the part's decay a =
exp(A sum(dt)) and the state s that the part leaves when it begins with zeros (Gu & Dao 2023, section 3.3.2: the scan is
associative). Ranks gather (s, sum(dt)), each works out the state before its part, and runs its part once with it. The
backward pass does the same with the adjoint state, from the other side. What a state forgets need not be looked at:
s takes the last tokens of the part only, as many as it takes for the slowest channel to decay below rounding (all of
them, if it does not), and likewise the gradient of the state before a part takes its first tokens only.

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
from core.parallel.group import SequenceGroup, active, in_parts
from kernels.checks import autocast_dtype

CHUNK = 1 << 16  # tokens whose time steps exist at once
FORGOTTEN = {torch.float32: 21.0, torch.float64: 42.0}  # -log of a decay that is below rounding: 2^-30, 2^-60


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
        """The sum of the time steps over the tokens of ``dt``, (B, D)."""
        bias, weight = t[7:]
        dt = dt if weight is None else F.linear(dt, weight.to(dt.dtype))
        dt = dt if bias is None else dt + bias
        return (F.softplus(dt) if self.softplus else dt).sum(1)

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
        """The sum of the time steps over the tokens of ``dt``, (B, H)."""
        bias = t[7]
        dt = dt if bias is None else dt + bias
        return (F.softplus(dt) if self.softplus else dt).clamp(self.low, self.high).sum(1)

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
        size, steps = _memory(group, op, plain, last=True)
        edge = _cut(op, plain, size, last=True)
        _, left, _ = op.run(edge, initial if first and size == inputs[0].shape[1] else None, True)
        state = _carried(group, op, inputs[2], left, steps, forward=True)
        state = initial if first else state
        y, _, saved = op.run(inputs, state, False)
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
            size, steps = _memory(group, op, inputs, last=False)
            edge, (dedge,) = _cut(op, inputs, size, last=False), _cut(op, [dy], size, last=False)
            start = torch.zeros(ctx.state[0], dtype=ctx.state[1], device=dy.device)
            kept = op.run(edge, start, False)[2]
            entering = op.gradients(edge, start, dedge, None, kept)[-1]
            dstate = _carried(group, op, inputs[2], entering, steps, forward=False)
            last = group.rank == (0 if op.reverse else group.size - 1)
            grads = op.gradients(inputs, state, dy, None if last else dstate, saved)
        found: list[Tensor | None] = [
            None if t is None else grad for t, grad in zip(inputs, grads[: len(inputs)], strict=True)
        ]
        if initial is not None:  # every rank has it, and the first one uses it
            found.append(grads[-1] if ctx.first else torch.zeros_like(initial))
        else:
            found.append(None)
        return None, None, *found


def _place(length: int, begin: int, end: int, at_end: bool) -> slice:
    """Tokens ``begin`` to ``end``, counted from the sequence's end or from its start."""
    return slice(length - end, length - begin) if at_end else slice(begin, end)


def _cut(op: Any, inputs: Sequence[Any], size: int, last: bool) -> list[Any]:
    """The ``last`` (or first) ``size`` tokens, in the order of the scan, of what has a length."""
    part = _place(inputs[0].shape[1], 0, size, last != op.reverse)
    return [t[:, part] if i in op.along and t is not None and t.ndim > 2 else t for i, t in enumerate(inputs)]


def _memory(group: SequenceGroup, op: Any, inputs: Sequence[Any], last: bool) -> tuple[int, Tensor]:
    """How many of the ``last`` (or first) tokens count, and the sum of their time steps.

    They are as many as the slowest channel needs to forget, in the state's precision; all of them if it does not.
    """
    x, dt, A = inputs[:3]
    length, wide = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32

    def steps(begin: int, end: int) -> Tensor:
        """The sum over tokens ``begin`` to ``end``, counted from the edge."""
        total: Any = 0
        for place in range(begin, end, CHUNK):
            part = _place(length, place, min(end, place + CHUNK), last != op.reverse)
            total = total + op.steps(dt[:, part].to(wide), inputs)
        return total

    with torch.autocast(x.device.type, enabled=False):
        size = min(length, group.window)
        total = steps(0, size)
        while size < length and float(op.exponent(A, total).real.max()) > -FORGOTTEN[wide]:
            grown = min(length, 4 * size)
            total, size = total + steps(size, grown), grown
    return size, total


def _carried(group: SequenceGroup, op: Any, A: Tensor, part: Tensor, steps: Tensor, forward: bool) -> Tensor:
    """What comes in from the parts before this one (``forward``), or back from those after it: (B, ...).

    Args:
        group: The ranks.
        op: The scan.
        A: Its rates.
        part: The state that this part leaves alone, or the gradient of the state before it.
        steps: The sum of this part's time steps.
        forward: The direction, in the order of the scan.
    """
    wide = torch.view_as_real(part) if part.is_complex() else part
    message = torch.cat([wide.flatten(), steps.to(wide.dtype).flatten()])
    found = group.gather(message)
    parts = found[:, : wide.numel()].reshape(group.size, *wide.shape)
    parts = torch.view_as_complex(parts.contiguous()) if part.is_complex() else parts
    sums = found[:, wide.numel() :].reshape(group.size, *steps.shape)
    if forward != op.reverse:  # the parts that matter are those of lower ranks
        parts, sums = parts[: group.rank].flip(0), sums[: group.rank].flip(0)
    else:
        parts, sums = parts[group.rank + 1 :], sums[group.rank + 1 :]
    if not len(parts):
        return torch.zeros_like(part)
    # The steps that lie between each part and this one: the nearest comes first.
    between = torch.cat([torch.zeros_like(sums[:1]), sums[:-1].cumsum(0)])
    decay = op.exponent(A, between).exp()
    return ((decay if forward else decay.conj()) * parts).sum(0)
