"""The arguments of a norm, checked and brought to one form that every implementation reads.

D channels, M rows (all leading axes together), G groups of D / G channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.checks import check_float, check_shape
from kernels.plans import Plan

KINDS = ("rms", "layer")


@dataclass(frozen=True)
class Problem:
    """One norm over the rows of ``x (..., D)``.

    Attributes:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        residual: Shape of x, or None.
        z: Shape of x, or None.
        layer: The mean is taken away (LayerNorm), else not (RMSNorm).
        eps: Added to the mean square.
        groups: Groups of channels with statistics of their own.
        norm_before_gate: silu(z) multiplies the result, else the input.
        residual_in_fp32: Whether the sum is handed on in float32.
        plan: What implementations keep for the next problem of the same sizes.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    z: Tensor | None
    layer: bool
    eps: float
    groups: int
    norm_before_gate: bool
    residual_in_fp32: bool
    plan: Plan = field(default_factory=dict, repr=False, compare=False)

    @property
    def channels(self) -> int:
        return self.x.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the statistics."""
        wide = self.x.dtype == torch.float64 or (self.residual is not None and self.residual.dtype == torch.float64)
        return torch.float64 if wide else torch.float32

    @property
    def residual_dtype(self) -> torch.dtype:
        """The dtype of ``x + residual`` as it is handed on."""
        if self.residual_in_fp32:
            return self.dtype
        return self.x.dtype if self.residual is None else self.residual.dtype

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """Shape of mean and rstd: ``(..., G)``."""
        return (*self.x.shape[:-1], self.groups)


def make_problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    plan: Plan | None = None,
) -> Problem:
    """Checks the arguments of ``norm``; ``group_size`` 0 means the whole row.

    With the plan of an earlier problem of the same signature nothing is checked again.

    Raises:
        ValueError: With the tensor's name, what it is, what was wanted and how to fix it.
    """
    if not plan:
        _check(x, weight, bias, residual, z, kind, group_size)
    return Problem(
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        z=z,
        layer=kind == "layer",
        eps=eps,
        groups=x.shape[-1] // group_size if group_size else 1,
        norm_before_gate=norm_before_gate,
        residual_in_fp32=residual_in_fp32,
        plan={} if plan is None else plan,
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    kind: str,
    group_size: int,
) -> None:
    """Raises unless the arguments fit each other."""
    check_float(x, weight=weight, bias=bias, residual=residual, z=z)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted 'rms' or 'layer'")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (..., D) with D >= 1")
    channels = x.shape[-1]
    check_shape("weight", weight, (channels,), "(D,)")
    check_shape("bias", bias, (channels,), "(D,)")
    check_shape("residual", residual, tuple(x.shape), "the shape of x")
    check_shape("z", z, tuple(x.shape), "the shape of x")
    if group_size < 0 or (group_size > 0 and channels % group_size):
        raise ValueError(f"group_size: got {group_size}, wanted a divisor of D = {channels}, or None for the whole row")
