"""Hyena, a gated long convolution whose filter is a small network of the position (Poli et al. 2023, section 3).

Legend: B batch, L length, D model width, O order, T inputs seen before, M taps of a filter, W width of the short
filter, C = D (O - 1) filter channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core.mixers.hyena_filter import HyenaFilter, circular_convolution, long_convolution
from core.mixers.mamba import last_inputs
from core.mixers.packed import run_packed, zero_padding
from core.parallel.group import refuse
from kernels.long_convolution import gated_convolution, takes

ACTIVATIONS = {"id": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
# Arguments of the published operator that have one value here, and why no other.
FIXED = {
    "num_heads": (1, "the published operator splits channels wrongly with more"),
    "inner_factor": (1, "the published operator projects to one width only"),
    "num_blocks": (1, "blocks would not see each other; shorten l_max instead"),
    "outer_mixing": (False, "no published model mixes heads"),
    "post_order_ffn": (False, "no published model mixes heads"),
    "return_state": (False, "states come from forward_state"),
    "filter_cls": ("hyena-filter", "this is the filter of Hyena"),
    "linear_mixer": (False, "the filter is a network of num_inner_mlps + 2 layers"),
}


class HyenaState(NamedTuple):
    """What a Hyena layer remembers: everything, since its filter is as long as the sequence."""

    conv: Tensor  # (B, W - 1, D (O + 1)): the last inputs of the short filter, oldest first
    inputs: Tensor  # (B, T, C): the inputs of the long convolutions, each row's last one at the end, zeros before
    seen: Tensor  # (B,) int64: how many of them are the row's own
    taps: Tensor  # (M, C): the filter as far as it was computed


class Hyena(nn.Module):
    """Mixes a sequence by gates and long convolutions, (B, L, D) -> (B, L, D), for L up to ``l_max``.

    x_0, ..., x_{O-1}, v = short_filter(in_proj(u)); v = h_o * (v x_i) + b_o (v x_i) for each order o, from the last
    gate x_{O-1} to x_1; out = out_proj(v x_0) (Poli et al. 2023, definition 3.1). ``*`` is causal, by FFT in float32.

    Parameters have the published names and shapes, and the arguments are the published ones: those that only choose an
    implementation change nothing, and those that no published model sets are refused by name for any other value.

    Args:
        d_model: Width D.
        l_max: Longest sequence. The filter's time is normalised by it, so that it is part of the weights.
        order: O, at least 2.
        filter_order: Width of the filter's network.
        num_heads: 1.
        inner_factor: 1.
        num_blocks: 1.
        fused_bias_fc: Accepted; the function is the same.
        outer_mixing: False.
        dropout: Dropout of the long convolutions' inputs.
        filter_dropout: Accepted; the published filter has no dropout either.
        filter_cls: "hyena-filter".
        post_order_ffn: False.
        jit_filter: Accepted; the function is the same.
        short_filter_order: Width W of the short filter.
        activation: Of the gated sum before out_proj: "id", "relu", "gelu", "silu" or "tanh".
        return_state: False.
        emb_dim: Features of the position, odd and at least 3.
        fused_fft_conv: Accepted; the function is the same.
        lr: Kept as the parameters' ``_optim`` mark.
        lr_pos_emb: The same for the features of the position, which are constants where it is 0.
        w: Initial frequency of the sines.
        wd: Weight decay of the filter; 0 marks its parameters ``_no_weight_decay``.
        bias: Whether the long convolutions have the term b_o.
        num_inner_mlps: Hidden layers of the filter beyond the first.
        linear_mixer: False.
        modulate: Multiply the filter by a decaying window.
        normalized: Divide the filter at each position by the sum of its channels' magnitudes.
        bidirectional: The published, circular two-sided convolution. It has no state.
        fast_decay_pct: The fastest window has decayed to ``target`` at this share of l_max.
        slow_decay_pct: The same for the slowest one.
        target: See there.
        modulation_lr: The windows' rates are constants where it is 0.
        shift: Added to the windows.
        train_freq: Whether the sines' frequencies are trained.
        device: Where the parameters live.
        dtype: Their dtype; the filter is computed in float32 at least.

    Raises:
        ValueError: For a value that does not fit or is not supported, by name.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        order: int = 2,
        filter_order: int = 64,
        num_heads: int = 1,
        inner_factor: int = 1,
        num_blocks: int = 1,
        fused_bias_fc: bool = False,
        outer_mixing: bool = False,
        dropout: float = 0.0,
        filter_dropout: float = 0.0,
        filter_cls: str = "hyena-filter",
        post_order_ffn: bool = False,
        jit_filter: bool = False,
        short_filter_order: int = 3,
        activation: str = "id",
        return_state: bool = False,
        emb_dim: int = 3,
        fused_fft_conv: bool = False,
        lr: float = 1e-3,
        lr_pos_emb: float = 1e-5,
        w: float = 1.0,
        wd: float = 0.0,
        bias: bool = True,
        num_inner_mlps: int = 2,
        linear_mixer: bool = False,
        modulate: bool = True,
        normalized: bool = False,
        bidirectional: bool = False,
        fast_decay_pct: float = 0.3,
        slow_decay_pct: float = 1.5,
        target: float = 1e-2,
        modulation_lr: float = 0.0,
        shift: float = 0.05,
        train_freq: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = locals()
        for name, (value, reason) in FIXED.items():
            if given[name] != value:
                raise ValueError(f"{name}: got {given[name]!r}, wanted {value!r}: {reason}")
        for name, least in (("d_model", 1), ("l_max", 1), ("order", 2), ("filter_order", 1), ("short_filter_order", 1)):
            if given[name] < least:
                raise ValueError(f"{name}: got {given[name]}, wanted at least {least}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        self.d_model, self.l_max, self.order, self.bidirectional = d_model, l_max, order, bidirectional
        width = d_model * (order + 1)
        self.in_proj = nn.Linear(d_model, width, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        # Holds weight (width, 1, W) and bias; the convolution itself is kernels.causal_conv1d.
        self.short_filter = nn.Conv1d(width, width, short_filter_order, groups=width, device=device, dtype=dtype)
        self.filter_fn = HyenaFilter(
            d_model * (order - 1), l_max, emb_dim, filter_order, lr, lr_pos_emb, w, wd, bias, num_inner_mlps, modulate,
            normalized, fast_decay_pct, slow_decay_pct, target, modulation_lr, shift, train_freq,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype; zeros at padding.

        Raises:
            ValueError: If a sequence is longer than ``l_max``.
        """
        refuse("Hyena")
        if seq_idx is not None or cu_seqlens is not None:
            return run_packed(self, x, seq_idx, cu_seqlens)
        self._check_length(x.shape[1])
        u, _ = self._short(self.in_proj(x), None, False)
        taps = self.filter_fn.filter(x.shape[1])
        idle = not self.training or self.dropout.p == 0
        if self.order == 2 and not self.bidirectional and idle and takes(u, taps):
            bias = self.filter_fn.bias if self.filter_fn.use_bias else None
            return self.out_proj(self.activation(gated_convolution(u, taps, bias)))
        return self._mix(u, None, taps)[0]

    def forward_state(self, x: Tensor, state: HyenaState, lengths: Tensor | None = None) -> tuple[Tensor, HyenaState]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step, at a cost that grows with T.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row, 0 to L. Outputs at padding mean nothing.

        Returns:
            The output (B, L, D) and the state after the last real token of each row.

        Raises:
            ValueError: Past ``l_max`` inputs, and for a bidirectional layer.
        """
        if self.bidirectional:
            raise ValueError("forward_state: a bidirectional Hyena sees what follows, and has no state; use forward")
        before, length = state.inputs.shape[1], x.shape[1]
        self._check_length(before + length)
        taps = state.taps
        if taps.shape[0] < before + length:  # by doubling, so that decoding computes the filter a few times only
            taps = self.filter_fn.filter(min(max(before + length, 2 * before), self.l_max))
        u = self.in_proj(x if lengths is None else zero_padding(x, lengths))
        short, conv = self._short(u, state.conv, True)
        y, inputs = self._mix(short, state.inputs, taps[: before + length])
        seen = state.seen + length
        if lengths is not None:
            conv, seen = last_inputs(u, state.conv, lengths), state.seen + lengths
            inputs = _end_at(inputs, before + lengths, int(seen.max()))
        return y, HyenaState(conv.to(state.conv.dtype), inputs, seen, taps)

    def decode(self, x: Tensor, state: HyenaState) -> Tensor:
        """Not possible; see ``Mixer.decode``.

        Raises:
            ValueError: Always: the state grows with each token, and cannot be updated in place.
        """
        raise ValueError("decode: a Hyena's state grows with each token; use forward_state")

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> HyenaState:
        """The state before the first token: nothing seen.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of the inputs that are kept; the parameters' by default.
            max_length: Accepted; the state grows by itself.
        """
        device = self.in_proj.weight.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        width, channels = self.short_filter.weight.shape[0], self.d_model * (self.order - 1)
        conv = torch.zeros(batch_size, self.short_filter.kernel_size[0] - 1, width, device=device, dtype=dtype)
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        inputs = torch.zeros(batch_size, 0, channels, device=device, dtype=dtype)
        return HyenaState(conv, inputs, seen, self.filter_fn.filter(0))

    def _short(self, x: Tensor, initial: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        weight = self.short_filter.weight.squeeze(1)
        return torch.ops.triscan.causal_conv1d(
            x, weight, self.short_filter.bias, None, initial, None, None, "", False, keep, "auto"
        )

    def _mix(self, u: Tensor, before: Tensor | None, taps: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and long convolutions of u (B, L, D (O + 1)), after inputs ``before`` (B, T, C)."""
        *gates, v = u.split(self.d_model, dim=-1)
        kept = []
        for o, gate in enumerate(reversed(gates[1:])):
            channels = slice(o * self.d_model, (o + 1) * self.d_model)
            v = self.dropout(v * gate)
            joined = v if before is None else torch.cat([before[..., channels].to(v.dtype), v], dim=1)
            kept.append(joined)
            convolve = circular_convolution if self.bidirectional else long_convolution
            y = convolve(joined, taps[:, channels], v.shape[1])
            v = self.filter_fn.add_bias(y, v, channels)
        y = self.out_proj(self.activation(v * gates[0]))
        return y, torch.cat(kept, dim=-1) if before is not None else v

    def _check_length(self, length: int) -> None:
        if length > self.l_max:
            raise ValueError(
                f"Hyena: got {length:,} positions, wanted at most l_max = {self.l_max:,}: the filter is defined no "
                "further; cut the sequence, or build the layer with a longer l_max"
            )

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, l_max={self.l_max}, order={self.order}"


def _end_at(inputs: Tensor, ends: Tensor, keep: int) -> Tensor:
    """Moves each row of inputs (B, T, C) to the right so that position ``ends`` (B,) is the end; keeps ``keep``."""
    index = ends[:, None] - keep + torch.arange(keep, device=inputs.device)
    moved = inputs.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, inputs.shape[2]))
    return moved.masked_fill((index < 0)[:, :, None], 0)
