"""The causal convolution on GPUs where tokens are visited in order, forwards or backwards: at the speed of memory.

The formulas are those of ``triton.py``, which takes routes, packed sequences and wide kernels. Here a thread walks a
run of tokens for a few neighbouring channels with the last W - 1 inputs in registers, so that every value is read once;
the backward also keeps the last W - 1 gradients g of the sums:

    dx_p = sum_w weight_w g_{p + W - 1 - w},   dweight_w = sum_p x_p g_{p + W - 1 - w},   dbias = sum_p g_p

so that one pass over x and dy gives all three. Places p count from the first token visited. A program's part of dweight
and dbias is written out; a second kernel sums the parts in a fixed order.

B batch, L tokens, D channels, W conv width.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# ruff: noqa: RUF005
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing; Triton knows no
# starred expressions.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.causal_conv1d.problem import Problem
from kernels.causal_conv1d.triton_shape import shape_of
from kernels.causal_conv1d.triton_steps import (
    offset_of,
    parameters,
    past_of,
    rows_of,
    sigmoid,
    slope_of,
    tile,
    weighted_sum,
)
from kernels.plans import Plan, launch, on_device

COLUMNS = 8  # of a program that sums the parts: few, so that all of the GPU takes part
MAX_WIDTH = 16  # beyond, the inputs and gradients that a thread keeps no longer fit its registers


@triton.jit(do_not_specialize=["runs", "steps"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, L, D, sx_b, sx_l, runs, steps,
    W: tl.constexpr, R: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """R runs of ``steps`` times U places by BD channels."""
    b, _, q, d, m_d = tile(L, D, runs, steps, R, U, BD)
    offset, x_step = offset_of(b, q, L, sx_b, sx_l, REVERSE)
    x_ptr += offset + d
    past = past_of(x_ptr, state_ptr, x_step, b, q, L, D, d, m_d, W, HAS_STATE, ACC)
    taps, bias = parameters(weight_ptr, bias_ptr, d, m_d, W, BD, HAS_BIAS, ACC)
    offset, y_step = offset_of(b, q, L, tl.cast(L, tl.int64) * D, D, REVERSE)
    y_ptr += offset + d
    for _ in range(steps):
        rows = rows_of(x_ptr, x_step, q, L, m_d, U)
        x_ptr += U * x_step
        for u in tl.static_range(U):
            past = past + (rows[u].to(ACC),)
            s = weighted_sum(taps, bias, past, W)
            if SILU:
                s = s * sigmoid(s)
            tl.store(y_ptr + u * y_step, s, mask=(q + u < L) & m_d)
            past = past[1:]
        y_ptr += U * y_step
        q += U


@triton.jit(do_not_specialize=["runs", "steps"])
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, dx_ptr, part_ptr, head_ptr,
    L, D, sx_b, sx_l, sy_b, sy_l, runs, steps,
    W: tl.constexpr, R: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx of R runs by BD channels, their part of dweight and dbias (W + 1, D), and g where the state is read."""
    b, part, q, d, m_d = tile(L, D, runs, steps, R, U, BD)
    offset, x_step = offset_of(b, q, L, sx_b, sx_l, REVERSE)
    x_ptr += offset + d
    offset, y_step = offset_of(b, q, L, sy_b, sy_l, REVERSE)
    dy_ptr += offset + d
    past = past_of(x_ptr, state_ptr, x_step, b, q, L, D, d, m_d, W, HAS_STATE, ACC)
    first_x = rows_of(x_ptr, x_step, q, L, m_d, W - 1)
    first_dy = rows_of(dy_ptr, y_step, q, L, m_d, W - 1)
    x_ptr += (W - 1) * x_step
    dy_ptr += (W - 1) * y_step
    ahead_x = rows_of(x_ptr, x_step, q + (W - 1), L, m_d, U)
    ahead_dy = rows_of(dy_ptr, y_step, q + (W - 1), L, m_d, U)
    taps, bias = parameters(weight_ptr, bias_ptr, d, m_d, W, BD, HAS_BIAS, ACC)
    offset, dx_step = offset_of(b, q, L, tl.cast(L, tl.int64) * D, D, REVERSE)
    dx_ptr += offset + d
    dbias = tl.zeros((R, BD), dtype=ACC)
    dtaps = ()
    for _ in tl.static_range(W):
        dtaps = dtaps + (dbias,)
    slopes = ()
    for u in tl.static_range(W - 1):  # dx of a place needs g of the W - 1 next ones
        past = past + (first_x[u].to(ACC),)
        g = slope_of(first_dy[u].to(ACC), taps, bias, past, W, SILU)
        if HAS_STATE:
            tl.store(head_ptr + (b * (W - 1) + q + u) * D + d, g, mask=(q == 0) & (u < L) & m_d)
            summed = ()
            for w in tl.static_range(W):
                if u + w < W - 1:  # this tap reads the state
                    summed = summed + (dtaps[w] + tl.where(q == 0, g * past[w], 0.0),)
                else:
                    summed = summed + (dtaps[w],)
            dtaps = summed
        slopes = slopes + (g,)
        past = past[1:]
    for _ in range(steps):
        rows_x, rows_dy = ahead_x, ahead_dy
        x_ptr += U * x_step
        dy_ptr += U * y_step
        ahead_x = rows_of(x_ptr, x_step, q + (W - 1 + U), L, m_d, U)
        ahead_dy = rows_of(dy_ptr, y_step, q + (W - 1 + U), L, m_d, U)
        for u in tl.static_range(U):
            past = past + (rows_x[u].to(ACC),)
            slopes = slopes + (slope_of(rows_dy[u].to(ACC), taps, bias, past, W, SILU),)
            dx = taps[0] * slopes[W - 1]
            summed = (dtaps[0] + past[0] * slopes[W - 1],)
            for w in tl.static_range(1, W):
                dx += taps[w] * slopes[W - 1 - w]
                summed = summed + (dtaps[w] + past[0] * slopes[W - 1 - w],)
            dtaps = summed
            dbias += slopes[0]
            tl.store(dx_ptr + u * dx_step, dx, mask=(q + u < L) & m_d)
            past = past[1:]
            slopes = slopes[1:]
        dx_ptr += U * dx_step
        q += U
    part_ptr += part * (W + 1) * D + d
    for w in tl.static_range(W):
        tl.store(part_ptr + w * D, tl.sum(dtaps[w], 0)[None, :], mask=m_d)
    tl.store(part_ptr + W * D, tl.sum(dbias, 0)[None, :], mask=m_d)


