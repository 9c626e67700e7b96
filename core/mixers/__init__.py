"""Layers that mix a sequence, (B, L, D) -> (B, L, D).

Every mixer has ``forward(x, *, seq_idx=None, cu_seqlens=None)`` for whole sequences, ``forward_state(x, state,
lengths=None)`` that continues from a state, for any L, and ``init_state(batch_size, device=None, dtype=None)``. A
sequence fed whole, in pieces or token by token gives the same numbers.
"""

from core.mixers.mamba import Mamba, MambaState

__all__ = ["Mamba", "MambaState"]
