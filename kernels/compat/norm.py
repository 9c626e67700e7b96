"""``layer_norm_fn`` and ``rms_norm_fn`` of ``mamba_ssm.ops.triton.layer_norm``, and the gated ``layernorm_fn`` and
``rmsnorm_fn`` of ``mamba_ssm.ops.triton.layernorm_gated``.

D channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from kernels.checks import check_shape
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
) -> Tensor | tuple[Tensor | None, ...]:
    """Adds up ``dropout(x) + dropout(x1) + residual``, then LayerNorm, with a second weight twice.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        residual: Shape of x; its dtype is that of the returned sum.
        x1: Shape of x; added to it. Not together with ``rowscale``.
        weight1: ``(D,)``, of a second norm of the same sum.
        bias1: ``(D,)``, of the second norm.
        eps: Added to the variance.
        dropout_p: Share of x and of x1 that becomes zero, in [0, 1); the rest is divided by 1 - dropout_p.
        rowscale: ``(...,)``; multiplies the rows of x.
        prenorm: Whether to return the sum too.
        residual_in_fp32: Whether that is float32 when no residual is given.
        is_rms_norm: RMSNorm instead.
        return_dropout_mask: Whether to return what the dropouts kept too, bool of the shape of x; None where there is
            no dropout, or no x1.

    Returns:
        ``(..., D)`` in x's dtype; where there is more, a tuple of that, the second norm (with ``weight1``), the sum
        (with ``prenorm``) and the two masks (with ``return_dropout_mask``).

    Raises:
        ValueError: For a shape that does not fit, rowscale together with x1, or dropout_p out of range.
    """
    total, masks = _sum(x, x1, rowscale, dropout_p)
    sum_dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype

    def normed(weight: Tensor, bias: Tensor | None, prenorm: bool) -> tuple[Tensor, ...]:
        found = norm(
            total, weight, bias, residual=residual, kind="rms" if is_rms_norm else "layer", eps=eps,
            residual_in_fp32=residual_in_fp32 and residual is None, return_residual=prenorm,
        )  # fmt: skip
        y, *s = found if isinstance(found, tuple) else (found,)
        return y.to(x.dtype), *(t.to(sum_dtype) for t in s)

    y, *s = normed(weight, bias, prenorm)
    second = () if weight1 is None else normed(weight1, bias1, False)
    results = (y, *second, *s, *(masks if return_dropout_mask else ()))
    return results if len(results) > 1 else y


def _sum(
    x: Tensor, x1: Tensor | None, rowscale: Tensor | None, dropout_p: float
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """``dropout(rowscale x) + dropout(x1)``, in float32 at least unless it is x itself, and what was kept of both."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, wanted at least 0 and below 1")
    if x1 is None and rowscale is None and dropout_p == 0:
        return x, (None, None)
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale: got it together with x1, wanted one of them; multiply x's rows before the call")
    check_shape("rowscale", rowscale, tuple(x.shape[:-1]), "the shape of x without D")
    check_shape("x1", x1, tuple(x.shape), "the shape of x")
    total, mask = _dropped(x, rowscale, dropout_p)
    if x1 is None:
        return total, (mask, None)
    other, mask1 = _dropped(x1, None, dropout_p)
    return total + other, (mask, mask1)


def _dropped(x: Tensor, rowscale: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """``dropout(rowscale x)`` in float32 at least, and what it kept."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if rowscale is not None:
        x = x * rowscale[..., None]
    return torch.native_dropout(x, dropout_p, True) if dropout_p > 0 else (x, None)


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
) -> Tensor | tuple[Tensor | None, ...]:
    """The same with RMSNorm; the arguments are those of ``layer_norm_fn``."""
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
