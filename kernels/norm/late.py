"""RMSNorm of a sum whose branch still waits for a norm of its own, behind a product.

A norm's statistics are needed only behind the product that follows it: ``n(x) W^T = r (w x) W^T`` with
``r = 1 / sqrt(mean(x^2) + eps)`` of the row. Whoever makes x hands on w x and sums of squares, and where the product's
outputs are added to the residual stream they are multiplied by r: rows go through memory once instead of twice. For
inference: no gradients.

D channels, K channels of the rows in front of the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import choose
from kernels.checks import check_float, check_shape
from kernels.norm import late_product

__all__ = ["Late", "add_norm", "saves_a_pass"]


class Late(NamedTuple):
    """A product that waits for the norm in front of it: ``(rows matrix^T) / sqrt(squares.sum(-1) / width + eps)``."""

    rows: Tensor  # (..., D); with a matrix (..., K), in front of the product
    squares: Tensor | None  # (..., parts) float32 (float64): parts of each row's sum of squares; None: no norm waits
    width: int  # K
    eps: float
    matrix: Tensor | None = None  # (D, K), if the product waits as well: it may be made by the kernel that adds


def add_norm(
    late: Late, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Adds late rows to the residual stream and normalises the sum (Zhang & Sennrich 2019, equation 4).

    Args:
        late: The branch.
        residual: (..., D) the stream so far.
        weight: (D,) of the RMSNorm.
        eps: Added to its mean square.
        backend: ``auto``, ``cuda``, ``triton`` or ``reference``; see ``kernels.backend``.

    Returns:
        The normalised sum (..., D) in the rows' dtype, and the sum in residual's.

    Raises:
        ValueError: If a shape, dtype, device or backend does not fit.
    """
    rows, squares, width, inner_eps, matrix = late
    check_float(rows, squares=squares, residual=residual, weight=weight)
    outputs = rows.shape[-1]
    if matrix is not None:
        check_float(rows, matrix=matrix)
        outputs = len(matrix)
        check_shape("matrix", matrix, (outputs, rows.shape[-1]), "(D, K)")
    check_shape("residual", residual, (*rows.shape[:-1], outputs), "(..., D)")
    check_shape("weight", weight, (outputs,), "(D,)")
    if squares is not None:
        check_shape("squares", squares, (*rows.shape[:-1], squares.shape[-1]), "(..., parts)")
    assert not torch.is_grad_enabled() or not rows.requires_grad, "late norms have no gradients"
    name = choose(backend, rows.device, late_product.fits(rows, squares, matrix, residual, weight))[0]
    if matrix is not None:
        if name == "cuda":
            return late_product.forward(rows, squares, width, inner_eps, matrix, residual, weight, eps)
        rows = F.linear(rows, matrix)
    if squares is None:
        squares, inner_eps = residual.new_zeros(*rows.shape[:-1], 1), 1.0
    if name == "triton":
        from kernels.norm.triton_late import forward

        return forward(rows.contiguous(), squares.contiguous(), width, inner_eps, residual.contiguous(), weight, eps)
    wide = torch.promote_types(rows.dtype, torch.float32)
    scale = torch.rsqrt(squares.to(wide).sum(-1, keepdim=True) / width + inner_eps)
    total = rows.to(wide) * scale + residual.to(wide)
    normed = F.rms_norm(total, weight.shape, weight.to(wide), eps)
    return normed.to(rows.dtype), total.to(residual.dtype)


def saves_a_pass(rows: Tensor, matrix: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether ``add_norm`` has a kernel that makes the product of such rows, which wait for no norm, as well."""
    return choose("auto", rows.device, late_product.fits(rows, None, matrix, residual, weight))[0] == "cuda"
