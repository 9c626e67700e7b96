"""Powers of complex decays, and the kernel of a diagonal state space, a product with a Vandermonde matrix.

H channels, M complex states, L length, T chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.checks import full_precision

BLOCK = 1 << 24  # entries of the Vandermonde factors that are held at a time


def powers(log_a: Tensor, count: int, stride: int = 1) -> Tensor:
    """exp(log_a stride l) for l < count, (H, M) -> (H, M, count).

    The exponents are formed in float64: a phase of a million steps has no digit left in float32.
    """
    time = stride * torch.arange(count, device=log_a.device, dtype=torch.float64)
    return torch.exp(log_a.to(torch.complex128)[..., None] * time).to(log_a.dtype)


def vandermonde(log_a: Tensor, coefficient: Tensor, length: int) -> Tensor:
    """The kernel ``K_l = 2 Re sum_m coefficient_m exp(log_a_m l)``, l < L (Gu et al. 2022, S4D, equation 6).

    The Vandermonde matrix of M x L entries is never formed: with l = i T + j its entries are products of those of two
    matrices of M x L/T and M x T, so that the sum over m is a matrix product whose factors have about sqrt(L) columns.
    Gradients compute the factors again.

    Args:
        log_a: ``(H, M)`` complex.
        coefficient: ``(H, M)`` complex, C times the discrete B.
        length: L, at least 1.

    Returns:
        ``(H, L)`` real, float32 for complex64.

    Raises:
        ValueError: If the shapes differ or the length is not positive.
    """
    if log_a.shape != coefficient.shape or log_a.ndim != 2:
        got = f"{tuple(log_a.shape)} and {tuple(coefficient.shape)}"
        raise ValueError(f"log_a and coefficient: got shapes {got}, wanted (H, M) for both")
    if length < 1:
        raise ValueError(f"length: got {length}, wanted at least 1")
    size = 1 << max(0, math.ceil(math.log2(length) / 2))
    rows = -(-length // size)
    block = max(1, BLOCK // (log_a.shape[1] * (size + rows)))
    parts = [
        checkpoint(
            _block,
            log_a[h : h + block],
            coefficient[h : h + block],
            rows,
            size,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for h in range(0, log_a.shape[0], block)
    ]
    return torch.cat(parts)[:, :length]  # type: ignore[arg-type]


def _block(log_a: Tensor, coefficient: Tensor, rows: int, size: int) -> Tensor:
    with full_precision(log_a.device):
        outer = (coefficient[:, :, None] * powers(log_a, rows, size)).transpose(1, 2)  # (H, L / T, M)
        inner = powers(log_a, size)  # (H, M, T)
        left, right = torch.cat([outer.real, -outer.imag], dim=2), torch.cat([inner.real, inner.imag], dim=1)
        return 2 * torch.bmm(left, right).flatten(1)
