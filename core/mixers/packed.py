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
        seq_idx: (B, L) integers, another one for each sequence; -1 marks padding, within a sequence too.
        cu_seqlens: (S + 1,) offsets of S sequences in a batch of one.

    Returns:
        (B, L, D), zeros at padding.
    """
    y = torch.zeros_like(x)
    for row, places in _sequences(seq_idx, cu_seqlens):
        y[row, places] = layer(x[row : row + 1, places])[0].to(y.dtype)
    return y


def _sequences(seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[tuple[int, slice | Tensor]]:
    """Row and positions of each packed sequence; see ``run_packed``."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        yield from ((0, slice(start, end)) for start, end in pairwise(bounds) if end > start)
        return
    assert seq_idx is not None
    for row, numbers in enumerate(seq_idx):
        real = (numbers >= 0).nonzero()[:, 0]
        counts = torch.unique_consecutive(numbers[real], return_counts=True)[1].tolist()
        for places in real.split(counts):
            first, last = int(places[0]), int(places[-1])
            together = last - first + 1 == len(places)
            yield row, slice(first, last + 1) if together else places


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded rows (B, L, D) with zeros behind their ``lengths`` (B,) tokens.

    For layers that transform a row as a whole: a NaN at its end would be everywhere.
    """
    padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(padding[..., None], 0)
