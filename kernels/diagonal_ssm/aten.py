"""``diagonal_ssm`` over chunks in plain differentiable operators: matrix products on any device.

B batch, L length, H channels, M complex states, T chunk, J chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.diagonal_ssm.chunks import by_pieces, run_chunks
from kernels.diagonal_ssm.powers import powers

CHUNK = 128  # T: products within a chunk grow with it, states between chunks shrink
BLOCK_BYTES = 1 << 26  # of a block of channels in float32: what bounds the memory beside inputs and outputs


def channel_blocks(u: Tensor) -> list[slice]:
    """Cuts the channels of u (B, L, H) into blocks of at most ``BLOCK_BYTES``, at least one channel each."""
    batch, length, channels = u.shape
    size = max(1, BLOCK_BYTES // max(1, 4 * batch * length))
    return [slice(first, min(first + size, channels)) for first in range(0, channels, size)]


def between(added: Tensor, first: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The states between chunks: x_0 = first, x_{j+1} = step x_j + added_j.

    Args:
        added: (H, B, J, 2 M) real and imaginary parts in turn.
        first: (H, B, 2 M).
        step: (H, M) complex.

    Returns:
        x_0 to x_{J-1} as ``added``, and x_J as ``first``.
    """
    joined = torch.cat([first[:, :, None], added], dim=2)
    joined = torch.view_as_complex(joined.unflatten(3, (-1, 2)).contiguous())
    states = torch.view_as_real(_Recurrence.apply(joined, step[:, None, None]))  # type: ignore[arg-type]
    states = states.flatten(3)
    return states[:, :, :-1], states[:, :, -1]


def diagonal_ssm(
    u: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    between: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = between,
) -> tuple[Tensor, Tensor]:
    """Of u (H, B, L): y (H, B, L) and the final state (B, H, M); ``between`` gives the states between chunks."""
    state = log_a.new_zeros(u.shape[1], *log_a.shape) if initial_state is None else initial_state
    state = torch.view_as_real(state.transpose(0, 1)).flatten(2)  # (H, B, 2 M): real and imaginary parts in turn

    def run(u: Tensor, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
        power = powers(log_a, size + 1)  # (H, M, T + 1)
        taps = (B * C)[:, None] @ power[:, :, :size]
        write = torch.view_as_real((B[:, :, None] * power[:, :, :size].flip(2)).transpose(1, 2)).flatten(2)
        out = 2 * C[:, :, None] * power[:, :, 1:]
        read = torch.stack([out.real, -out.imag], dim=2).flatten(1, 2)
        step = power[:, :, size]

        def scan(added: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
            return between(added, first, step)

        return run_chunks(u, state, 2 * taps[:, 0].real, write, read, scan)

    y, state = by_pieces(u, CHUNK, run, state)
    return y, torch.view_as_complex(state.unflatten(2, (-1, 2)).contiguous()).transpose(0, 1)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, H) -> (H, B, L), contiguous."""
    return x.permute(2, 0, 1).to(dtype).contiguous()


def put_rows(x: Tensor, to: Tensor) -> None:
    """(H, B, L) into ``to`` (B, L, H)."""
    to.copy_(x.permute(1, 2, 0))


class _Recurrence(torch.autograd.Function):
    """x_j = step x_{j-1} + added_j along dim 2, by doubling; its gradient is the same recurrence backwards."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, step: Tensor) -> Tensor:
        states = _doubling(added, step)
        ctx.save_for_backward(states, step)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        states, step = ctx.saved_tensors
        dadded = _doubling(grad.flip(2), step.conj()).flip(2)
        dstep = (dadded[:, :, 1:] * states[:, :, :-1].conj()).sum(dim=(1, 2), keepdim=True)
        return dadded, dstep


def _doubling(x: Tensor, step: Tensor) -> Tensor:
    reach = 1
    while reach < x.shape[2]:
        head = x[:, :, :reach]
        x = torch.cat([head, x[:, :, reach:] + step * x[:, :, :-reach]], dim=2)
        step, reach = step * step, 2 * reach
    return x
