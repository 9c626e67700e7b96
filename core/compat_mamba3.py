"""``Mamba3`` with the signature and caches of ``mamba_ssm.modules``; see ``core.compat_mixers``.

Legend: B batch, L length, D model width, H heads, P head dim, N state, R rank, S rotated pairs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from core.compat_mixers import FEW, InferenceParams, cache_of
from core.mixers import mamba3


class Mamba3(mamba3.Mamba3):
    """The Mamba-3 block with mamba_ssm's arguments and caches; see ``core.mixers.mamba3.Mamba3``.

    Args:
        layer_idx: Key of this layer's cache in ``inference_params``.
        chunk_size, dropout, n_layer: Accepted.
        a_activation: By default what mamba_ssm 2.3.2 computes. Weights trained before June 2026 want "softplus".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        a_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
    ) -> None:
        super().__init__(
            d_model, d_state, expand, headdim, ngroups, rope_fraction, dt_min, dt_max, dt_init_floor, A_floor,
            is_outproj_norm, is_mimo, mimo_rank, a_activation=a_activation, device=device, dtype=dtype,
        )  # fmt: skip
        self.layer_idx = layer_idx

    def forward(
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mixes (B, L, D); with ``inference_params`` it continues from this layer's cache and updates it in place.

        At ``seqlen_offset`` 0 the cache is started afresh. After that any number of tokens may follow.
        """
        if inference_params is None:
            return super().forward(u, seq_idx, cu_seqlens)
        if seq_idx is not None or cu_seqlens is not None:
            raise ValueError("inference_params: got seq_idx or cu_seqlens too, wanted one sequence a row in a cache")
        states = cache_of(inference_params, self.layer_idx, lambda: self.allocate_inference_cache(u.shape[0], 0))
        if inference_params.seqlen_offset == 0:
            for state in states:
                state.zero_()
        return self._continue(u, *states)

    def step(
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Decodes one token; the states are updated in place.

        Args:
            u: (B, D) or (B, 1, D).
            angle_state: (B, H, S).
            ssm_state: (B, H, P, N).
            k_state: (B, R, H, N).
            v_state: (B, H, P).
            kwargs: Accepted, as in the original.

        Returns:
            The output in the shape of u and the four states.
        """
        if u.ndim == 3 and u.shape[1] != 1:
            raise ValueError(f"step: got {u.shape[1]} tokens, wanted 1; forward takes any number")
        x = u if u.ndim == 3 else u.unsqueeze(1)
        y = self._continue(x, angle_state, ssm_state, k_state, v_state)
        return y.view(u.shape), angle_state, ssm_state, k_state, v_state

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A cache of zeros in the order of ``step``'s arguments; ``max_seqlen`` and ``kwargs`` are accepted."""
        state = self.init_state(batch_size, device, dtype)
        return state.angle, state.ssm, state.k, state.v

    def _continue(self, x: Tensor, *states: Tensor) -> Tensor:
        """Runs x (B, L, D) from the four states and updates them in place."""
        if x.shape[1] <= FEW and not torch.is_grad_enabled():
            return self.decode(x, mamba3.Mamba3State(*states))
        before = mamba3.Mamba3State(*(t.clone() for t in states))  # the backward pass needs them as they were
        y, after = self.forward_state(x, before)
        for old, new in zip(states, after, strict=True):
            old.copy_(new.detach())
        return y
