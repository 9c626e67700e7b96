"""A layer's step over many rows: products that do what surrounds them, and the step of Mamba-2's heads.

With 64 rows each weight and each state is still read once, but products belong on tensor cores, and everything small
between them costs a launch. A norm's statistics are needed only behind the product that follows it:
``n(x) W^T = r (w x) W^T`` with r = 1 / rms(x) of the row. So whoever makes x hands on w x and sums of squares
(``Pending``), and the product multiplies its sums by r. A Mamba-2 layer is three kernels then. For
inference: no gradients, states are updated in place.

Legend: B batch, K inputs, O outputs, C convolved channels, W convolution width, H heads, P head dim, N state,
G groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import choose
from kernels.checks import check_float, check_shape
from kernels.decode import Conv, reference, rows_cuda

__all__ = ["Pending", "add_rows", "heads_fit", "heads_step", "multiply_rows", "rows_fit"]


class Pending(NamedTuple):
    """Rows on their way through an RMSNorm, which is ``rows / sqrt(squares.sum(1) / K + eps)``."""

    rows: Tensor  # (B, K) times the norm's weight
    squares: Tensor  # (B, parts) float32 (float64): parts of each row's sum of squares


def multiply_rows(
    x: Tensor | Pending, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, conv: Conv | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``y = x W^T + bias`` with the norm that x may still wait for, then a convolution's step on some of y.

    Args:
        x: (B, K); rows may be strided.
        weight: (O, K).
        bias: (O,).
        eps: Added to a pending row's mean square (Zhang & Sennrich 2019, equation 4).
        conv: Of outputs first to first + C, which become silu(conv).
        backend: ``auto``, ``cuda`` where the kernel fits (``rows_cuda.product_fits``), or ``reference``.

    Returns:
        (B, O) in x's dtype.

    Raises:
        ValueError: If a shape, dtype, device or backend does not fit.
    """
    rows, squares = _check(x, weight, bias)
    if conv is not None:
        channels, width = conv.weight.shape
        check_shape("conv.bias", conv.bias, (channels,), "(C,)")
        check_shape("conv.state", conv.state, (rows.shape[0], width - 1, channels), "(B, W - 1, C)")
        if not 0 <= conv.first <= weight.shape[0] - channels:
            raise ValueError(f"conv.first: got {conv.first}, wanted 0 to O - C = {weight.shape[0] - channels}")
    if _is_cuda(backend, rows, rows_cuda.product_fits(rows, weight, bias, conv, squares)):
        return rows_cuda.product(rows, weight, bias, squares, eps, conv=conv)
    y = reference.scaled(rows, weight, bias, squares, eps).to(rows.dtype)
    if conv is not None:
        mixed = y[:, conv.first : conv.first + conv.weight.shape[0]]
        mixed.copy_(reference.conv_step(mixed, conv.weight, conv.bias, conv.state))
    return y


def add_rows(
    x: Tensor | Pending, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, *,
    eps: float = 1e-5, backend: str = "auto",
) -> tuple[Pending, Tensor]:  # fmt: skip
    """Adds ``x W^T + bias`` to the residual stream and begins the norm that follows.

    Args:
        x: (B, K); rows may be strided.
        weight: (O, K).
        bias: (O,).
        residual: (B, O) the stream so far.
        norm_weight: (O,) of the RMSNorm that follows.
        eps: Added to a pending row's mean square.
        backend: See ``multiply_rows``.

    Returns:
        The stream on its way through the norm, in x's dtype, and the stream, in residual's.

    Raises:
        ValueError: If a shape, dtype, device or backend does not fit.
    """
    rows, squares = _check(x, weight, bias, residual=residual, norm_weight=norm_weight)
    check_shape("residual", residual, (rows.shape[0], weight.shape[0]), "(B, O)")
    check_shape("norm_weight", norm_weight, (weight.shape[0],), "(O,)")
    fits = rows_cuda.product_fits(rows, weight, bias, squares=squares) and norm_weight.dtype == rows.dtype
    if _is_cuda(backend, rows, fits and residual.is_contiguous() and residual.dtype in rows_cuda.TYPES):
        ahead, sums, total = rows_cuda.add(rows, weight, bias, squares, eps, residual, norm_weight)
        return Pending(ahead, sums), total
    total = reference.scaled(rows, weight, bias, squares, eps) + reference.wide(residual)
    pending = Pending((total * reference.wide(norm_weight)).to(rows.dtype), total.square().sum(1, keepdim=True))
    return pending, total.to(residual.dtype)