@triton.jit(do_not_specialize=["parts"])
def _parameter_kernel(
    part_ptr, dweight_ptr, dbias_ptr, parts, D,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums the parts (parts, W + 1, D) into dweight (D, W) and dbias (D,)."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = c < (W + 1) * D
    acc = tl.zeros((ROWS, COLUMNS), dtype=part_ptr.dtype.element_ty)
    for i in range(tl.cdiv(parts, ROWS)):
        row = i * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * ((W + 1) * D) + c[None, :]
        acc += tl.load(part_ptr + at, mask=(row < parts)[:, None] & m_c[None, :], other=0.0)
    total = tl.sum(acc, 0)
    d = c % D
    tl.store(dweight_ptr + d * W + c // D, total, mask=c < W * D)
    if HAS_BIAS:
        tl.store(dbias_ptr + d, total, mask=m_c & (c >= W * D))


def takes(p: Problem) -> bool:
    """Whether these kernels can run the problem."""
    return p.in_order and p.width <= MAX_WIDTH and p.x.numel() > 0


def is_plain(p: Problem) -> bool:
    """Whether ``plain_forward`` and ``plain_backward`` can run the next problem of this signature."""
    dense = all(t is None or t.is_contiguous() for t in (p.weight, p.bias))
    return takes(p) and dense and p.initial_state is None and p.x.stride(3) == 1


def plain_forward(plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``forward`` with as little work for the host as there can be: no state, the tensors as the caller has them.

    Args:
        plan: Of an earlier call of ``forward`` with this signature, whose problem ``is_plain``.
        x: ``(B, L, D)``.
        weight: ``(D, W)``.
        bias: ``(D,)`` or None.

    Returns:
        y ``(B, L, D)`` in x's dtype.
    """
    cut, (batch, length, channels) = plan["cut"], x.shape
    y = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    given = (x, weight, x if bias is None else bias, x, y)
    with on_device(x):
        arguments = (*given, length, channels, x.stride(0), x.stride(1), *cut.runs)
        launch(plan, _forward_kernel, cut.blocks * batch, arguments, cut.constants)
    return y


def plain_backward(
    plan: Plan, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``backward`` in the same way: the gradients of x, weight and bias, shaped as these.

    Args:
        plan: Of an earlier call of ``backward``.
        dy: ``(B, L, D)``, its channels next to each other.
        x: See ``plain_forward``.
        weight: See ``plain_forward``.
        bias: See ``plain_forward``.
    """
    cut, (batch, length, channels), width = plan["cut"], x.shape, weight.shape[1]
    parts = cut.runs[0] * batch
    dx = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    part = weight.new_empty((parts, width + 1, channels), dtype=wide)
    dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    given = (dy, x, weight, x if bias is None else bias, x, dx, part, part)
    steps = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1))
    sums = (part, dweight, part if dbias is None else dbias, parts, channels)
    with on_device(x):
        launch(plan, _backward_kernel, cut.blocks * batch, (*given, length, channels, *steps, *cut.runs), cut.constants)
        launch(plan, _parameter_kernel, -(-(width + 1) * channels // COLUMNS), sums, cut.summed)
    return dx, dweight, dbias


def forward(p: Problem) -> Tensor:
    """y ``(B, L, 1, D)`` in x's dtype."""
    x = _dense(p.x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cut = _cut(p, backward=False)
    state = p.initial_state if p.width > 1 else None
    given = _given(x, p.bias, state)
    arguments = (x, p.weight.contiguous(), *given, y, p.length, p.channels, x.stride(0), x.stride(1), *cut.runs)
    with on_device(x):
        launch(p.plan, _forward_kernel, cut.blocks * p.batch, arguments, cut.constants)
    return y


def backward(p: Problem, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx ``(B, L, 1, D)`` in x's dtype, dweight and dbias in theirs, and g of the first places, where a state enters.

    Args:
        p: The problem.
        dy: ``(B, L, 1, D)``.
    """
    x, dy = _dense(p.x), _dense(dy)
    cut = _cut(p, backward=True)
    parts = cut.runs[0] * p.batch
    new: dict[str, Any] = {"dtype": p.dtype, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    part = torch.empty(parts, p.width + 1, p.channels, **new)
    state = p.initial_state if p.width > 1 else None
    head = None
    if p.initial_state is not None:
        head = torch.empty(p.batch, 1, p.width - 1, p.channels, **new)
    dweight = torch.empty(p.weight.shape, dtype=p.weight.dtype, device=x.device)
    dbias = None if p.bias is None else torch.empty(p.bias.shape, dtype=p.bias.dtype, device=x.device)
    given = (dy, x, p.weight.contiguous(), *_given(x, p.bias, state), dx, part, part if head is None else head)
    steps = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1))
    sums = (part, dweight, part if dbias is None else dbias, parts, p.channels)
    with on_device(x):
        arguments = (*given, p.length, p.channels, *steps, *cut.runs)
        launch(p.plan, _backward_kernel, cut.blocks * p.batch, arguments, cut.constants)
        launch(p.plan, _parameter_kernel, -(-(p.width + 1) * p.channels // COLUMNS), sums, cut.summed)
    return dx, dweight, dbias, head


class Cut(NamedTuple):
    """How a problem is cut, in the kernels' arguments.

    Attributes:
        blocks: Programs of a batch.
        runs: Programs that share its places, and steps of a run.
        constants: What the kernel over places is compiled for.
        summed: What the kernel that sums the parts is compiled for.
    """

    blocks: int
    runs: tuple[int, int]
    constants: dict[str, Any]
    summed: dict[str, Any]


def _cut(p: Problem, backward: bool) -> Cut:
    """The cut of a problem, made once for each plan; a plan is of a forward or of a backward."""
    found = p.plan.get("cut")
    if found is None:
        shape = shape_of(p, backward)
        constants = {
            "W": p.width, "R": shape.R, "U": shape.U, "BD": shape.BD, "HAS_BIAS": p.bias is not None,
            "HAS_STATE": p.initial_state is not None and p.width > 1, "REVERSE": p.reverse, "SILU": p.silu,
            "ACC": tl.float64 if p.dtype == torch.float64 else tl.float32, "num_warps": shape.warps,
        }  # fmt: skip
        rows = min(512, triton.next_power_of_2(shape.runs * p.batch))
        summed = {
            "W": p.width, "HAS_BIAS": p.bias is not None, "ROWS": rows, "COLUMNS": COLUMNS, "num_warps": 8,
        }  # fmt: skip
        found = Cut(shape.blocks * shape.runs, (shape.runs, shape.steps), constants, summed)
        p.plan["cut"] = found
    return found


def _dense(t: Tensor) -> Tensor:
    """``t``, with its channels next to each other."""
    return t if t.stride(3) == 1 else t.contiguous()


def _given(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, dense; x stands for absent ones."""
    return [x if t is None else t.contiguous() for t in tensors]
