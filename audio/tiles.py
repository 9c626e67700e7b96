"""Weights in the order and form in which the generating kernel on a GPU reads them: ``stepping.cu``.

A product's weights are tiles of 16 columns (outputs) by 16 rows (inputs). Within a tile the numbers of a thread lie
side by side, as tensor cores want them: lane 4 g + t of a warp has outputs g and g + 8 and inputs 4 t to 4 t + 3.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TILE = 16


def up_to(size: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-size // unit) * unit


def padded(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros after its last dimensions, to so many numbers each."""
    pads: list[int] = []
    for now, size in zip(reversed(x.shape), reversed(sizes), strict=False):
        pads += [0, size - now]
    return torch.nn.functional.pad(x, pads)


def half_tiles(weight: Tensor) -> Tensor:
    """Weights (outputs, inputs), multiples of 16, in bfloat16: rows of tiles, their tiles, 32 lanes, 8 numbers."""
    parts = weight.view(-1, 2, 8, weight.shape[1] // TILE, 4, 2, 2)  # tile, upper, g, row, t, pair, number
    return parts.permute(3, 0, 2, 4, 5, 1, 6).bfloat16().contiguous()


class Stream:
    """Bytes of a segment of the stream, which grows piece by piece.

    Args:
        half: Whether the weights of products are bfloat16, else float32.
        warps: Warps that compute.
    """

    def __init__(self, half: bool, warps: int) -> None:
        self.size, self._half, self._warps = 0, half, warps
        self._pieces: list[np.ndarray] = []

    def bytes(self) -> np.ndarray:
        """All of it, uint8."""
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.uint8)

    def vectors(self, *tensors: Tensor) -> None:
        """Adds float32 numbers, each tensor up to a multiple of 16 bytes, together up to a multiple of a tile's."""
        parts = []
        for tensor in tensors:
            flat = tensor.detach().float().cpu().reshape(-1)
            parts.append(padded(flat, up_to(len(flat), 4)))
        self._add(torch.cat(parts))

    def product(self, weight: Tensor, bias: Tensor | None, extra: Tensor | None = None) -> None:
        """Adds a product y = b + W x.

        Args:
            weight: (outputs, inputs).
            bias: (outputs,), or None.
            extra: (n, m) further numbers for each of the first m outputs, a multiple of 16.
        """
        outputs, inputs = weight.shape
        tiles, rows = up_to(outputs, TILE) // TILE, up_to(inputs, TILE) // TILE
        weight = padded(weight.detach().float().cpu(), tiles * TILE, rows * TILE)
        full = None if bias is None else padded(bias.detach().float().cpu(), tiles * TILE)
        group = self._warps * (2 if tiles > self._warps else 1)
        for first in range(0, tiles, group):
            here = slice(first * TILE, min(first + group, tiles) * TILE)
            vectors = [] if full is None else [full[here]]
            if extra is not None and first * TILE < extra.shape[1]:
                vectors.append(extra[:, here])
            if vectors:
                self.vectors(*vectors)
            self._tiles(weight[here])

    def _tiles(self, weight: Tensor) -> None:
        if self._half:
            self._add(half_tiles(weight))
        else:
            parts = weight.view(-1, 2, 8, weight.shape[1] // TILE, 4, 2, 2)
            self._add(parts.permute(3, 0, 5, 2, 4, 6, 1).contiguous())

    def _add(self, tensor: Tensor) -> None:
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        raw = np.pad(raw, (0, -len(raw) % (512 if self._half else 1024)))
        self._pieces.append(raw)
        self.size += len(raw)


def operand(x: Tensor, half: bool) -> Tensor:
    """Numbers (..., n), n a multiple of 4, as products take them: float32 words of the same shape.

    With bfloat16 weights each four are eight bfloat16 numbers: the upper parts, then the lower.
    """
    if not half:
        return x.float()
    upper = x.float().bfloat16()
    lower = (x.float() - upper.float()).bfloat16()
    pairs = torch.stack([part.unflatten(-1, (-1, 4)) for part in (upper, lower)], dim=-2)
    return pairs.flatten(-3).contiguous().view(torch.float32)
