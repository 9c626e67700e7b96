"""What every mixer offers, as a type.

Legend: B batch, L length, D model width, S packed sequences.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


def decode_by_copy(mixer: Mixer, x: Tensor, state: Any) -> Tensor:
    """``Mixer.decode`` of a mixer whose ``forward_state`` does nothing that a CUDA graph could not hold."""
    y, after = mixer.forward_state(x, state)
    for kept, new in zip(state, after, strict=True):
        kept.copy_(new)
    return y


class Mixer(Protocol):
    """A layer that mixes a sequence, (B, L, D) -> (B, L, D), and can continue it from a state.

    Feeding a sequence whole, in pieces or token by token gives the same numbers. The state is the mixer's own kind of
    named tuple of tensors.
    """

    def __call__(self, x: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.
        """
        ...

    def forward_state(self, x: Tensor, state: Any, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Continues from ``state`` for any L; ``lengths`` (B,) counts the real tokens of right-padded rows.

        The state handed in stays as it is, and everything has gradients.
        """
        ...

    def decode(self, x: Tensor, state: Any) -> Tensor:
        """Continues from ``state`` by few tokens and leaves the state after them in the same tensors.

        For decoding: no gradients, no copies of the state, nothing waits for the device, so that a CUDA graph can hold
        the call. The numbers are those of ``forward_state``.
        """
        ...

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> Any:
        """The state before the first token.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of what the layer keeps of its inputs; the parameters' by default.
            max_length: Tokens that the state must have room for. Only attention, whose state grows, looks at it, and
                its ``decode`` needs it.
        """
        ...
