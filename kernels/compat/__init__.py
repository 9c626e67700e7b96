"""The functions of ``mamba_ssm`` and ``causal_conv1d`` with their argument order and ``(B, D, L)`` layouts.

Existing code switches by an import. Beyond the originals: they run on any device and dtype, states have gradients,
``seq_idx`` goes together with states, and any width is accepted. What has no counterpart here is refused by name.
Inside, everything is channel-last: outputs are views of ``(B, L, D)`` tensors, so that ``x.transpose(1, 2)`` of a
contiguous ``(B, L, D)`` is the layout that costs least, and a caller who can, calls ``kernels.selective_scan`` and its
neighbours directly.
"""

from kernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from kernels.compat.norm import layer_norm_fn, layernorm_fn, rms_norm_fn, rmsnorm_fn
from kernels.compat.selective_scan import mamba_inner_fn, selective_scan_fn
from kernels.compat.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from kernels.compat.state_update import selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "layer_norm_fn",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
