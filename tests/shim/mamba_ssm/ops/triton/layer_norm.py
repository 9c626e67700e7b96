"""The published functions by ours, and the references that their tests import. D channels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kernels import norm
from kernels.compat import layer_norm_fn, rms_norm_fn

__all__ = ["layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Our reference op: LayerNorm of x + residual ``(..., D)``, which is returned too with ``prenorm``.

    ``upcast`` is accepted: the reference computes in float32 at least.
    """
    return _norm("layer", x, weight, bias, residual, eps, prenorm)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm; the arguments are those of ``layer_norm_ref``."""
    return _norm("rms", x, weight, bias, residual, eps, prenorm)


def _norm(
    kind: Literal["rms", "layer"],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    return norm(
        x, weight, bias, residual=residual, kind=kind, eps=eps, residual_in_fp32=False, return_residual=prenorm,
        backend="reference",
    )  # fmt: skip
