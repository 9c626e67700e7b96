"""Hyena's gated convolution by FFT in one function with its gradients: no activation is copied into another layout.

B batch, L tokens, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.backend import choose, has, interpreting

__all__ = ["fft_length", "gated_convolution", "takes"]

NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHORTEST = 1024  # tokens; below, the transforms are small beside the launches


def fft_length(least: int) -> int:
    """The smallest m 2^k of at least ``least``, m being 1, 3, 5, 9 or 15: lengths whose transforms are fast."""
    return min(m << max(math.ceil(math.log2(least / m)), 0) for m in (1, 3, 5, 9, 15))


def takes(u: Tensor, taps: Tensor) -> bool:
    """Whether ``gated_convolution`` runs here: with Triton, in float32 or less, an even number of channels."""
    if torch.compiler.is_compiling() or not has("triton"):
        return False
    if not interpreting() and (not u.is_cuda or choose("auto", u.device)[0] != "triton"):
        return False
    long = u.shape[1] >= SHORTEST or interpreting()
    return long and u.numel() > 0 and u.dtype in NARROW and taps.dtype == torch.float32 and taps.shape[1] % 2 == 0


def gated_convolution(u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """h (b v g + taps * (v g)) for u = [h, g, v]: two gates around a causal convolution (Poli et al. 2023, order 2).

    The transforms are float32. What is kept for the backward pass are u, the taps and the sum in parentheses; the
    transforms are made again.

    Args:
        u: (B, L, 3 C), channels next to each other; see ``takes``.
        taps: (M, C) float32, M at least L.
        bias: (C,), b, or None.

    Returns:
        (B, L, C) in u's dtype.
    """
    return _Gated.apply(u, taps, bias)  # type: ignore[return-value]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        from kernels.long_convolution import triton as run

        u = u if u.stride(2) == 1 else u.contiguous()
        last, gate, v = u.chunk(3, dim=2)
        n = fft_length(u.shape[1] + taps.shape[0])
        z = run.multiply(run.spectrum(v, gate, n), run.spectrum(taps[None], None, n))
        w, y = run.finish(z, v, gate, bias, last)
        ctx.save_for_backward(u, taps, bias, w)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.long_convolution import triton as run

        u, taps, bias, w = ctx.saved_tensors
        last, gate, v = u.chunk(3, dim=2)
        n, dy = fft_length(u.shape[1] + taps.shape[0]), dy.contiguous()
        back, dtaps = run.spectrum(dy, last, n), None
        if ctx.needs_input_grad[1]:
            product = run.multiply(run.spectrum(v, gate, n), back, conjugate=1)
            dtaps = run.plain(product if len(product) == 1 else product.sum(0, keepdim=True), taps.shape[0])[0]
            del product
        z = run.multiply(back, run.spectrum(taps[None], None, n), conjugate=2)
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        dlast, dgate, dv = du.chunk(3, dim=2)
        dbias = run.gradients(z, v, gate, bias, last, w, dy, [dv, dgate, dlast])
        return du, dtaps, None if bias is None or dbias is None else dbias.to(bias.dtype)
