"""What a decoding step of a Mamba layer is made of: projections of one token with everything around them fused.

At a batch of a few rows a step reads every weight once; what it costs beside that is kernel launches. ``project`` takes
the addition to the residual stream, the norm and the gate in front of a product, and the convolution's step behind it,
so that a Mamba layer is three launches (project, ``scan_step``, project). For many rows there are matrix products,
``project_parts``, ``scan_step`` in tiles of rows, and ``kernels.decode.many``. For inference: no gradients, and the
states that are passed in are updated in place.

Legend: B batch, K inputs, O outputs, C convolved channels, W convolution width, E inner width, N state, R dt rank,
P outputs of a following projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import choose
from kernels.checks import check_float, check_shape
from kernels.decode import reference, rows_cuda

__all__ = ["Conv", "largest", "project", "project_parts", "scan_step"]

SCAN_ROWS = 5  # from here on a step of the scan takes tiles of many rows


class Conv(NamedTuple):
    """The step of a causal depthwise convolution with SiLU on some outputs of a projection."""

    weight: Tensor  # (C, W)
    bias: Tensor | None  # (C,)
    state: Tensor  # (B, W - 1, C) the last inputs, oldest first; updated in place
    first: int  # the first of the C outputs


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    norm_weight: Tensor | None = None,
    groups: int = 1,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
    conv: Conv | None = None,
    following: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y = n(x + residual) W^T + bias``, then a convolution's step on some of y, then part of the next projection.

    n is RMSNorm (Zhang & Sennrich 2019, equation 4) if ``norm_weight`` is given, of ``s silu(gate)`` if a gate is, or
    with ``norm_before_gate`` times silu(gate). Sums are float32 (float64 for float64).

    Args:
        x: (B, K); rows may be strided.
        weight: (O, K).
        bias: (O,).
        residual: (B, K) added to x.
        gate: (B, K); rows may be strided.
        norm_weight: (K,).
        groups: Of channels that share the norm's statistics.
        norm_before_gate: See above.
        eps: Added to the mean square.
        conv: Of outputs first to first + C, which become silu(conv).
        following: (P, C) weight of a projection of the convolved outputs.
        backend: ``auto``, ``triton`` or ``reference``.

    Returns:
        y (B, O) in x's dtype; x + residual in residual's dtype, or None; and parts (B, parts, P) of the following
        projection, to be added up over the second axis (``scan_step`` does), or None.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
    """
    batch, inputs, outputs = *x.shape, weight.shape[0]
    check_float(x, weight=weight, bias=bias, residual=residual, gate=gate, norm_weight=norm_weight)
    check_shape("weight", weight, (outputs, inputs), "(O, K)")
    check_shape("bias", bias, (outputs,), "(O,)")
    check_shape("residual", residual, (batch, inputs), "(B, K)")
    check_shape("gate", gate, (batch, inputs), "(B, K)")
    check_shape("norm_weight", norm_weight, (inputs,), "(K,)")
    if groups < 1 or inputs % groups:
        raise ValueError(f"groups: got {groups}, wanted a divisor of K = {inputs}")
    channels = 0
    if conv is not None:
        channels, width = conv.weight.shape
        check_shape("conv.bias", conv.bias, (channels,), "(C,)")
        check_shape("conv.state", conv.state, (batch, width - 1, channels), "(B, W - 1, C)")
        if not 0 <= conv.first <= outputs - channels:
            raise ValueError(f"conv.first: got {conv.first}, wanted 0 to O - C = {outputs - channels}")
    if following is not None:
        check_shape("following", following, (following.shape[0], channels), "(P, C)")
    if _name(backend, x) == "triton":
        from kernels.decode import triton

        return triton.project(
            x, weight, bias, residual, gate, norm_weight, groups, norm_before_gate, eps, conv, following
        )
    s, total = reference.normalised(x, residual, gate, norm_weight, groups, norm_before_gate, eps)
    y = F.linear(s, reference.wide(weight), None if bias is None else reference.wide(bias)).to(x.dtype)
    part = None
    if conv is not None:
        mixed = y[:, conv.first : conv.first + channels]
        mixed.copy_(reference.conv_step(mixed, conv.weight, conv.bias, conv.state))
        part = None if following is None else F.linear(mixed, following).unsqueeze(1)
    return y, None if residual is None else total.to(residual.dtype), part


