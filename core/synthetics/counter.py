"""Random numbers that are a function of (seed, step, place): the same on every device, in any order, in a CUDA graph.

Each number is the splitmix64 hash of a counter (Steele et al. 2014, "Fast splittable pseudorandom number generators"),
in 64-bit integers, whose products wrap. A generator with a hidden state would give other data on another device, and
another batch after a run is resumed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key(*numbers: int) -> int:
    """A 64-bit key of a tuple of integers, for ``bits``."""
    state = 0
    for number in numbers:
        z = (state + number + 1) * GOLDEN & MASK
        z = (z ^ z >> 30) * FIRST & MASK
        z = (z ^ z >> 27) * SECOND & MASK
        state = z ^ z >> 31
    return _signed(state)


def bits(key: int, step: Tensor, *shape: int) -> Tensor:
    """Hashes places 0, 1, ... of a step.

    Args:
        key: From ``key``.
        step: () int64, on the device where the numbers are wanted.
        shape: Of the result.

    Returns:
        int64 in [0, 2^63), independent and uniform.
    """
    base = _mix(step * _signed(GOLDEN) + key)
    places = torch.arange(1, 1 + math.prod(shape), device=step.device)
    return (_mix(places * _signed(GOLDEN) + base) & (1 << 63) - 1).view(shape)


def integers(key: int, step: Tensor, low: int, high: int, *shape: int) -> Tensor:
    """Integers uniform in [low, high), int64; see ``bits``. The bias of the remainder is below (high - low) / 2^63."""
    return bits(key, step, *shape) % (high - low) + low


def uniforms(key: int, step: Tensor, *shape: int) -> Tensor:
    """Numbers uniform in (0, 1), float64; see ``bits``."""
    return ((bits(key, step, *shape) >> 11) + 0.5) * 2.0**-52


def choices(key: int, step: Tensor, rows: int, size: int, count: int) -> Tensor:
    """``count`` different ones of 0, ..., size - 1 in each row, in random order, (rows, count) int64; see ``bits``."""
    return bits(key, step, rows, size).topk(count, dim=1).indices


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    """z >> places without the sign's copies."""
    return (z >> places) & (1 << 64 - places) - 1


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
