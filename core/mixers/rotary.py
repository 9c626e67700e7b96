"""Rotary positions (Su et al. 2021): pairs of channels turned by an angle, and where packed sequences start.

Legend: B batch, L length, E channels of a head, R of them rotated, S packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions: Tensor, dim: int, base: float, double: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base^(-2 i / R) for i < R / 2 (Su et al. 2021, equation 15).

    Args:
        positions: (..., L) integers.
        dim: R, even.
        base: Of the wavelengths.
        double: float64 instead of float32.

    Returns:
        Two of (..., L, R / 2).
    """
    # float64 first: in float32 the angle of a position of a million is off by a sixteenth of a turn.
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions[..., None].double() * base**-exponents
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if double else (cos.float(), sin.float())


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns the first R channels of x (..., E) in pairs: (a, b) to (a cos - b sin, a sin + b cos).

    Args:
        x: (..., E).
        cos: (..., R / 2), broadcastable; the result is computed in the wider of its dtype and x's.
        sin: As cos.
        interleaved: Pairs are channels (2i, 2i + 1), else (i, i + R / 2).

    Returns:
        (..., E) in x's dtype.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(torch.promote_types(x.dtype, cos.dtype)), x[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def sequence_numbers(length: int, device: torch.device, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Counts packed sequences: (B, L) int64, one more wherever a new one starts.

    Args:
        length: L.
        device: Of the result.
        seq_idx: (B, L) integers that change where a sequence starts.
        cu_seqlens: (S + 1,) offsets instead.
    """
    if cu_seqlens is not None:
        token = torch.arange(length, device=device)
        return torch.searchsorted(cu_seqlens.to(token.dtype), token, right=True)[None]
    assert seq_idx is not None
    changes = seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0
    return changes.long().cumsum(1)


def positions_of(numbers: Tensor) -> Tensor:
    """Positions (B, L) of tokens in their own sequences, from ``sequence_numbers``."""
    token = torch.arange(numbers.shape[1], device=numbers.device)
    starts = numbers.diff(dim=1, prepend=numbers[:, :1] - 1) != 0
    return token - torch.where(starts, token, 0).cummax(1).values
