"""``MHA`` with the signature and caches of ``mamba_ssm.modules``; see ``core.compat_mixers``.

Legend: B batch, L length, D model width, K heads of keys, E head width, C = (H + 2 K) E projected channels, W
convolution width, M room in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.compat_mixers import cache_of, column_before
from core.mixers import attention


class MHA(attention.Attention):
    """Attention with mamba_ssm's arguments and caches; see ``core.mixers.attention.Attention``.

    Args:
        layer_idx: Key of this layer's cache in ``inference_params``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_heads_kv, head_dim, mlp_dim, qkv_proj_bias, out_proj_bias, softmax_scale, causal,
            d_conv, rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, device=device, dtype=dtype,
        )  # fmt: skip
        self.layer_idx = layer_idx

    def forward(
        self,
        x: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mixes (B, L, D); with ``inference_params`` it continues from this layer's cache and updates it in place.

        The fields that are read: ``max_seqlen``, ``seqlen_offset``, ``key_value_memory_dict`` and, where there is one
        that is not None, ``lengths_per_sample`` (B,). A cache has no gradients.
        """
        if inference_params is None:
            return super().forward(x, seq_idx, cu_seqlens)
        room, offset = inference_params.max_seqlen, inference_params.seqlen_offset
        kv_cache, conv_state = cache_of(
            inference_params, self.layer_idx, lambda: self.allocate_inference_cache(x.shape[0], room, x.dtype)
        )
        lengths = getattr(inference_params, "lengths_per_sample", None)
        end = kv_cache.shape[1]
        if lengths is None:
            if offset + x.shape[1] > end:
                raise ValueError(f"max_seqlen: got room for {end} tokens, wanted {offset + x.shape[1]}")
            end, lengths = offset + x.shape[1], torch.full((x.shape[0],), offset, device=x.device)
        keys, values = kv_cache[: x.shape[0], :end].unbind(2)
        if conv_state is None:
            conv = x.new_zeros(x.shape[0], 0, self.qkv_dim)
            return self.decode(x, attention.AttentionCache(conv, keys, values, lengths.long().clone()))
        if offset == 0:
            conv_state.zero_()
        with torch.no_grad():
            oldest = column_before(conv_state, lambda x: self._project(x)[0], x)
        conv = conv_state[:, :, 1:].mT
        y = self.decode(x, attention.AttentionCache(conv, keys, values, lengths.long().clone()))
        conv_state[:, :, 0] = oldest
        return y

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """kv_cache (B, M, 2, K, E) and conv_state (B, C, W), None without a convolution; zeros."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        conv_state = None
        if self.d_conv > 0:
            conv_state = weight.new_zeros(batch_size, self.qkv_dim, self.d_conv, dtype=dtype)
        return weight.new_zeros(shape, dtype=dtype), conv_state
