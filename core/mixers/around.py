"""What the blocks around a transformation of ``core.mixers.inner`` have in common: states, packing, unequal rows.

Legend: B batch, L length, D model width, E channels of the transformation, C channels of the convolution, W its width,
S packed sequences.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core.mixers.inner import Inner
from core.mixers.packed import run_packed, zero_padding


class AroundState(NamedTuple):
    """What a block remembers of the sequence so far."""

    conv: Tensor  # (B, W - 1, C): the last inputs of the convolution, oldest first
    inner: Tensor  # (B, ...): the transformation's own


class Around(nn.Module):
    """A block that projects, convolves shortly, runs a transformation and gates, (B, L, D) -> (B, L, D).

    A block gives ``before``, ``between`` and ``after``, and these attributes: ``inner`` and ``conv1d``, None for none.
    """

    inner: Inner
    conv1d: nn.Conv1d | None
    activation: str = ""  # of the convolution

    @abstractmethod
    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x (B, L, D) to the convolution's input (B, L, C) and what passes by it."""

    @abstractmethod
    def between(self, convolved: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
        """Maps these to the transformation's input (B, L, E) and the gate."""

    @abstractmethod
    def after(self, y: Tensor, gate: Tensor) -> Tensor:
        """Maps the transformation's output (B, L, E) and the gate to (B, L, D)."""

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
        to_conv, passed = self.before(x)
        u, gate = self.between(self._conv(to_conv, None, False)[0], passed)
        return self.after(self.inner.run(u, None)[0], gate)

    def forward_state(self, x: Tensor, state: AroundState, lengths: Tensor | None = None) -> tuple[Tensor, AroundState]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row, 0 to L. Outputs at padding mean nothing. The
                rows then run one after the other.

        Returns:
            The output (B, L, D) and the state after the last real token of each row.
        """
        if lengths is not None:
            return self._rows(x, state, lengths)
        to_conv, passed = self.before(x)
        convolved, conv = self._conv(to_conv, state.conv, True)
        u, gate = self.between(convolved, passed)
        y, inner = self.inner.run(u, state.inner)
        assert inner is not None
        return self.after(y, gate), AroundState(conv.to(state.conv.dtype), inner)

    @torch.no_grad()
    def decode(self, x: Tensor, state: AroundState) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``.

        Raises:
            ValueError: For a transformation whose state grows.
        """
        to_conv, passed = self.before(x)
        convolved, conv = self._conv(to_conv, state.conv, True)
        state.conv.copy_(conv)
        u, gate = self.between(convolved, passed)
        return self.after(self.inner.steps(u, state.inner), gate)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> AroundState:
        """The state before the first token: zeros.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of the convolution's part; the parameters' by default.
            max_length: Accepted; a state that grows does so by itself.
        """
        like = next(p for name, p in self.named_parameters() if name.endswith("_proj.weight"))
        where = torch.device(like.device if device is None else device)
        dtype = like.dtype if dtype is None else dtype
        width, channels = (1, 0) if self.conv1d is None else (self.conv1d.kernel_size[0], self.conv1d.in_channels)
        conv = torch.zeros(batch_size, width - 1, channels, device=where, dtype=dtype)
        return AroundState(conv, self.inner.start(batch_size, where, dtype))

    def _conv(self, x: Tensor, initial: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        if self.conv1d is None:
            return x, x.new_empty(0) if initial is None else initial
        return torch.ops.triscan.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, initial, None, None, self.activation, False, keep,
            "auto",
        )  # fmt: skip

    def _rows(self, x: Tensor, state: AroundState, lengths: Tensor) -> tuple[Tensor, AroundState]:
        """Row by row where they end apart: each state has to stop at its own end."""
        if state.inner.ndim == 3 and state.inner.shape[1] == 0:
            raise ValueError("lengths: a transformation whose state grows takes rows of one length; pass them apart")
        x = zero_padding(x, lengths)
        y, _ = self.forward_state(x, state)
        after = []
        for row, length in enumerate(lengths.tolist()):
            here = slice(row, row + 1)
            alone = AroundState(state.conv[here], state.inner[here])
            after.append(self.forward_state(x[here, :length], alone)[1] if length else alone)
        return y, AroundState(*(torch.cat(parts) for parts in zip(*after, strict=True)))
