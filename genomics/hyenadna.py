"""HyenaDNA: a decoder of Hyena layers over single bases (Nguyen et al. 2023), with the published names and arguments.

Legend: B batch, L length, D model width, V padded vocabulary.
"""

import difflib
import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.block import AddNorm
from core.mixers.hyena import Hyena, HyenaState

# Arguments of the published model that have one value here, and why no other.
FIXED: dict[str, tuple[Any, str]] = {
    "attn_layer_idx": (None, "no released model has attention layers"),
    "attn_cfg": (None, "no released model has attention layers"),
    "max_position_embeddings": (0, "positions are known to the filters; no released model has a table of them"),
    "process_group": (None, "tensor parallelism is not supported"),
}


@dataclass
class HyenaDNAConfig:
    """The published arguments of HyenaDNA.

    Args:
        d_model: Width D.
        n_layer: Number of blocks.
        d_inner: Hidden width of the MLPs; None is 4 D.
        vocab_size: Number of tokens before padding.
        layer: Arguments of ``core.mixers.Hyena``; ``l_max``, the longest sequence, is needed.
        attn_layer_idx: None.
        attn_cfg: None.
        max_position_embeddings: 0.
        resid_dropout: Dropout of every branch.
        embed_dropout: Dropout of the embedding.
        layer_norm_epsilon: Of the norms.
        initializer_cfg: ``initializer_range`` (0.02) and ``rescale_prenorm_residual`` (true).
        fused_mlp: Accepted; the function is the same.
        identity_mlp: Leave the MLPs out.
        fused_dropout_add_ln: Accepted; the function is the same.
        residual_in_fp32: Keep the residual stream in float32.
        pad_vocab_size_multiple: The embedding's rows are padded to a multiple of it.
        sequence_parallel: Accepted; without a process group it means nothing.
        checkpoint_mlp: Compute the MLPs again in the backward pass. No parameter changes its name.
        checkpoint_mixer: The same for the mixers.
        use_flashfftconv: Accepted; the function is the same.
        process_group: None.

    Raises:
        ValueError: For a value that is not supported, by name.
    """

    d_model: int
    n_layer: int
    d_inner: int | None = None
    vocab_size: int = 12
    layer: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: Any = None
    attn_cfg: Any = None
    max_position_embeddings: int = 0
    resid_dropout: float = 0.0
    embed_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_cfg: dict[str, Any] | None = None
    fused_mlp: bool = False
    identity_mlp: bool = False
    fused_dropout_add_ln: bool = False
    residual_in_fp32: bool = False
    pad_vocab_size_multiple: int = 8
    sequence_parallel: bool = True
    checkpoint_mlp: bool = False
    checkpoint_mixer: bool = False
    use_flashfftconv: bool = False
    process_group: Any = None

    def __post_init__(self) -> None:
        for name, (value, reason) in FIXED.items():
            given = getattr(self, name)
            if given != value and not (value is None and not given):  # an empty list or dict means None
                raise ValueError(f"{name}: got {given!r}, wanted {value!r}: {reason}")
        if self.layer.get("_name_", "hyena") != "hyena":
            raise ValueError(f'layer._name_: got {self.layer["_name_"]!r}, wanted "hyena"')
        if "l_max" not in self.layer:
            raise ValueError("layer: got no l_max, wanted the longest sequence, such as 1026 for 1,024 bases")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class HyenaMLP(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh approximation: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class HyenaBlock(nn.Module):
    """Dropout, add, norm, Hyena, dropout, add, norm, MLP; the residual stream travels apart (see ``core.block``)."""

    def __init__(self, config: HyenaDNAConfig, dropout: float, **factory: Any) -> None:
        super().__init__()
        width = config.d_model
        arguments = {key: value for key, value in config.layer.items() if key != "_name_"}
        arguments.pop("layer_idx", None)
        norm = {"kind": "layer", "eps": config.layer_norm_epsilon, "residual_in_fp32": config.residual_in_fp32}
        self.mixer = _hyena(width, arguments, factory)
        self.norm1, self.norm2 = (AddNorm(width, **norm, **factory) for _ in range(2))
        hidden = 4 * width if config.d_inner is None else config.d_inner
        self.mlp = nn.Identity() if config.identity_mlp else HyenaMLP(width, hidden, **factory)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(config.resid_dropout)
        self.checkpoint_mixer, self.checkpoint_mlp = config.checkpoint_mixer, config.checkpoint_mlp
        self.gradient_checkpointing = False

    def forward(
        self, x: Tensor, residual: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out = checkpoint(self._forward, x, residual, seq_idx, cu_seqlens, use_reentrant=False)
            return cast(tuple[Tensor, Tensor], out)
        return self._forward(x, residual, seq_idx, cu_seqlens)

    def _forward(
        self, x: Tensor, residual: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, stream = self.norm1(self.dropout1(x), residual)
        x = _maybe(self.checkpoint_mixer, self.mixer, x, seq_idx, cu_seqlens)
        x, stream = self.norm2(self.dropout2(x), stream)
        return _maybe(self.checkpoint_mlp, self.mlp, x), stream

    def forward_state(
        self, x: Tensor, residual: Tensor | None, state: HyenaState, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, HyenaState]:
        x, stream = self.norm1(self.dropout1(x), residual)
        x, state = self.mixer.forward_state(x, state, lengths)
        x, stream = self.norm2(self.dropout2(x), stream)
        return self.mlp(x), stream, state


class HyenaBackbone(nn.Module):
    """Embedding, blocks and the last norm: token ids (B, L) -> hidden (B, L, D)."""

    def __init__(self, config: HyenaDNAConfig, **factory: Any) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.layers = nn.ModuleList(
            HyenaBlock(config, config.resid_dropout if i else config.embed_dropout, **factory)
            for i in range(config.n_layer)
        )
        self.drop_f = nn.Dropout(config.resid_dropout)
        norm = {"kind": "layer", "eps": config.layer_norm_epsilon, "residual_in_fp32": config.residual_in_fp32}
        self.ln_f = AddNorm(config.d_model, **norm, **factory)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of the tokens, under the name it has in ``core.lm``."""
        return cast(nn.Embedding, self.embeddings.word_embeddings)

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Runs whole sequences; the arguments are those of ``HyenaDNA.forward``."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, seq_idx, cu_seqlens)
        return self.ln_f(self.drop_f(x), residual)[0]

    def forward_state(
        self, input_ids: Tensor, state: tuple[HyenaState, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[HyenaState, ...]]:
        """Continues from a state; the arguments are those of ``HyenaDNA.forward_state``."""
        x, residual, states = self.embedding(input_ids), None, []
        for layer, before in zip(self.layers, state, strict=True):
            x, residual, after = cast(HyenaBlock, layer).forward_state(x, residual, before, lengths)
            states.append(after)
        return self.ln_f(self.drop_f(x), residual)[0], tuple(states)


class HyenaDNA(nn.Module):
    """A causal language model of DNA, token ids (B, L) -> logits (B, L, V), for L up to ``config.layer["l_max"]``.

    The state_dict is the published one: ``backbone.embeddings.word_embeddings.weight``,
    ``backbone.layers.{i}.{mixer,norm1,norm2,mlp}.*``, ``backbone.ln_f.*``, ``lm_head.weight`` (tied).

    Args:
        config: Sizes and options.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For an argument of the mixer that does not exist or is not supported, by name.
    """

    def __init__(
        self,
        config: HyenaDNAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = HyenaBackbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.lm_head.weight = self.backbone.embedding.weight
        _initialise(self, **(config.initializer_cfg or {}))

    @property
    def l_max(self) -> int:
        """The longest sequence."""
        return int(self.config.layer["l_max"])

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Scores every next token.

        Args:
            input_ids: (B, L) int64.
            seq_idx: (B, L) integers; the model starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            Logits (B, L, V).
        """
        return self.lm_head(self.backbone(input_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens))

    def forward_state(
        self, input_ids: Tensor, state: tuple[HyenaState, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[HyenaState, ...]]:
        """Continues sequences from ``state``; see ``core.lm.MambaLM.forward_state``."""
        hidden, state = self.backbone.forward_state(input_ids, state, lengths)
        return self.lm_head(hidden), state

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[HyenaState, ...]:
        """The state before the first token, one entry a layer."""
        layers = cast(list[HyenaBlock], self.backbone.layers)
        return tuple(layer.mixer.init_state(batch_size, device, dtype) for layer in layers)

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are recomputed in the backward pass. No parameter changes its name."""
        for layer in self.backbone.layers:
            layer.gradient_checkpointing = enable  # type: ignore[assignment]


def _hyena(width: int, arguments: dict[str, Any], factory: dict[str, Any]) -> Hyena:
    known = list(inspect.signature(Hyena).parameters)
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"wanted some of {known}"
            raise ValueError(f"layer: Hyena has no argument {key!r}; {hint}")
    return Hyena(width, **arguments, **factory)


def _maybe(recompute: bool, module: nn.Module, *arguments: Any) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(module, *arguments, use_reentrant=False))
    return module(*arguments)


@torch.no_grad()
def _initialise(model: HyenaDNA, initializer_range: float = 0.02, rescale_prenorm_residual: bool = True) -> None:
    """The published initialisation: N(0, range^2), the branches' last weights divided by sqrt(2 n_layer), biases 0."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        last = rescale_prenorm_residual and name.endswith(("out_proj", "fc2"))
        scale = (2 * model.config.n_layer) ** -0.5 if last else 1.0
        nn.init.normal_(module.weight, std=initializer_range * scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
