"""``layer_norm_fn`` and ``rms_norm_fn`` of ``mamba_ssm.ops.triton.layer_norm``, and the gated ``layernorm_fn`` and
``rmsnorm_fn`` of ``mamba_ssm.ops.triton.layernorm_gated``.

D channels.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from kernels.norm import norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the residual, then LayerNorm.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        residual: Shape of x; its dtype is that of the returned sum.
        x1: Refused, as are weight1, bias1, rowscale, dropout_p > 0 and return_dropout_mask: apply them outside.
        weight1: See x1.
        bias1: See x1.
        eps: Added to the variance.
        dropout_p: See x1.
        rowscale: See x1.
        prenorm: Whether to return x + residual too.
        residual_in_fp32: Whether that is float32 when no residual is given.
        is_rms_norm: RMSNorm instead.
        return_dropout_mask: See x1.

    Returns:
        ``(..., D)`` in x's dtype, and x + residual with ``prenorm``.
    """
    refused = {
        "x1": x1, "weight1": weight1, "bias1": bias1, "rowscale": rowscale,
        "dropout_p": dropout_p or None, "return_dropout_mask": return_dropout_mask or None,
    }  # fmt: skip
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name}: got a value, wanted the default; this norm has no such step, apply it outside")
    return norm(
        x, weight, bias, residual=residual, kind="rms" if is_rms_norm else "layer", eps=eps,
        residual_in_fp32=residual_in_fp32 and residual is None, return_residual=prenorm,
    )  # fmt: skip


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the residual, then RMSNorm; the arguments are those of ``layer_norm_fn``."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        True, return_dropout_mask,
    )  # fmt: skip


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """LayerNorm with a gate.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        z: Gate, shape of x, or None.
        eps: Added to the variance.
        group_size: Channels that share statistics; None is the whole row.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        is_rms_norm: RMSNorm instead.

    Returns:
        ``(..., D)`` in x's dtype.
    """
    y = norm(
        x, weight, bias, z=z, kind="rms" if is_rms_norm else "layer", eps=eps, group_size=group_size,
        norm_before_gate=norm_before_gate,
    )  # fmt: skip
    return cast(Tensor, y)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm with a gate; the arguments are those of ``layernorm_fn``."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)
