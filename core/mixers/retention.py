"""Retention and linear attention: state space duality with a decay that the input has no say in.

Retention is the layer of RetNet (Sun et al. 2023, "Retentive network", section 2), linear attention that of
Katharopoulos et al. 2020 ("Transformers are RNNs", section 3). Both are SSD (Dao & Gu 2024, section 4.3) with dt = 1,
B = k, C = q and x = v: h_t = gamma h_{t-1} + v_t k_t^T, y_t = h_t q_t.

Legend: B batch, L length, D model width, H heads, E head width, N width of keys and queries, P width of values.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core.mixers.contract import decode_by_copy
from core.mixers.packed import run_packed
from core.mixers.rotary import rotate, rotation


class RetentionState(NamedTuple):
    """What retention and linear attention remember."""

    ssm: Tensor  # (B, H, P, N): float32, float64 for a float64 layer
    length: Tensor  # (B,) int64: tokens so far, the angle of the rotation


class _FixedDecay(nn.Module):
    """What the two have in common: sizes, the scan, and states.

    Args:
        d_model: D.
        num_heads: H.
        columns: P of the scan's state.
    """

    def __init__(self, d_model: int, num_heads: int, columns: int) -> None:
        super().__init__()
        self.d_model, self.num_heads, self.head_dim, self.columns = d_model, num_heads, d_model // num_heads, columns

    @abstractmethod
    def parts(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, L, H, N), v (B, L, H, P) and what the output needs besides, of tokens at positions (B or 1, L)."""

    @abstractmethod
    def output(self, y: Tensor, rest: Tensor) -> Tensor:
        """Maps y (B, L, H, P) to (B, L, D)."""

    @abstractmethod
    def log_decay(self) -> Tensor:
        """log gamma (H,), float32 at least."""

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype; zeros at padding.
        """
        if seq_idx is not None or cu_seqlens is not None:
            return run_packed(self, x, seq_idx, cu_seqlens)
        q, k, v, rest = self.parts(x, torch.arange(x.shape[1], device=x.device)[None])
        return self.output(self._scan(q, k, v, None, None, False)[0], rest)

    def forward_state(
        self, x: Tensor, state: RetentionState, lengths: Tensor | None = None
    ) -> tuple[Tensor, RetentionState]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row, 0 to L. Outputs at padding mean nothing.

        Returns:
            The output (B, L, D) and the state after the last real token of each row.
        """
        places = torch.arange(x.shape[1], device=x.device)
        q, k, v, rest = self.parts(x, state.length[:, None] + places)
        seq_idx = None if lengths is None else -(places >= lengths[:, None]).to(torch.int32)
        y, final = self._scan(q, k, v, state.ssm, seq_idx, True)
        length = state.length + (x.shape[1] if lengths is None else lengths)
        return self.output(y, rest), RetentionState(final.to(state.ssm.dtype), length)

    @torch.no_grad()
    def decode(self, x: Tensor, state: RetentionState) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``."""
        return decode_by_copy(self, x, state)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> RetentionState:
        """The state before the first token: zeros.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Accepted; the state is float32, float64 for a layer of float64 parameters.
            max_length: Accepted; the size of the state does not depend on it.
        """
        like = next(self.parameters())
        where = like.device if device is None else device
        wide = torch.float64 if (like.dtype if dtype is None else dtype) == torch.float64 else torch.float32
        size = (batch_size, self.num_heads, self.columns, self.head_dim)
        length = torch.zeros(batch_size, dtype=torch.int64, device=where)
        return RetentionState(torch.zeros(size, device=where, dtype=wide), length)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, seq_idx: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        dt = torch.ones(v.shape[:3], device=v.device, dtype=v.dtype)
        y, final, *_ = torch.ops.triscan.ssd(
            v, dt, self.log_decay(), k, q, None, None, None, None, initial, None, seq_idx,
            False, 0.0, math.inf, "sum", False, keep, "auto",
        )  # fmt: skip
        return y, final

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_heads={self.num_heads}"


class Retention(_FixedDecay):
    """Multi-scale retention, (B, L, D) -> (B, L, D), with one decay a head.

    q, k, v, g = in_proj(u); q, k turned by their positions (theta_i = 10000^(-2i/N)), k / sqrt(N);
    h_t = gamma_h h_{t-1} + v_t k_t^T; out = out_proj(silu(g) * norm(h_t q_t)), gamma_h = 1 - 2^(-5 - h), the norm over
    each head by itself, without parameters (Sun et al. 2023, equations 5 to 8; the published code's RMSNorm).

    Args:
        d_model: D.
        num_heads: H, a divisor of D with an even quotient.
        expand_v: The values of all heads together have expand_v * D channels.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        expand_v: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(d_model, num_heads)
        if (d_model // num_heads) % 2 or expand_v < 1:
            raise ValueError(
                f"num_heads and expand_v: got {num_heads} and {expand_v}, wanted heads of an even width, of pairs to "
                f"turn (d_model = {d_model}), and at least 1"
            )
        super().__init__(d_model, num_heads, expand_v * d_model // num_heads)
        self.expand_v = expand_v
        width = 2 * d_model + 2 * expand_v * d_model
        self.in_proj = nn.Linear(d_model, width, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(expand_v * d_model, d_model, bias=False, device=device, dtype=dtype)

    def log_decay(self) -> Tensor:
        """log(1 - 2^(-5 - h))."""
        weight = self.in_proj.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.log1p(-(2.0 ** (-5 - torch.arange(self.num_heads, device=weight.device, dtype=wide))))

    def parts(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the base class; besides, the gate."""
        sizes = [self.d_model, self.d_model, self.expand_v * self.d_model, self.expand_v * self.d_model]
        q, k, v, gate = self.in_proj(x).split(sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        cos, sin = (t[:, :, None] for t in rotation(positions, self.head_dim, 10000.0, q.dtype == torch.float64))
        q, k = (rotate(t, cos, sin, True) for t in (q, k))
        return q, k * self.head_dim**-0.5, v, gate

    def output(self, y: Tensor, rest: Tensor) -> Tensor:
        """See the base class."""
        y = F.rms_norm(y, (self.columns,), eps=1e-5).flatten(2)
        return self.out_proj(F.silu(rest) * y)


class LinearAttention(_FixedDecay):
    """Causal linear attention, (B, L, D) -> (B, L, D): a state that never decays.

    q, k, v = in_proj(u); w_ts = phi(q_t)^T phi(k_s) with phi(x) = elu(x) + 1;
    out = out_proj(sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts)
    (Katharopoulos et al. 2020, equations 7 and 9). The denominator is one more value, always 1.

    Args:
        d_model: D.
        num_heads: H, a divisor of D.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(d_model, num_heads)
        super().__init__(d_model, num_heads, d_model // num_heads + 1)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)

    def log_decay(self) -> Tensor:
        """Zeros."""
        wide = torch.float64 if self.in_proj.weight.dtype == torch.float64 else torch.float32
        return torch.zeros(self.num_heads, device=self.in_proj.weight.device, dtype=wide)

    def parts(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the base class; besides, nothing."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self.in_proj(x).chunk(3, dim=-1))
        if v.dtype == torch.float16:  # whose largest number the sum of a few thousand weights passes
            v = v.float()
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0), x

    def output(self, y: Tensor, rest: Tensor) -> Tensor:
        """See the base class."""
        total = y[..., -1:]
        total = torch.where(total == 0, 1, total)  # padding, whose 0 / 0 would be NaN in the gradients too
        return self.out_proj((y[..., :-1] / total).flatten(2).to(rest.dtype))


def _check(d_model: int, num_heads: int) -> None:
    if d_model < 1 or num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of d_model = {d_model}")
