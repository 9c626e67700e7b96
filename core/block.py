"""The residual block of a sequence model: add, norm, mixer, and optionally add, norm, MLP.

Legend: B batch, L length, D model width, H hidden width of the MLP.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels  # noqa: F401  registers torch.ops.triscan
from core.forget import forget, forgetting
from core.mixers.contract import Mixer
from core.mixers.last import forward_last
from core.mixers.mamba import Mamba
from core.mixers.mamba2 import Mamba2
from core.mixers.reading import read_mamba, read_mamba2
from core.parallel.group import in_parts
from kernels.norm.late import Late, add_norm
from kernels.selective_scan.exactness import between_pieces

FORGET_FROM = 1 << 27  # bytes of a branch from which on what is cheap to compute again is not kept
PIECE = 1 << 19  # tokens that a checkpointed block computes again at a time, where its mixer carries a state


def start_stream(x: Tensor, in_fp32: bool) -> Tensor:
    """The residual stream that begins with x: in float32 if asked for, and never narrower than x."""
    return x.float() if in_fp32 and x.dtype != torch.float64 else x


torch.fx.wrap("start_stream")  # a tracer has no dtypes to compare


def is_large(x: Tensor) -> bool:
    """Whether activations of this size are worth computing again; not while a tracer or a compiler looks."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    return x.numel() * x.element_size() >= FORGET_FROM


