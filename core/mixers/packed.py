"""Packed sequences for layers that cannot stop at a border: each sequence runs alone.

Legend: B batch, L length, D model width, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor


def run_packed(
    layer: Callable[[Tensor], Tensor], x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Runs a layer on each packed sequence.

    Args:
        layer: Maps (1, n, D) to (1, n, D).
        x: (B, L, D).
        seq_idx: (B, L) integers, another one for each sequence; -1 marks padding.
        cu_seqlens: (S + 1,) offsets of S sequences in a batch of one.

    Returns:
        (B, L, D), zeros at padding.
    """
    y = torch.zeros_like(x)
    for row, start, end in segments(seq_idx, cu_seqlens):
        y[row, start:end] = layer(x[row : row + 1, start:end])[0].to(y.dtype)
    return y


def segments(seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of each packed sequence that is no padding; see ``run_packed``."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        yield from ((0, start, end) for start, end in pairwise(bounds) if end > start)
        return
    assert seq_idx is not None
    for row, numbers in enumerate(seq_idx):
        values, counts = torch.unique_consecutive(numbers, return_counts=True)
        end = 0
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            start, end = end, end + count
            if value >= 0:
                yield row, start, end
