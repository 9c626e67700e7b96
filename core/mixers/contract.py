"""What every mixer offers, as a type.

Legend: B batch, L length, D model width, S packed sequences.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


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
        """Continues from ``state`` for any L; ``lengths`` (B,) counts the real tokens of right-padded rows."""
        ...

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first token."""
        ...