def project_parts(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """``x W^T`` for many rows and few outputs, as parts (B, parts, O) that are to be added up: ``scan_step`` does.

    Args:
        x: (B, K); rows may be strided.
        weight: (O, K).
        backend: See ``project``; float64 takes the reference in any case.

    Returns:
        float32, or float64 for float64.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
    """
    check_float(x, weight=weight)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]), "(O, K)")
    if x.dtype != torch.float64 and _name(backend, x) == "triton":
        from kernels.decode import rows

        return rows.project_parts(x, weight)
    return F.linear(reference.wide(x), reference.wide(weight)).unsqueeze(1)


def scan_step(
    low: Tensor,
    x: Tensor,
    z: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """One token of a Mamba layer's scan (Gu & Dao 2023, algorithm 2), with its dt projection and gate.

    ``dt = softplus(dt_weight low_dt + dt_bias); h = exp(-dt exp(A_log)) h + dt x B; y = (<C, h> + D x) silu(z)``.

    Args:
        low: (B, parts, R + 2 N): [dt, B, C], to be added up over the parts.
        x: (B, E); rows may be strided.
        z: (B, E) gate; rows may be strided.
        dt_weight: (E, R).
        dt_bias: (E,).
        A_log: (E, N).
        D: (E,).
        state: (B, E, N), updated in place.
        backend: See ``project``, or ``cuda`` where a kernel fits.

    Returns:
        y (B, E) in x's dtype.
    """
    (batch, inner), (rank, n) = x.shape, (dt_weight.shape[1], A_log.shape[1])
    check_float(x, low=low, z=z, dt_weight=dt_weight, dt_bias=dt_bias, A_log=A_log, D=D, state=state)
    check_shape("low", low, (batch, low.shape[1], rank + 2 * n), "(B, parts, R + 2 N)")
    check_shape("z", z, (batch, inner), "(B, E)")
    check_shape("dt_weight", dt_weight, (inner, rank), "(E, R)")
    check_shape("dt_bias", dt_bias, (inner,), "(E,)")
    check_shape("A_log", A_log, (inner, n), "(E, N)")
    check_shape("D", D, (inner,), "(E,)")
    check_shape("state", state, (batch, inner, n), "(B, E, N)")
    name = _name(backend, x, batch >= SCAN_ROWS and rows_cuda.scan_fits(low, x, z, dt_weight, A_log, state))
    if name == "cuda":
        return rows_cuda.scan(low, x, z, dt_weight, dt_bias, A_log, D, state)
    if name == "triton":
        from kernels.decode import rows, triton

        if batch >= SCAN_ROWS and n <= 64 and x.dtype != torch.float64:
            return rows.scan_rows(low, x, z, dt_weight, dt_bias, A_log, D, state)
        return triton.scan_step(low, x, z, dt_weight, dt_bias, A_log, D, state)
    return reference.scan_step(low, x, z, dt_weight, dt_bias, A_log, D, state).to(x.dtype)


def largest(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The first index of the largest value of each row, as ``x.argmax(-1)``; NaN counts as infinity.

    PyTorch's reduction takes 14 us for a row of 50,000 values, more than a whole layer of a decoding step.

    Args:
        x: (B, V), V >= 1.
        backend: See ``project``.

    Returns:
        (B,) int64.
    """
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, V) with V >= 1")
    if x.stride(1) == 1 and _name(backend, x) == "triton":
        from kernels.decode import triton

        return triton.largest(x)
    return x.argmax(dim=-1)


def _name(backend: str, x: Tensor, cuda: bool = False) -> str:
    """``cuda`` if a kernel fits, ``triton`` or ``reference``: on the CPU, or without Triton, PyTorch's operators do."""
    assert not torch.is_grad_enabled() or not x.requires_grad, "decoding ops have no gradients"
    name, _ = choose(backend, x.device, cuda)
    return name if name in ("cuda", "triton") else "reference"
