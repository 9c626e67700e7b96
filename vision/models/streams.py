"""Scans of few rows beside each other: alone each would leave most of a GPU idle.

Dimension letters: B batch, L tokens, E inner width.
"""

import functools

import torch
from torch import Tensor

__all__ = ["leaves_idle", "side_stream"]

LONG = 1024  # tokens from which on a second stream is worth its events


def leaves_idle(x: Tensor) -> bool:
    """Whether one scan of tokens (B, L, E) is too narrow for its GPU, and long enough to be worth a second stream."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count
    return x.shape[0] * x.shape[2] < 32 * cores and x.shape[1] >= LONG


@functools.cache
def side_stream(device: torch.device, beside: int) -> torch.cuda.Stream:
    """A stream that is used beside another alone.

    Args:
        device: The GPU.
        beside: Which other, by its ``cuda_stream``.
    """
    return torch.cuda.Stream(device)
