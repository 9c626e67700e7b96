"""Convolutions on the CPU called without an op's dispatch: their checks and the kernel's call take a few microseconds.

What the kernels of ``cpu_walk`` take, in eager mode and with nobody watching, goes from ``causal_conv1d`` straight to
them; the rest, and every misfit, goes through the op, whose checks say what is wrong. The op on the CPU runs the same
kernels.

B batch, L tokens, D channels, W conv width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d import cpu_walk
from kernels.causal_conv1d.cpu_walk import BIAS, PAIR, REVERSE, SILU, STATE, WEIGHT, X
from kernels.causal_conv1d.problem import Problem
from kernels.registration import TENSORS, unwatched
from kernels.threads import over

NARROW = {torch.float32: False, torch.bfloat16: True}  # dtypes that the kernels read and write
FORMS = {None: 0, "": 0, "silu": SILU}


def fits(t: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a kernel can read the memory of a tensor of this shape as it lies."""
    return t.dtype in NARROW and t.shape == shape and t.is_cpu and t.is_contiguous() and not t.is_neg()


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> bool:
    """Whether the kernels can run a convolution of ``x (B, L, D)``; arguments that don't fit each other they can't."""
    if x.ndim != 3 or weight.ndim != 2 or x.dtype not in NARROW or not x.is_cpu or x.is_neg():
        return False
    batch, _, channels = x.shape
    width = weight.shape[1]
    return (
        x.numel() > 0 and width > 0 and x.stride(2) == 1
        and fits(weight, (channels, width))
        and (bias is None or fits(bias, (channels,)))
        and (state is None or fits(state, (batch, width - 1, channels)))
    )  # fmt: skip


def find(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool, state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """y and, if asked for, the final state of a convolution in order; None where the call is one for the op."""
    form = FORMS.get(activation)
    if form is None or not TENSORS.issuperset(map(type, (x, weight, bias, state))) or not unwatched():
        return None
    if not takes(x, weight, bias, state):
        return None
    if reverse:
        form |= REVERSE
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias, state):
        found = _Convolution.apply(x, weight, bias, state, form, return_final_state)
        return found if return_final_state else (found, None)
    return forward(x, weight, bias, state, form, return_final_state)


def rows_of(p: Problem) -> tuple[Any, ...] | None:
    """x, weight, bias, state and form of a problem as ``forward`` takes them, None if the kernels can't run it."""
    if not p.in_order:
        return None
    x = p.x.squeeze(2).detach().resolve_neg()
    others = (p.weight[0], None if p.bias is None else p.bias[0], p.initial_state)
    weight, bias, state = (t if t is None else t.detach().resolve_neg().contiguous() for t in others)
    assert weight is not None
    x, state = x if x.stride(2) == 1 else x.contiguous(), None if state is None else state.squeeze(1)
    form = (SILU if p.silu else 0) | (REVERSE if p.reverse else 0)
    return (x, weight, bias, state, form) if takes(x, weight, bias, state) else None


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> int:
    """Bits of the tensors that are bfloat16."""
    narrow = X if x.dtype is torch.bfloat16 else 0
    if weight.dtype is torch.bfloat16:
        narrow |= WEIGHT
    if bias is not None and bias.dtype is torch.bfloat16:
        narrow |= BIAS
    return narrow | STATE if state is not None and state.dtype is torch.bfloat16 else narrow


