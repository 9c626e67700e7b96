"""``Mamba`` and ``InferenceParams`` with the signatures of mamba_ssm.

Legend: B batch, L length, D model width, E inner width, N state, W convolution width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from core.mixers import mamba


@dataclass
class InferenceParams:
    """What decoding keeps between calls, with mamba_ssm's fields.

    Args:
        max_seqlen: Tokens that attention's caches have room for.
        max_batch_size: Rows.
        seqlen_offset: Tokens read so far; 0 starts every cache afresh. The caller counts it up.
        batch_size_offset: Accepted; 0.
        key_value_memory_dict: A layer's cache by its index.
        lengths_per_sample: Accepted; unused, as in Mamba layers.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begins another batch; the caches stay allocated."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0


class Params(Protocol):
    """The fields of ``InferenceParams`` that a layer reads, whoever defines them."""

    seqlen_offset: int
    key_value_memory_dict: dict[Any, Any]


class Mamba(mamba.Mamba):
    """The Mamba block with mamba_ssm's arguments and caches.

    Args:
        arguments: As in ``core.mixers.mamba.Mamba``, whose order is mamba_ssm's.
        use_fast_path: Accepted; there is one path, and it is the fast one.
        layer_idx: Key of this layer's cache in ``inference_params``.
        options: As ``arguments``, by name; an unknown one is a TypeError.
    """

    def __init__(
        self, *arguments: Any, use_fast_path: bool = True, layer_idx: int | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.layer_idx = layer_idx

    # The arguments by name: for help(), and for the language model, which checks its configuration against them.
    __signature__: ClassVar[inspect.Signature] = inspect.Signature(
        [
            *inspect.signature(mamba.Mamba).parameters.values(),
            *(p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY),
        ]
    )

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Params | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mixes (B, L, D); with ``inference_params`` it continues from this layer's cache and updates it in place.

        At ``seqlen_offset`` 0 the cache is started afresh; together with ``cu_seqlens`` it then gets one row for each
        packed sequence. After that any number of tokens may follow.
        """
        if inference_params is None:
            return super().forward(hidden_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        if self.layer_idx is None:
            raise ValueError("layer_idx: got None, wanted the key of this layer's cache; pass it to the constructor")
        pieces = None if cu_seqlens is None else hidden_states[0].split(cu_seqlens.diff().tolist())
        rows = hidden_states if pieces is None else nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(len(rows), 0)
        conv_state, ssm_state = caches[self.layer_idx]
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        if cu_seqlens is None:
            return self._continue(rows, conv_state, ssm_state)
        lengths = cu_seqlens.diff()
        y = self._continue(rows, conv_state, ssm_state, lengths)
        return torch.cat([row[:length] for row, length in zip(y, lengths.tolist(), strict=True)])[None]

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes one token.

        Args:
            hidden_states: (B, 1, D).
            conv_state: (B, E, W), updated in place; the newest input last.
            ssm_state: (B, E, N), updated in place.

        Returns:
            The output (B, 1, D) and the two states.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step: got {hidden_states.shape[1]} tokens, wanted 1; forward takes any number")
        return self._continue(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A cache of zeros: conv_state (B, E, W) and ssm_state (B, E, N).

        Args:
            batch_size: B.
            max_seqlen: Accepted; the size of the state does not depend on it.
            dtype: Of both. By default that of the parameters, and for the scan float32, in which it is computed.
            kwargs: Accepted, as in the original.
        """
        weight, ssm_state = self.conv1d.weight, self.init_state(batch_size).ssm
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        return conv_state, ssm_state if dtype is None else ssm_state.to(dtype)

    def _continue(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Runs x (B, L, D) from the two states and updates them in place."""
        # Copies: the backward pass needs the states as they were.
        conv = conv_state[:, :, 1:].mT.clone(memory_format=torch.contiguous_format)
        ssm = ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32), copy=True)
        y, after = self.forward_state(x, mamba.MambaState(conv, ssm), lengths)
        with torch.no_grad():
            # The cache has one column more than the layer needs, so the last inputs are worked out once more.
            tail = x[:, -self.d_conv :] if lengths is None else x
            count = torch.full((len(x),), tail.shape[1], device=x.device) if lengths is None else lengths
            inputs = self.in_proj(tail)[..., : self.d_inner]
            conv_state.copy_(mamba.last_inputs(inputs, conv_state.mT, count).mT)
            ssm_state.copy_(after.ssm)
        return y
