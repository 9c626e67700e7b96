"""``Mamba``, ``Mamba2`` and ``InferenceParams`` with the signatures of mamba_ssm.

Legend: B batch, L length, D model width, E inner width, H heads, P head dim, N state, C convolved channels,
W convolution width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from core.mixers import mamba, mamba2


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


class Cached(nn.Module):
    """What the two layers add to the plain ones: caches in mamba_ssm's layout, updated in place."""

    d_conv: int
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    layer_idx: int | None
    first_convolved: int  # of in_proj's outputs

    def read(self, x: Tensor, params: Params, lengths: Tensor | None = None) -> Tensor:
        """Mixes (B, L, D) from this layer's cache on, which is made or cleared at ``seqlen_offset`` 0."""
        if self.layer_idx is None:
            raise ValueError("layer_idx: got None, wanted the key of this layer's cache; pass it to the constructor")
        caches = params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(x.shape[0], 0)
        conv_state, ssm_state = caches[self.layer_idx]
        if params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        return self._continue(x, conv_state, ssm_state, lengths)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes one token.

        Args:
            hidden_states: (B, 1, D).
            conv_state: (B, C, W), updated in place; the newest input last.
            ssm_state: (B, E, N) or (B, H, P, N), updated in place.

        Returns:
            The output (B, 1, D) and the two states.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step: got {hidden_states.shape[1]} tokens, wanted 1; forward takes any number")
        return self._continue(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """A cache of zeros: conv_state (B, C, W) and ssm_state (B, E, N) or (B, H, P, N).

        Args:
            batch_size: B.
            max_seqlen: Accepted; the size of the state does not depend on it.
            dtype: Of both. By default that of the parameters, and for the scan float32, in which it is computed.
        """
        weight, ssm_state = self.conv1d.weight, cast(Any, self).init_state(batch_size).ssm
        conv_state = weight.new_zeros(batch_size, weight.shape[0], self.d_conv, dtype=dtype or weight.dtype)
        return conv_state, ssm_state if dtype is None else ssm_state.to(dtype)

    def _continue(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Runs x (B, L, D) from the two states and updates them in place."""
        # Copies: the backward pass needs the states as they were.
        conv = conv_state[:, :, 1:].mT.clone(memory_format=torch.contiguous_format)
        ssm = ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32), copy=True)
        plain = cast(Any, self)
        y, after = plain.forward_state(x, type(plain.init_state(0))(conv, ssm), lengths)
        with torch.no_grad():
            # The cache has one column more than the layer needs, so the last inputs are worked out once more.
            tail = x[:, -self.d_conv :] if lengths is None else x
            count = torch.full((len(x),), tail.shape[1], device=x.device) if lengths is None else lengths
            inputs = self.in_proj(tail)[..., self.first_convolved :][..., : conv_state.shape[1]]
            conv_state.copy_(mamba.last_inputs(inputs, conv_state.mT, count).mT)
            ssm_state.copy_(after.ssm)
        return y


def _signature(plain: type, init: Any) -> inspect.Signature:
    """The arguments by name: for help(), and for the language model, which checks its configuration against them."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*inspect.signature(plain).parameters.values(), *own])


class Mamba(Cached, mamba.Mamba):
    """The Mamba block with mamba_ssm's arguments and caches.

    Args:
        arguments: As in ``core.mixers.mamba.Mamba``, whose order is mamba_ssm's.
        use_fast_path: Accepted; there is one path, and it is the fast one.
        layer_idx: Key of this layer's cache in ``inference_params``.
        options: As ``arguments``, by name; an unknown one is a TypeError.
    """

    first_convolved = 0

    def __init__(
        self, *arguments: Any, use_fast_path: bool = True, layer_idx: int | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.layer_idx = layer_idx

    __signature__: ClassVar[inspect.Signature] = _signature(mamba.Mamba, __init__)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Params | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mixes (B, L, D); with ``inference_params`` it continues from this layer's cache and updates it in place.

        At ``seqlen_offset`` 0 the cache is started afresh. After that any number of tokens may follow.
        """
        if inference_params is None:
            return mamba.Mamba.forward(self, hidden_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        return self.read(hidden_states, inference_params)


class Mamba2(Cached, mamba2.Mamba2):
    """The Mamba-2 block with mamba_ssm's arguments and caches.

    Args:
        arguments: As in ``core.mixers.mamba2.Mamba2``, whose order is mamba_ssm's.
        chunk_size: Accepted; the scan chooses its own.
        use_mem_eff_path: Accepted; there is one path.
        layer_idx: Key of this layer's cache in ``inference_params``.
        process_group: None: there is no tensor parallelism.
        sequence_parallel: Accepted; without a process group it means nothing.
        options: As ``arguments``, by name; an unknown one is a TypeError.
    """

    def __init__(
        self,
        *arguments: Any,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        **options: Any,
    ) -> None:
        if process_group is not None:
            raise ValueError("process_group: got one, wanted None; layers are not split over devices here")
        super().__init__(*arguments, **options)
        self.layer_idx = layer_idx
        self.first_convolved = 2 * self.d_mlp + self.d_ssm

    __signature__: ClassVar[inspect.Signature] = _signature(mamba2.Mamba2, __init__)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Params | None = None,
    ) -> Tensor:
        """Mixes (B, L, D), or with ``seqlen`` the rows (B seqlen, D); ``inference_params`` as in ``Mamba``."""
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            y = mamba2.Mamba2.forward(self, x, seq_idx, cu_seqlens)
        else:
            y = self.read(x, inference_params)
        return y if seqlen is None else y.flatten(0, 1)
