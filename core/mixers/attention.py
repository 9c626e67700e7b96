"""Softmax attention (Vaswani et al. 2017) with grouped keys, rotary positions and a cache, for hybrid models.

Legend: B batch, L length, D model width, H heads, K heads of keys and values, E head width, C = (H + 2 K) E projected
channels, W convolution width, M room in the cache, S packed sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core.mixers.mamba import last_inputs
from core.mixers.packed import zero_padding
from core.mixers.rotary import positions_of, rotate, rotation, sequence_numbers
from core.parallel.group import refuse


class AttentionState(NamedTuple):
    """What attention remembers of the sequence so far; it grows with each call."""

    conv: Tensor  # (B, W - 1, C): the last inputs of the convolution, oldest first; without one W - 1 = 0
    keys: Tensor  # (B, M, K, E), rotated
    values: Tensor  # (B, M, K, E)
    length: Tensor  # (B,) int64: how many of the M count, row by row


class AttentionCache(NamedTuple):
    """An ``AttentionState`` with room for M tokens from the start; it does not grow. Tokens beyond M are lost."""

    conv: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor


class Attention(nn.Module):
    """Multi-head attention with what the published hybrids put around it, (B, L, D) -> (B, L, D).

    q, k, v, mlp = in_proj(u); q, k, v = conv1d(q, k, v); q, k = rotary(q, k);
    out = out_proj([softmax(q k^T scale) v, m1 silu(m2)]) with [m1, m2] = mlp.

    Parameters have the names and shapes of mamba_ssm's ``MHA``.

    Args:
        embed_dim: D.
        num_heads: H.
        num_heads_kv: K, a divisor of H; each serves H / K heads (Ainslie et al. 2023). None: H.
        head_dim: E; None: D / H.
        mlp_dim: Channels of a gated MLP beside the heads, both halves together; rounded up to a multiple of 256.
        qkv_proj_bias: Whether in_proj has a bias.
        out_proj_bias: Whether out_proj has a bias.
        softmax_scale: Of q k^T; None: E^-1/2.
        causal: Whether a token sees the earlier ones only. States need it.
        d_conv: Width W of a causal convolution of q, k and v; 0: none.
        rotary_emb_dim: How many of E channels are rotated by position (Su et al. 2021), even.
        rotary_emb_base: Base of the rotation's wavelengths.
        rotary_emb_interleaved: Rotates channels (2i, 2i + 1) together, else (i, i + half).
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For sizes that do not fit.
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
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dim, num_heads, num_heads_kv, head_dim, mlp_dim, d_conv, rotary_emb_dim)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.mlp_dim = 256 * math.ceil(mlp_dim / 256)
        self.scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.causal, self.d_conv = causal, d_conv
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved

        self.qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        self.in_proj = nn.Linear(embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, device=device, dtype=dtype)
        self.conv1d: nn.Conv1d | None = None
        if d_conv > 0:  # holds weight (C, 1, W) and bias (C,); the convolution itself is kernels.causal_conv1d
            self.conv1d = nn.Conv1d(self.qkv_dim, self.qkv_dim, d_conv, groups=self.qkv_dim, device=device, dtype=dtype)
        inner = num_heads * self.head_dim + self.mlp_dim // 2
        self.out_proj = nn.Linear(inner, embed_dim, bias=out_proj_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Packed ones are kept apart by a mask, L^2 bytes a row.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype.
        """
        refuse("Attention")
        qkv, mlp = self._project(x)
        qkv, _ = self._conv(qkv, None, cu_seqlens, seq_idx, False)
        if seq_idx is None and cu_seqlens is None:
            q, k, v = self._heads(qkv, torch.arange(x.shape[1], device=x.device)[None])
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=self.causal, scale=self.scale,
                enable_gqa=self.num_heads != self.num_heads_kv,
            ).transpose(1, 2)  # fmt: skip
        else:
            numbers = sequence_numbers(x.shape[1], x.device, seq_idx, cu_seqlens)
            q, k, v = self._heads(qkv, positions_of(numbers))
            mask = numbers[:, :, None] == numbers[:, None, :]
            y = self._attend(q, k, v, mask.tril() if self.causal else mask)
        return self._output(y, mlp)

    def forward_state(
        self, x: Tensor, state: AttentionState | AttentionCache, lengths: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | AttentionCache]:
        """Continues sequences from ``state``.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is. An ``AttentionCache`` must have room for L
                tokens more in each row, which is not checked: that would wait for the device.
            lengths: (B,) number of real tokens of each right-padded row; each row then gives the numbers that it gives
                alone. Outputs at padding are arbitrary.

        Returns:
            (B, L, D) and the state after the last (real) token.
        """
        self._check_causal()
        qkv, mlp = self._project(x if lengths is None else zero_padding(x, lengths))
        if lengths is None:
            conv_qkv, conv = self._conv(qkv, state.conv, None, None, True)
            length = state.length + x.shape[1]
        else:
            conv_qkv, _ = self._conv(qkv, state.conv, None, None, False)
            conv = last_inputs(qkv, state.conv, lengths) if self.conv1d is not None else state.conv
            length = state.length + lengths
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        q, k, v = self._heads(conv_qkv, positions)
        room = x.shape[1] if isinstance(state, AttentionState) else 0
        keys, values = (_written(old, new, positions, room) for old, new in ((state.keys, k), (state.values, v)))
        y = self._attend_cache(q, keys, values, positions)
        return self._output(y, mlp), type(state)(conv.to(state.conv.dtype), keys, values, length)

    @torch.no_grad()
    def decode(self, x: Tensor, state: AttentionCache) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``.

        Args:
            x: (B, L, D).
            state: From ``init_state`` with a ``max_length``; its tensors are updated in place.

        Returns:
            (B, L, D).

        Raises:
            ValueError: For a state that grows.
        """
        self._check_causal()
        if not isinstance(state, AttentionCache):
            raise ValueError("decode: got a state without fixed room, wanted one from init_state(..., max_length=M)")
        qkv, mlp = self._project(x)
        if self.conv1d is not None:
            qkv = torch.ops.triscan.conv_update(
                qkv, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "", "auto"
            )
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        q, k, v = self._heads(qkv, positions)
        index = positions[:, :, None, None].expand(k.shape)
        state.keys.scatter_(1, index, k.to(state.keys.dtype))
        state.values.scatter_(1, index, v.to(state.values.dtype))
        state.length.add_(x.shape[1])
        return self._output(self._attend_cache(q, state.keys, state.values, positions), mlp)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> AttentionState | AttentionCache:
        """The state before the first token.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of keys, values and the convolution's inputs; the parameters' by default.
            max_length: Room M for so many tokens, an ``AttentionCache``. None: an ``AttentionState``, which grows.
        """
        device = self.in_proj.weight.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        conv = torch.zeros(batch_size, max(0, self.d_conv - 1), self.qkv_dim, device=device, dtype=dtype)
        shape = (batch_size, max_length or 0, self.num_heads_kv, self.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        kind = AttentionState if max_length is None else AttentionCache
        return kind(conv, keys, values, length)

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError("causal: got False, wanted True for a state: every token would see those to come")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q, k and v (B, L, C) before the convolution, and the MLP's two halves (B, L, mlp_dim)."""
        qkv, mlp = torch.split(self.in_proj(x), [self.qkv_dim, self.mlp_dim], dim=-1)
        return qkv, mlp

    def _conv(
        self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        if self.conv1d is None:
            return x, x.new_empty(0) if initial is None else initial
        return torch.ops.triscan.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, initial, cu_seqlens, seq_idx,
            "", False, keep, "auto",
        )  # fmt: skip

    def _heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, H, E), k and v (B, L, K, E); q and k rotated to positions (B or 1, L)."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = torch.split(heads, [self.num_heads, self.num_heads_kv, self.num_heads_kv], dim=2)
        if self.rotary_emb_dim > 0:
            cos, sin = rotation(positions, self.rotary_emb_dim, self.rotary_emb_base, q.dtype == torch.float64)
            cos, sin = cos[:, :, None], sin[:, :, None]
            q, k = (rotate(t, cos, sin, self.rotary_emb_interleaved) for t in (q, k))
        return q, k, v

    def _attend_cache(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Attention of q (B, L, H, E) at positions (B, L) to what the cache holds up to there."""
        mask = torch.arange(keys.shape[1], device=q.device) <= positions[:, :, None]
        return self._attend(q, keys.to(q.dtype), values.to(q.dtype), mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention under a mask (B, L, M). The heads that share keys become rows, so that no key is repeated."""
        batch, length, heads, width = q.shape
        shared = heads // self.num_heads_kv
        rows = q.unflatten(2, (self.num_heads_kv, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, K, H/K L, E)
        mask = mask.repeat(1, shared, 1)[:, None]
        y = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=self.scale)
        y = y.unflatten(2, (shared, length)).permute(0, 3, 1, 2, 4)
        return y.reshape(batch, length, heads, width)

    def _output(self, y: Tensor, mlp: Tensor) -> Tensor:
        """out_proj of the heads (B, L, H, E) and the gated MLP."""
        y = y.flatten(2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}, "
            f"head_dim={self.head_dim}, d_conv={self.d_conv}, rotary_emb_dim={self.rotary_emb_dim}, "
            f"causal={self.causal}"
        )


def _written(old: Tensor, new: Tensor, positions: Tensor, room: int) -> Tensor:
    """A copy of a cache (B, M, K, E), with ``room`` more, that holds ``new`` (B, L, K, E) at positions (B, L)."""
    wide = F.pad(old, (0, 0, 0, 0, 0, room)) if room else old
    return wide.scatter(1, positions[:, :, None, None].expand(new.shape), new.to(old.dtype))


def _check_sizes(
    embed_dim: int,
    num_heads: int,
    num_heads_kv: int | None,
    head_dim: int | None,
    mlp_dim: int,
    d_conv: int,
    rotary_emb_dim: int,
) -> None:
    for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("head_dim", head_dim)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, wanted at least 1")
    for name, value in (("mlp_dim", mlp_dim), ("d_conv", d_conv)):
        if value < 0:
            raise ValueError(f"{name}: got {value}, wanted at least 0")
    if num_heads_kv is not None and (num_heads_kv < 1 or num_heads % num_heads_kv):
        raise ValueError(f"num_heads_kv: got {num_heads_kv}, wanted a divisor of num_heads = {num_heads}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of embed_dim = {embed_dim}, or give head_dim")
    width = embed_dim // num_heads if head_dim is None else head_dim
    if not 0 <= rotary_emb_dim <= width or rotary_emb_dim % 2:
        raise ValueError(f"rotary_emb_dim: got {rotary_emb_dim}, wanted an even number up to the head's {width}")
