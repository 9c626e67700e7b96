"""The published function by ours, and the reference that its tests import."""

import torch
from torch import Tensor

from kernels.compat import causal_conv1d_varlen_states

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last rows of each sequence of ``x (tokens, D)`` behind zeros, ``(sequences, D, state_len)``."""
    sequences = x.split(cu_seqlens.diff().tolist())
    zeros = x.new_zeros(state_len, x.shape[1])
    return torch.stack([torch.cat([zeros, sequence])[-state_len:].t() for sequence in sequences])
