"""The loss of a language model without its logits: they are never all in memory at once.

Legend: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import autocast_dtype

CHUNK = 2048  # tokens whose logits exist at once; twice as many where their gradient takes no memory of its own


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses; its gradients are worked out with it, chunk by chunk, and scaled later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(torch.float32, hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        low = weight.to(hidden.dtype)
        fused = _fuses(hidden) and (wants_hidden or wants_weight)
        for place in range(0, len(hidden), chunk):
            part, wanted = hidden[place : place + chunk], targets[place : place + chunk]
            if fused:
                from kernels.softmax_slope import softmax_slope

                losses, slope = softmax_slope(_logits(part, low, wide), wanted, low.dtype, ignore_index)
                total += losses.sum()
                if dhidden is not None:
                    torch.mm(slope, low, out=dhidden[place : place + chunk])
                if dweight is not None:
                    torch.addmm(dweight, slope.T, part, out_dtype=wide, out=dweight)
                continue
            scores = _logits(part, low, wide).log_softmax(-1)
            total += F.nll_loss(scores, wanted, ignore_index=ignore_index, reduction="sum")
            if dhidden is None and dweight is None:
                continue
            kept = (wanted != ignore_index)[:, None]
            at = wanted[:, None].where(kept, 0)
            slope = torch.empty_like(scores, dtype=low.dtype)  # of the loss by the logits: softmax, less one at targets
            torch.exp(scores, out=slope)
            slope.scatter_(1, at, torch.expm1(scores.gather(1, at)).to(low.dtype))
            if dhidden is not None:
                torch.mul(slope @ low, kept, out=dhidden[place : place + chunk])
            if dweight is not None:
                dweight += slope.T @ (part * kept)
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        scaled = (None if t is None else (t.to(grad.dtype) * grad).to(t.dtype) for t in (dhidden, dweight))
        return *scaled, None, None, None


def _fuses(hidden: Tensor) -> bool:
    """Whether one kernel makes the slope out of the logits: for 16-bit products on NVIDIA GPUs."""
    return hidden.is_cuda and hidden.dtype.itemsize == 2 and torch.version.hip is None


def _logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of 16-bit numbers in float32, which a GPU writes as it sums them."""
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return F.linear(hidden, weight).to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden weight^T)``, as ``F.cross_entropy(F.linear(hidden, weight), targets)``.

    Logits of ``chunk`` tokens exist at a time, and their gradient with them: 8 x 2048 tokens of a vocabulary of 50,280
    take 1 GiB instead of 8. Products are formed in the dtype of ``hidden`` (of autocast, where it is on), softmax,
    loss and the sum of the weight's gradient in float32 (float64 for float64). Differentiable once.

    Args:
        hidden: ``(..., D)``, the model's last hidden states.
        weight: ``(V, D)``, of the head.
        targets: ``(...)`` int64, the token to predict at each place.
        ignore_index: Places with this target count for nothing.
        chunk: Tokens whose logits exist at once; by default 2048, or 4096 where one kernel writes the gradient over
            them (16-bit products on NVIDIA GPUs).
        reduction: ``mean`` over all places that count, or their ``sum``.

    Returns:
        A scalar, float32 (float64 for float64); a mean is NaN where no place counts.

    Raises:
        ValueError: If a shape or dtype doesn't fit.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)}, wanted {tuple(hidden.shape[:-1])}, one for each of hidden's "
            "places; shift them by one token first"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, wanted (V, D) with D = {hidden.shape[-1]} of hidden"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: got dtype {targets.dtype}, wanted int64; convert them with .long()")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: got {chunk}, wanted at least 1 token")
    dtype = autocast_dtype(hidden.device)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden = hidden.to(dtype)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: got {reduction!r}, wanted "mean" or "sum"')
    if chunk is None:
        chunk = CHUNK * (2 if _fuses(hidden) else 1)
    flat = targets.flatten()
    total: Any = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, flat, ignore_index, chunk)
    return total if reduction == "sum" else total / (flat != ignore_index).sum()