def _sizes(length: int, channels: int, width: int, most: int) -> tuple[int, int, int, int, int]:
    """L, D, W, and blocks of channels of about the same size: lanes, and how many."""
    blocks = -(-channels // most)
    return length, channels, width, -(-channels // (blocks * PAIR)) * PAIR, blocks


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, form: int, return_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """y ``(B, L, D)`` in x's dtype and on request the final state ``(B, W - 1, D)``; the kernels ``take`` the tensors.

    Args:
        x: ``(B, L, D)``.
        weight: ``(D, W)``.
        bias: ``(D,)`` or None.
        state: ``(B, W - 1, D)`` or None.
        form: Bits of ``cpu_walk``.
        return_final_state: Whether to return it.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    y = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    sizes, steps = _sizes(length, channels, width, cpu_walk.CHANNELS), (x.stride(0), x.stride(1))
    narrow = _narrow(x, weight, bias, state)
    at, before = x.data_ptr(), _at(state) if width > 1 else 0
    arguments = (at, steps, weight.data_ptr(), _at(bias), before, y.data_ptr(), sizes, narrow, form)
    over(cpu_walk.forward, arguments, batch * sizes[4] * -(-length // cpu_walk.PLACES), 4 * x.numel())
    if not return_final_state:
        return y, None
    last = x.new_empty((batch, width - 1, channels))
    cpu_walk.last_rows(at, steps, before, last.data_ptr(), batch, sizes, narrow, form)
    return y, last


def backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, form: int,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias and state, in their dtypes.

    Args:
        dy: Gradient of y, dense.
        dlast: Gradient of the final state.
        x: As in ``forward``, like weight, bias, state and form.
        weight: See x.
        bias: See x.
        state: See x.
        form: See x.
        parameters: Whether weight and bias get gradients.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dstate = torch.empty_like(dy), None if state is None else torch.empty_like(state)
    sizes, jobs = _sizes(length, channels, width, cpu_walk.CHANNELS_BACK), batch * -(-length // cpu_walk.RUN)
    part = torch.empty(jobs * (width + 1) * channels, dtype=torch.float32)
    narrow, before = _narrow(x, weight, bias, state), width > 1
    arguments = (
        dy.data_ptr(), x.data_ptr(), (x.stride(0), x.stride(1)), weight.data_ptr(), _at(bias),
        _at(state) if before else 0, dx.data_ptr(), _at(dstate) if before else 0, part.data_ptr(), sizes, narrow, form,
    )  # fmt: skip
    over(cpu_walk.backward, arguments, jobs * sizes[4], 8 * x.numel())
    dweight = dbias = None
    if parameters:
        dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        given = (part.data_ptr(), jobs, channels, width, dweight.data_ptr(), narrow & WEIGHT, _at(dbias), narrow & BIAS)
        cpu_walk.finish(*given)
    if dlast is not None:
        _add_last(dlast, dx, dstate, form)
    return dx, dweight, dbias, dstate


def _add_last(dlast: Tensor, dx: Tensor, dstate: Tensor | None, form: int) -> None:
    """Adds the gradient of the final state to those of the inputs that it holds, in place."""
    past, length = dlast.shape[1], dx.shape[1]
    kept = min(past, length)
    late = dlast[:, past - kept :].to(dx.dtype)
    if form & REVERSE:
        dx[:, :kept] += late.flip(1)
    else:
        dx[:, length - kept :] += late
    if dstate is not None and kept < past:
        dstate[:, kept:] += dlast[:, : past - kept].to(dstate.dtype)


class _Convolution(torch.autograd.Function):
    """The convolution as autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, form: int, final: bool
    ) -> Any:
        y, last = forward(x, weight, bias, state, form, final)
        ctx.save_for_backward(x, weight, bias, state)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return (y, last) if final else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None and dlast is None:
            return (None,) * 6
        x, weight, bias, state = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if torch.is_grad_enabled() or not (
            TENSORS.issuperset(map(type, (dy, dlast, x, weight, bias, state))) and unwatched()
        ):
            found = _by_op(dy, dlast, x, weight, bias, state, ctx.form)
        else:
            wanted = ctx.needs_input_grad
            dy = dy.contiguous().resolve_neg()
            found = backward(dy, dlast, x, weight, bias, state, ctx.form, wanted[1] or wanted[2])
        return (*found, None, None)


def _by_op(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, form: int
) -> tuple[Tensor | None, ...]:
    """``backward`` through the op, which modes and transforms see; refuses a second derivative."""
    from kernels.causal_conv1d import _causal_conv1d_backward

    flags = ("silu" if form & SILU else "", bool(form & REVERSE), "cpu")
    tensors = (x, weight, bias, None, state, None, None)
    dx, dweight, dbias, dstate = _causal_conv1d_backward(dy, dlast, *tensors, *flags)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate
