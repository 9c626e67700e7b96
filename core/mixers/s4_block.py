"""The block of S4 (Gu et al. 2021, section 3.4) around a state space on each channel.

Legend: B batch, L length, D model width, N real states of a channel, M = N/2 complex ones.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.mixers.hyena_filter import long_convolution
from core.mixers.packed import run_packed, zero_padding


class S4State(NamedTuple):
    """What a layer of the S4 family remembers."""

    ssm: Tensor  # (B, D, M, 2): real and imaginary parts, float32, float64 for a float64 layer


class StateSpace(Protocol):
    """A time-invariant state space on each of D channels, whose states come in conjugate pairs."""

    d_state: int

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs (B, L, D) from a state (B, D, M, 2), or from zeros; returns y (B, L, D) and the state afterwards."""
        ...

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """Runs few tokens and leaves the state after them in the same tensor."""
        ...

    def taps(self, length: int) -> Tensor:
        """The system as a convolution kernel (D, L)."""
        ...


def after_rows(space: StateSpace, u: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
    """The states (B, D, M, 2) after the ``lengths`` (B,) real inputs of right-padded rows u (B, L, D), row by row."""
    rows = [(slice(row, row + 1), length) for row, length in enumerate(lengths.tolist())]
    return torch.cat([space.run(u[here, :length], state[here])[1] for here, length in rows])


class S4Block(nn.Module):
    """The block around a state space, (B, L, D) -> (B, L, D): out = GLU(output_linear(GELU(SSM(u) + D u))).

    Args:
        d_model: Width D.
        kernel: The state space.
        glu: Whether the output is gated; without it the output is linear.
        dropout: Probability, after the GELU.
        method: How whole sequences run: "scan", in chunks by matrix products, from any state and in bounded memory, or
            "convolution", with the kernel of the whole length by FFT as published. The numbers are the same.
        device: Where the parameters live.
        dtype: Of ``output_linear``; the state space's own parameters are float32 at least.
    """

    def __init__(
        self,
        d_model: int,
        kernel: nn.Module,
        glu: bool,
        dropout: float,
        method: Literal["scan", "convolution"],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if method not in ("scan", "convolution"):
            raise ValueError(f'method: got {method!r}, wanted "scan" or "convolution"')
        self.d_model, self.method = d_model, method
        self.layer = SkipAndKernel(d_model, kernel, device, dtype)
        self.dropout = nn.Dropout(dropout)
        linear = nn.Linear(d_model, 2 * d_model if glu else d_model, device=device, dtype=dtype)
        self.output_linear = nn.Sequential(linear, nn.GLU(dim=-1)) if glu else nn.Sequential(linear)

    @property
    def kernel(self) -> StateSpace:
        """The state space."""
        return self.layer.kernel  # type: ignore[return-value]

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
        if self.method == "convolution":
            length = x.shape[1]
            return self._out(long_convolution(x, self.kernel.taps(max(length, 1)).t(), length), x)
        return self._out(self.kernel.run(x, None)[0], x)

    def forward_state(self, x: Tensor, state: S4State, lengths: Tensor | None = None) -> tuple[Tensor, S4State]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row, 0 to L. Outputs at padding mean nothing. The
                rows then run one after the other.

        Returns:
            The output (B, L, D) and the state after the last real token of each row.
        """
        if lengths is None:
            y, after = self.kernel.run(x, state.ssm)
            return self._out(y, x), S4State(after)
        x = zero_padding(x, lengths)
        return self._out(self.kernel.run(x, state.ssm)[0], x), S4State(after_rows(self.kernel, x, state.ssm, lengths))

    @torch.no_grad()
    def decode(self, x: Tensor, state: S4State) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``."""
        return self._out(self.kernel.steps(x, state.ssm), x)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> S4State:
        """The state before the first token: zeros.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Accepted; the state is float32, float64 for a layer of float64 parameters.
            max_length: Accepted; the size of the state does not depend on it.
        """
        D = self.layer.D
        wide = torch.float64 if D.dtype == torch.float64 else torch.float32
        size = (batch_size, self.d_model, self.kernel.d_state // 2, 2)
        return S4State(torch.zeros(size, device=D.device if device is None else device, dtype=wide))

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        y = F.gelu(y + x * self.layer.D.to(x.dtype))
        return self.output_linear(self.dropout(y))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.kernel.d_state}"


class SkipAndKernel(nn.Module):
    """Holds the skip connection and the state space under their published names."""

    def __init__(
        self, d_model: int, kernel: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.D = nn.Parameter(torch.randn(1, d_model, device=device, dtype=wide))
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.kernel = kernel
