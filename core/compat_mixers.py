"""``Mamba2`` and ``Mamba2Simple`` with the signatures and caches of ``mamba_ssm.modules``.

Parameters, checkpoints and results are the same. Beyond the originals a cache accepts several tokens at a time, and a
step has gradients. What only tells the original's kernels how to run (``chunk_size``, ``use_mem_eff_path``) is accepted
and changes nothing.

Legend: B batch, L length, D model width, C channels of the convolution, H heads, P head dim, N state, W convolution
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from core.mixers import mamba2
from kernels.compat import causal_conv1d_varlen_states

FEW = 4  # tokens that a cache takes one after the other; more go through the scan


class InferenceParams(Protocol):
    """What callers hand over to decode: mamba_ssm's ``InferenceParams`` or anything with these fields."""

    seqlen_offset: int
    key_value_memory_dict: dict[Any, Any]


def cache_of(params: InferenceParams, layer_idx: int | None, allocate: Callable[[], Any]) -> Any:
    """This layer's cache, made if it is not there."""
    if layer_idx is None:
        raise ValueError("layer_idx: got None, wanted the key of this layer's cache; pass it to the constructor")
    caches = params.key_value_memory_dict
    if layer_idx not in caches:
        caches[layer_idx] = allocate()
    return caches[layer_idx]


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: got a value, wanted None; layers are not split over processes here, use DDP")


def column_before(conv_state: Tensor, project: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The input of the convolution W tokens back once x has passed: column 0 of a cache, which no layer reads."""
    width, length = conv_state.shape[2], x.shape[1]
    if length < width:
        return conv_state[:, :, length].clone()
    return project(x[:, length - width : length - width + 1])[:, 0]


class Mamba2(mamba2.Mamba2):
    """The Mamba-2 block with mamba_ssm's arguments and caches; see ``core.mixers.mamba2.Mamba2``.

    Args:
        layer_idx: Key of this layer's cache in ``inference_params``.
        process_group: Only None.
        chunk_size, use_mem_eff_path, sequence_parallel: Accepted.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse(process_group=process_group)
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, d_ssm, ngroups, A_init_range, D_has_hdim, rmsnorm,
            norm_before_gate, dt_min, dt_max, dt_init_floor, dt_limit, bias, conv_bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.layer_idx = layer_idx

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mixes (B, L, D), or (B L, D) with ``seqlen`` L; with ``inference_params`` it continues from the cache.

        At ``seqlen_offset`` 0 the cache is started afresh; together with ``cu_seqlens`` it then gets one row for each
        packed sequence. After that any number of tokens may follow.
        """
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            y = super().forward(x, seq_idx, cu_seqlens)
        else:
            y = self._forward_cached(x, cu_seqlens, inference_params)
        return y if seqlen is None else y.flatten(0, 1)

    def _forward_cached(self, x: Tensor, cu_seqlens: Tensor | None, params: InferenceParams) -> Tensor:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        conv_state, ssm_state = cache_of(params, self.layer_idx, lambda: self.allocate_inference_cache(rows, 0))
        if params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
            if cu_seqlens is not None:
                return self._fill(x, cu_seqlens, conv_state, ssm_state)
        return self._continue(x, conv_state, ssm_state)

    def _fill(self, x: Tensor, cu_seqlens: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Runs packed prompts (1, L, D) and leaves the states after each in a row of the cache."""
        mlp, z, xbc, dt = self._project(x)
        conv_state.copy_(causal_conv1d_varlen_states(xbc[0].detach(), cu_seqlens, self.d_conv))
        xbc, _ = self._conv(xbc, None, cu_seqlens, None, False)
        y, states = self._scan(xbc, z, dt, None, cu_seqlens, None, True)
        ssm_state.copy_(states.detach())
        return self._output(mlp, y, z)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes one token.

        Args:
            hidden_states: (B, 1, D).
            conv_state: (B, C, W), updated in place; the newest input last.
            ssm_state: (B, H, P, N), updated in place.

        Returns:
            The output (B, 1, D) and the two states.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step: got {hidden_states.shape[1]} tokens, wanted 1; forward takes any number")
        return self._continue(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A cache of zeros: conv_state (B, C, W) and ssm_state (B, H, P, N).

        Args:
            batch_size: B.
            max_seqlen: Accepted; the size of the state does not depend on it.
            dtype: Of both. By default that of the parameters, and for the scan float32, in which it is computed.
            kwargs: Accepted, as in the original.
        """
        state = self.init_state(batch_size, dtype=dtype or self.in_proj.weight.dtype)
        conv = state.conv.new_zeros(batch_size, self.d_conv, self.conv_dim).mT
        return conv, torch.zeros_like(state.ssm, dtype=dtype or state.ssm.dtype)

    def _continue(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Runs x (B, L, D) from the two states and updates them in place."""
        with torch.no_grad():
            oldest = column_before(conv_state, lambda x: self._project(x)[2], x)
        if x.shape[1] <= FEW and not torch.is_grad_enabled():
            y = self.decode(x, mamba2.Mamba2State(conv_state[:, :, 1:].mT, ssm_state))
        else:  # copies: the backward pass needs the states as they were
            before = mamba2.Mamba2State(conv_state[:, :, 1:].mT.clone(), ssm_state.clone())
            y, after = self.forward_state(x, before)
            conv_state[:, :, 1:] = after.conv.detach().mT
            ssm_state.copy_(after.ssm.detach())
        conv_state[:, :, 0] = oldest
        return y


class Mamba2Simple(mamba2.Mamba2):
    """The plain Mamba-2 block with mamba_ssm's arguments; see ``core.mixers.mamba2.Mamba2``.

    The norm works on groups of channels, as in ``Mamba2``; the original takes them all together.

    Args:
        activation: "swish" or "silu", the same.
        chunk_size, use_mem_eff_path, layer_idx: Accepted.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ("silu", "swish"):
            raise ValueError(f"activation: got {activation!r}, wanted 'silu' or 'swish'")
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, None, ngroups, A_init_range, False, True, False,
            dt_min, dt_max, dt_init_floor, dt_limit, bias, conv_bias, learnable_init_states=learnable_init_states,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.layer_idx = layer_idx