def heads_step(
    x: Tensor, B: Tensor, C: Tensor, z: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor | None,
    state: Tensor, *, norm_weight: Tensor | None = None, norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf), backend: str = "auto",
) -> Tensor | Pending:  # fmt: skip
    """One token of a Mamba-2 layer's scan (Dao & Gu 2024, section 7) and its gate, on the way to the norm.

    ``dt = clamp(softplus(dt + dt_bias)); h = exp(-dt exp(A_log)) h + dt x B; y = (<C, h> + D x) silu(z)``.

    Args:
        x: (B, H P); rows may be strided, as those of all that follow.
        B: (B, G N), of the same strides as x.
        C: (B, G N), of the same strides as x.
        z: (B, H P) gate.
        dt: (B, H).
        dt_bias: (H,).
        A_log: (H,).
        D: (H,) or (H P,).
        state: (B, H, P, N), updated in place.
        norm_weight: (H P,) of an RMSNorm over all channels behind the gate.
        norm_before_gate: The norm stands in front of the gate: its squares are those of what is not gated.
        dt_limit: Bounds of dt.
        backend: See ``multiply_rows``.

    Returns:
        y (B, H P) in x's dtype; with a norm's weight it waits for the norm.

    Raises:
        ValueError: If a shape, dtype, device or backend does not fit.
    """
    batch, heads, width, states = state.shape
    check_float(x, B=B, C=C, z=z, dt=dt, dt_bias=dt_bias, A_log=A_log, D=D, state=state, norm_weight=norm_weight)
    check_shape("x", x, (batch, heads * width), "(B, H P)")
    check_shape("z", z, (batch, heads * width), "(B, H P)")
    check_shape("dt", dt, (batch, heads), "(B, H)")
    check_shape("dt_bias", dt_bias, (heads,), "(H,)")
    check_shape("A_log", A_log, (heads,), "(H,)")
    check_shape("norm_weight", norm_weight, (heads * width,), "(H P,)")
    if B.shape != C.shape or B.shape[1] % states or heads % (B.shape[1] // states):
        shapes = f"{tuple(B.shape)} and {tuple(C.shape)}"
        raise ValueError(f"B, C: got shapes {shapes}, wanted (B, G N) with G a divisor of H = {heads}")
    fits = rows_cuda.heads_fit(x, state, norm_weight, dt_bias, A_log, D) and B.stride() == C.stride() == x.stride()
    if _is_cuda(backend, x, fits and x.dtype == B.dtype == C.dtype == z.dtype == dt.dtype):
        y, squares = rows_cuda.heads(
            x, B, C, z, dt, dt_bias, A_log, D, norm_weight, state, norm_before_gate, dt_limit
        )  # fmt: skip
        return y if squares is None else Pending(y, squares)
    y = reference.heads_step(x, B, C, dt, dt_bias, A_log, D, state, dt_limit)
    gated = y * F.silu(reference.wide(z))
    if norm_weight is None:
        return gated.to(x.dtype)
    squares = (y if norm_before_gate else gated).square().sum(1, keepdim=True)
    return Pending((gated * reference.wide(norm_weight)).to(x.dtype), squares)


def rows_fit(x: Tensor, weight: Tensor, bias: Tensor | None = None, conv: Conv | None = None) -> bool:
    """Whether ``multiply_rows`` and ``add_rows`` pay for such tensors: a kernel takes them, or there is no GPU."""
    return x.device.type == "cpu" or rows_cuda.product_fits(x, weight, bias, conv)


def heads_fit(x: Tensor, state: Tensor, norm_weight: Tensor | None, *small: Tensor | None) -> bool:
    """The same of ``heads_step``; ``small`` are dt's bias, A_log and D."""
    return x.device.type == "cpu" or rows_cuda.heads_fit(x, state, norm_weight, *small)


def _is_cuda(backend: str, x: Tensor, fits: bool) -> bool:
    assert not torch.is_grad_enabled() or not x.requires_grad, "decoding ops have no gradients"
    return choose(backend, x.device, fits)[0] == "cuda"


def _check(
    x: Tensor | Pending, weight: Tensor, bias: Tensor | None, **others: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows, and the squares that they wait for."""
    rows, squares = x if isinstance(x, Pending) else (x, None)
    check_float(rows, weight=weight, bias=bias, squares=squares, **others)
    check_shape("weight", weight, (weight.shape[0], rows.shape[1]), "(O, K)")
    check_shape("bias", bias, (weight.shape[0],), "(O,)")
    if squares is not None and (squares.ndim != 2 or len(squares) != len(rows)):
        raise ValueError(f"squares: got shape {tuple(squares.shape)}, wanted (B, parts) with B = {len(rows)}")
    return rows, squares
