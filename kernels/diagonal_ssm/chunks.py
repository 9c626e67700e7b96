"""A time-invariant state space over chunks of a sequence, as matrix products; any real state, diagonal or not.

Within a chunk of T samples, y = K u + R x and the next chunk's x' = A^T x + W u, where K is the lower triangular
Toeplitz matrix of the kernel, R reads the state out and W writes inputs into it (Gu et al. 2021, section 3.2, unrolled
over T steps).

B batch, L length, H channels, T chunk, J chunks, N real numbers of a channel's state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def toeplitz(kernel: Tensor) -> Tensor:
    """(H, T) -> (H, T, T): entry (j, i) is kernel[i - j] for i >= j, else 0; a row of u times it is the convolution."""
    size = kernel.shape[1]
    # Windows of the kernel after zeros, not an index: the gradient of an index sorts.
    return F.pad(kernel, (size - 1, 0)).unfold(1, size, 1).flip(2).mT


def run_chunks(
    u: Tensor,
    state: Tensor,
    kernel: Tensor,
    write: Tensor,
    read: Tensor,
    scan: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Runs whole chunks.

    Args:
        u: (B, J T, H).
        state: (H, B, N) before the first sample.
        kernel: (H, T) first samples of the kernel.
        write: (H, T, N): what each sample of a chunk adds to the state after it.
        read: (H, N, T): what the state before a chunk adds to each of its outputs.
        scan: Maps what the chunks add (H, B, J, N) and the first state (H, B, N) to the state before each chunk, and
            the one after the last.

    Returns:
        y (B, J T, H) and the state (H, B, N) after it.
    """
    batch, length, channels = u.shape
    size = kernel.shape[1]
    rows = u.permute(2, 0, 1).to(kernel.dtype).reshape(channels, length * batch // size, size)
    added = torch.bmm(rows, write).unflatten(1, (batch, length // size))
    before, state = scan(added, state)
    y = torch.baddbmm(torch.bmm(rows, toeplitz(kernel)), before.flatten(1, 2), read)
    return y.view(channels, batch, length).permute(1, 2, 0), state


def split(length: int, chunk: int) -> list[tuple[int, int, int]]:
    """Cuts a length into whole chunks and what is left: (start, stop, size of chunk) of each of the two."""
    whole = length // chunk * chunk
    pieces = [(0, whole, chunk), (whole, length, length - whole)]
    return [piece for piece in pieces if piece[1] > piece[0]]
