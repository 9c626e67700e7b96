"""The losses of next tokens and their slope by the logits, in one kernel that writes the slope over the logits.

T tokens, V vocabulary.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _softmax_slope_kernel(logits, targets, losses, slope, units, ignored, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its largest logit and sum of exponentials lane by lane, then the slope a block behind what is read.

    V is units * UNIT, so that the compiler sees how many neighbours can be loaded at once.
    """
    row, V = tl.program_id(0).to(tl.int64), units * UNIT
    logits, slope = logits + row * V, slope + row * (2 * V)
    target = tl.load(targets + row)
    counts = target != ignored
    wanted = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan"))
    lane = tl.arange(0, BLOCK)
    most, total = tl.full((BLOCK,), -1e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
        higher = tl.maximum(most, x)
        total = total * tl.exp(most - higher) + tl.exp(x - higher)
        most = higher
    top = tl.max(most, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    loss = tl.where(counts, norm - wanted, 0.0)
    tl.store(losses + row, loss)
    near = loss * (loss * 0.5 - 1) - loss * loss * loss / 6  # exp(-loss) - 1, whose digits the difference would lose
    at_target = tl.where(loss < 0.01, near, tl.exp(-loss) - 1)
    for start in range(0, V, BLOCK):
        v = start + lane
        x = tl.load(logits + v, mask=v < V, other=0.0)
        share = tl.where(v == target, at_target, tl.exp(x - norm))
        tl.debug_barrier()  # the first block of the slope lies over itself
        tl.store(slope + v, tl.where(counts, share, 0.0), mask=v < V)


def softmax_slope(logits: Tensor, targets: Tensor, dtype: torch.dtype, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, and its gradient by the logits, softmax less one at the target.

    Args:
        logits: (T, V) float32, contiguous; overwritten.
        targets: (T,) int64.
        dtype: Of the gradient, 16 bits.
        ignore_index: Rows with this target have no loss and no gradient. A target that is no index has the loss NaN.

    Returns:
        Losses (T,) float32, and the gradient (T, V), a view of the logits' memory with twice as long rows.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    slope = logits.view(dtype)[:, :vocabulary]
    if tokens:
        unit = math.gcd(vocabulary, 16)
        _softmax_slope_kernel[(tokens,)](
            logits, targets, losses, slope, vocabulary // unit, ignore_index, UNIT=unit, BLOCK=BLOCK, num_warps=8
        )
    return losses, slope
