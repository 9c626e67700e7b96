"""A time-invariant state space over chunks of a sequence, as matrix products; any real state, diagonal or not.

Within a chunk of T samples, y = K u + R x and the next chunk's x' = A^T x + W u, where K is the lower triangular
Toeplitz matrix of the kernel, R reads the state out and W writes inputs into it (Gu et al. 2021, section 3.2, unrolled
over T steps).

B batch, L length, H channels, T chunk, J chunks, N real numbers of a channel's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 256  # rows of a product whose gradients are summed at once


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
        u: (H, B, J T), a channel's samples side by side as the products want them.
        state: (H, B, N) before the first sample.
        kernel: (H, T) first samples of the kernel.
        write: (H, T, N): what each sample of a chunk adds to the state after it.
        read: (H, N, T): what the state before a chunk adds to each of its outputs.
        scan: Maps what the chunks add (H, B, J, N) and the first state (H, B, N) to the state before each chunk, and
            the one after the last.

    Returns:
        y (H, B, J T) and the state (H, B, N) after it.
    """
    channels, batch, length = u.shape
    size = kernel.shape[1]
    rows = u.reshape(channels, length * batch // size, size)
    added = _product(rows, write).unflatten(1, (batch, length // size))
    before, state = scan(added, state)
    y = _product(before.flatten(1, 2), read, _product(rows, toeplitz(kernel)))
    return y.view(u.shape), state


class _Product(torch.autograd.Function):
    """A product (H, R, K) by (H, K, C), added to a tensor or not.

    The second factor's gradient is a sum over all R rows, of which a long sequence has thousands, while the factor has
    few numbers to spread over a GPU: it is taken in parts.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, to: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        return torch.bmm(rows, matrix) if to is None else torch.baddbmm(to, rows, matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        drows = torch.bmm(grad, matrix.mT) if wanted[0] else None
        return drows, _sum_of_rows(rows, grad) if wanted[1] else None, grad if wanted[2] else None


def _product(rows: Tensor, matrix: Tensor, to: Tensor | None = None) -> Tensor:
    return _Product.apply(rows, matrix, to)  # type: ignore[return-value]


def _sum_of_rows(rows: Tensor, grad: Tensor) -> Tensor:
    """(H, R, K), (H, R, C) -> (H, K, C)."""
    parts = rows.shape[1] // PART
    if parts < 2:
        return torch.bmm(rows.mT, grad)
    whole = parts * PART
    left, right = (t[:, :whole].reshape(-1, PART, t.shape[2]) for t in (rows, grad))
    found = torch.bmm(left.mT, right).unflatten(0, (-1, parts)).sum(1)
    return found if whole == rows.shape[1] else found.baddbmm_(rows[:, whole:].mT, grad[:, whole:])


def by_pieces(
    u: Tensor, chunk: int, run: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs ``run(u, state, size)`` over the whole chunks of u (H, B, L), then over what is left."""
    outputs = []
    for start, stop, size in split(u.shape[2], chunk):
        whole = stop - start == u.shape[2]  # no copy then, nor in the backward
        y, state = run(u if whole else u[:, :, start:stop], state, size)
        outputs.append(y)
    if not outputs:
        return torch.empty_like(u), state
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), state


def split(length: int, chunk: int) -> list[tuple[int, int, int]]:
    """Cuts a length into whole chunks and what is left: (start, stop, size of chunk) of each of the two."""
    whole = length // chunk * chunk
    pieces = [(0, whole, chunk), (whole, length, length - whole)]
    return [piece for piece in pieces if piece[1] > piece[0]]