class AddNorm(nn.Module):
    """Adds a branch to the residual stream and normalises the sum, in one kernel.

    Statistics are float32 (float64 for float64 input). RMSNorm: Zhang & Sennrich 2019, equation 4.

    Args:
        dim: D.
        kind: "rms", or "layer" for LayerNorm (with a bias).
        eps: Added to the mean square or the variance.
        residual_in_fp32: Whether a residual stream that starts here is float32 whatever the branch is.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For an unknown kind.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "rms",
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("rms", "layer"):
            raise ValueError(f'kind: got {kind!r}, wanted "rms" or "layer"')
        self.kind, self.eps, self.residual_in_fp32 = kind, eps, residual_in_fp32
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if kind == "layer" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalises x + residual.

        Args:
            x: (B, L, D) the branch.
            residual: (B, L, D) the stream so far; None at its start.

        Returns:
            norm(x + residual) in x's dtype, and x + residual, the stream from here on.
        """
        return self.normalise(x, residual, self.weight, self.bias)

    def forward_late(self, x: Tensor | Late, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """``forward``, whose branch may wait for a norm of its own, for RMSNorm and with a residual."""
        if not isinstance(x, Late):
            return self(x, residual)
        assert self.kind == "rms"
        assert residual is not None
        return add_norm(x, residual, self.weight, self.eps)

    def normalise(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``forward`` with a weight and bias that are given."""
        y, total, _, _ = torch.ops.triscan.norm(
            x, weight, bias, residual, None, self.kind, self.eps, 0, True, self.residual_in_fp32, "auto"
        )
        return y, (start_stream(x, self.residual_in_fp32) if residual is None else total)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kind={self.kind}, eps={self.eps}"


class GatedMLP(nn.Module):
    """The gated MLP of Mamba's models: fc2(y * silu(gate)) with [y, gate] = fc1(x) (SwiGLU, Shazeer 2020).

    Args:
        in_features: D.
        hidden_features: H; 8/3 D by default. It is rounded up to a multiple of ``multiple_of``.
        multiple_of: See there.
        bias: Whether fc1 and fc2 have biases.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        multiple_of: int = 128,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class Block(nn.Module):
    """Add -> Norm -> Mixer (-> Add -> Norm -> MLP), the pre-norm block with the addition moved to the front.

    Branch and residual stream travel apart, so that each addition is fused with the norm that follows it; the next
    block, or the model's last norm, adds this block's branch. Names are the published ones: ``norm``, ``mixer``,
    ``norm2``, ``mlp``.

    Args:
        dim: D.
        mixer: A module with the contract ``core.mixers.Mixer``.
        mlp: The second branch, (B, L, D) -> (B, L, D); None leaves it out.
        norm: "rms" or "layer".
        eps: Of the norms.
        residual_in_fp32: Whether the residual stream is float32.
        device: Where the norms' parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        mlp: nn.Module | None = None,
        norm: str = "rms",
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = AddNorm(dim, norm, eps, residual_in_fp32, device=device, dtype=dtype)
        self.mixer: Mixer = mixer
        self.norm2 = None if mlp is None else AddNorm(dim, norm, eps, residual_in_fp32, device=device, dtype=dtype)
        self.mlp = mlp
        self.gradient_checkpointing = False  # recompute the block in the backward pass instead of keeping activations

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the block over whole sequences.

        Args:
            x: (B, L, D) the branch of the block before.
            residual: (B, L, D) the residual stream; None in the first block.
            seq_idx: (B, L), see the mixer.
            cu_seqlens: (S + 1,), see the mixer.

        Returns:
            This block's branch and the residual stream, which does not hold it yet.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._checkpointed(x, residual, seq_idx, cu_seqlens)
        if is_large(x):
            with forgetting():
                return self._forward(x, residual, seq_idx, cu_seqlens)
        return self._forward(x, residual, seq_idx, cu_seqlens)

    def _forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block, whose mixer gets the norm's output in ``dtype``; None: in x's."""
        x, stream = self.norm(x, residual)
        if residual is not None and is_large(x):
            self._forget(x, stream)
        x = self.mixer(x.to(dtype or x.dtype), seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        return self.apply_mlp(x, stream)

    def _forget(self, y: Tensor, stream: Tensor) -> None:
        """Leave it to the backward pass to normalise again, from the sum, which is kept for the norm's gradient."""
        dtype, total = y.dtype, stream.detach()
        if total.dtype in (torch.float32, torch.float64):  # with all digits of the sum
            forget(y, lambda: self.norm(total)[0].to(dtype))

    def _checkpointed(
        self, x: Tensor, residual: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The block with nothing kept but its stream: the sum of what came in is enough, where it has all digits."""
        dtype = x.dtype
        if residual is None:
            x = start_stream(x, self.norm.residual_in_fp32)
        elif torch.promote_types(x.dtype, residual.dtype) == residual.dtype in (torch.float32, torch.float64):
            x, residual = x + residual, None
        if self._cuts(x, seq_idx, cu_seqlens):
            return self._in_pieces(x, residual, dtype)
        out = checkpoint(self._forward, x, residual, seq_idx, cu_seqlens, dtype, use_reentrant=False)
        return cast(tuple[Tensor, Tensor], out)

    def _cuts(self, x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> bool:
        """Whether to checkpoint piece by piece: then one piece's activations are alive at a time, not a block's."""
        whole = seq_idx is None and cu_seqlens is None and not in_parts() and not torch.compiler.is_compiling()
        carries = getattr(self.mixer, "carries_state", False) and not getattr(self.mixer, "reverse", False)
        return whole and carries and isinstance(x, Tensor) and x.shape[1] > PIECE

    def _in_pieces(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        state = self.mixer.init_state(len(x), x.device)
        xs = x.split(PIECE, dim=1)
        residuals = [None] * len(xs) if residual is None else residual.split(PIECE, dim=1)
        branches, streams = [], []
        for piece, before in zip(xs, residuals, strict=True):
            out = checkpoint(self._piece, piece, before, dtype, state, use_reentrant=False)
            branch, stream, state = cast(tuple[Tensor, Tensor, Any], out)
            branches.append(branch)
            streams.append(stream)
        same = residual is None and self.mlp is None  # the stream is what came in
        return torch.cat(branches, dim=1), x if same else torch.cat(streams, dim=1)

    def _piece(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, state: Any) -> tuple[Tensor, Tensor, Any]:
        with between_pieces():
            y, stream = self.norm(x, residual)
            y, state = self.mixer.forward_state(y.to(dtype), state)
        return *self.apply_mlp(y, stream), state

    def forward_state(
        self, x: Tensor, residual: Tensor | None, state: Any, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Continues sequences from the mixer's ``state``; see the mixer for ``lengths``.

        Returns:
            This block's branch, the residual stream and the mixer's new state.
        """
        x, stream = self.norm(x, residual)
        x, state = self.mixer.forward_state(x, state, lengths)
        return *self.apply_mlp(x, stream), state

    def forward_late(
        self, x: Tensor | Late, residual: Tensor | None, state: Any, state_dtype: torch.dtype | None = None
    ) -> tuple[Tensor | Late, Tensor, Any]:
        """``forward_state``, whose branch may wait for a norm of its own where that saves time; so may the one given.

        Only for a block in front of one with RMSNorm. A Mamba or Mamba-2 layer's state may be None: before the first
        token; and the scan's state is handed on in ``state_dtype``.
        """
        y, stream = self.norm.forward_late(x, residual)
        if self.mlp is None and isinstance(self.mixer, Mamba2):
            late, state = read_mamba2(self.mixer, y, state, state_dtype)
            return late, stream, state
        if self.mlp is None and type(self.mixer) is Mamba:
            late, state = read_mamba(self.mixer, y, state, stream, self.norm.weight, state_dtype)
            return late, stream, state
        y, state = self.mixer.forward_state(y, self._begun(y, state))
        return *self.apply_mlp(y, stream), state

    def forward_last(self, x: Tensor | Late, residual: Tensor | None, state: Any) -> tuple[Tensor, Tensor, Any]:
        """``forward_state``, of whose outputs only the last token's are wanted; x may wait for a norm of its own.

        Returns:
            This block's branch and the residual stream at the last token, (B, 1, D), and the mixer's new state.
        """
        y, stream = self.norm.forward_late(x, residual)
        y, state = forward_last(self.mixer, y, state)
        return *self.apply_mlp(y, stream[:, -1:]), state

    def _begun(self, x: Tensor, state: Any) -> Any:
        return self.mixer.init_state(len(x)) if state is None else state

    def apply_mlp(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the second branch, if there is one, on the branch and residual stream that the mixer left."""
        if self.mlp is None or self.norm2 is None:
            return x, residual
        x, residual = self.norm2(x, residual)
        return self.mlp(x), residual
