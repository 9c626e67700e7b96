"""The Mamba language model: embedding, residual blocks, tied head (Gu & Dao 2023, section 4.2).

Legend: B batch, L length, D model width, V vocabulary, S packed sequences.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from core.block import AddNorm, Block, GatedMLP
from core.config import MambaConfig
from core.mixers import Attention, Mamba, Mamba2, Mamba3, Mixer

IGNORED_ARGUMENTS = ("chunk_size", "use_mem_eff_path")  # of published mixers: how they compute, not what


class Backbone(nn.Module):
    """Embedding, blocks and final norm: token ids (B, L) -> hidden (B, L, D)."""

    def __init__(self, embedding: nn.Module, layers: Sequence[Block], norm_f: AddNorm) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers: Sequence[Block] = nn.ModuleList(layers)  # type: ignore[assignment]  a list of blocks, in torch's eyes
        self.norm_f = norm_f

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Runs whole sequences; the arguments are those of ``MambaLM.forward``."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        return self.norm_f(x, residual)[0]

    def forward_state(
        self, input_ids: Tensor, state: tuple[Any, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Continues from a state; the arguments are those of ``MambaLM.forward_state``."""
        x, residual, states = self.embedding(input_ids), None, []
        for layer, before in zip(self.layers, state, strict=True):
            x, residual, after = layer.forward_state(x, residual, before, lengths)
            states.append(after)
        return self.norm_f(x, residual)[0], tuple(states)

    def forward_last(
        self, input_ids: Tensor, state: tuple[Any, ...], state_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """``forward_state`` whose output is wanted at the last token only: (B, D).

        Where it ``takes_late`` branches states of Mamba and Mamba-2 layers may be None: before the first token; and
        those behind the last token come in ``state_dtype``, where the scan can write them so at once.
        """
        x: Any = self.embedding(input_ids)
        residual, states = None, []
        late = self.takes_late()
        for layer, before in zip(self.layers, state, strict=True):
            if layer is self.layers[-1]:
                x, residual, after = layer.forward_last(x, residual, before)
            elif late:
                x, residual, after = layer.forward_late(x, residual, before, state_dtype)
            else:
                x, residual, after = layer.forward_state(x, residual, before)
            states.append(after)
        return self.norm_f(x[:, -1:], None if residual is None else residual[:, -1:])[0].squeeze(1), tuple(states)

    def takes_late(self) -> bool:
        """Whether ``forward_last`` lets branches wait for their norm: with RMSNorm, without gradients."""
        return self.norm_f.kind == "rms" and not torch.is_grad_enabled()


class MambaLM(nn.Module):
    """A causal language model, token ids (B, L) -> logits (B, L, padded V).

    The state_dict has the published names: ``backbone.embedding.weight``, ``backbone.layers.{i}.norm.weight``,
    ``backbone.layers.{i}.mixer.*``, ``backbone.norm_f.weight``, ``lm_head.weight``.

    Args:
        config: Sizes and options.
        initializer_range: Standard deviation of the embedding.
        device: Where the parameters live.
        dtype: Their dtype; some of a mixer's stay float32.

    Raises:
        ValueError: For a layer or a mixer argument that does not exist.
    """

    # Published layer name -> class. A new kind of layer is an import and an entry.
    mixers: ClassVar[dict[str, Callable[..., Mixer]]] = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}
    attention: ClassVar[Callable[..., Mixer]] = Attention

    def __init__(
        self,
        config: MambaConfig,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: dict[str, Any] = {
            "eps": 1e-5,
            "residual_in_fp32": config.residual_in_fp32,
            **factory,
        }
        kind = "rms" if config.rms_norm else "layer"
        layers = []
        for mixer, arguments in self._mixers(config):
            mlp = GatedMLP(config.d_model, config.d_intermediate, **factory) if config.d_intermediate else None
            layers.append(Block(config.d_model, mixer(config.d_model, **arguments, **factory), mlp, kind, **norm))
        embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.backbone = Backbone(embedding, layers, AddNorm(config.d_model, kind, **norm))
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **factory)
        # Two residual branches a block with an MLP, one without. The published code means this rule (GPT-2's), but
        # initialises twice and the second time counts one branch; here the paper's rule holds.
        init_weights(self, initializer_range, branches=config.n_layer * (2 if config.d_intermediate else 1))
        if config.tie_embeddings:
            self.lm_head.weight = embedding.weight

    @classmethod
    def _mixers(cls, config: MambaConfig) -> list[tuple[Callable[..., Mixer], dict[str, Any]]]:
        """Class and arguments of each block's mixer, checked by name."""
        arguments = {key: value for key, value in config.ssm_cfg.items() if key not in IGNORED_ARGUMENTS}
        name = arguments.pop("layer", "Mamba1")
        if name not in cls.mixers:
            raise ValueError(f"ssm_cfg.layer: got {name!r}, wanted one of {sorted(cls.mixers)}")
        _check_arguments("ssm_cfg", name, cls.mixers[name], arguments)
        attention = {**config.attn_cfg, "causal": True}
        wrong = [index for index in config.attn_layer_idx if not 0 <= index < config.n_layer]
        if wrong:
            raise ValueError(f"attn_layer_idx: got {wrong}, wanted blocks from 0 to {config.n_layer - 1}")
        if config.attn_layer_idx:
            _check_arguments("attn_cfg", "attention", cls.attention, attention)
        return [
            (cls.attention, attention) if index in config.attn_layer_idx else (cls.mixers[name], arguments)
            for index in range(config.n_layer)
        ]

    @property
    def has_attention(self) -> bool:
        """Whether some layer is attention, whose state needs room for every token."""
        return any(isinstance(layer.mixer, Attention) for layer in self.backbone.layers)

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Scores every next token.

        Args:
            input_ids: (B, L) int64.
            seq_idx: (B, L) integers; the model starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            Logits (B, L, padded V).
        """
        return self.lm_head(self.backbone(input_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens))

    def forward_state(
        self, input_ids: Tensor, state: tuple[Any, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Continues sequences from ``state``; with L = 1 this is a decoding step.

        Args:
            input_ids: (B, L) int64.
            state: One entry a layer, from ``init_state`` or an earlier call.
            lengths: (B,) number of real tokens of each right-padded row.

        Returns:
            Logits (B, L, padded V), and the state after each row's last real token.
        """
        hidden, state = self.backbone.forward_state(input_ids, state, lengths)
        return self.lm_head(hidden), state

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> tuple[Any, ...]:
        """The state before the first token, one entry a layer; see ``Mixer.init_state``."""
        return tuple(
            layer.mixer.init_state(batch_size, device, dtype, max_length=max_length) for layer in self.backbone.layers
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Reads a model from a local folder, or by its name from the Hugging Face hub; see ``core.published.load_lm``.

        Raises:
            UserError: If there is no such model, or it is of another kind.
        """
        from core import published  # which imports this file

        return published.load_lm(name, device=device, dtype=dtype, model_class=cls)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes ``config.json`` and ``model.safetensors`` to a folder; see ``core.published.save_lm``.

        Raises:
            UserError: If one of the files exists and ``overwrite`` is False.
        """
        from core import published

        published.save_lm(self, folder, overwrite=overwrite)

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are recomputed in the backward pass. No parameter changes its name."""
        for layer in self.backbone.layers:
            layer.gradient_checkpointing = enable


def _check_arguments(field: str, name: str, mixer: Callable[..., Mixer], arguments: Mapping[str, Any]) -> None:
    """Raises for arguments that a mixer does not have, and for those that it misses."""
    # Not the configuration's business: where the model sets the value, and the direction of a causal model.
    own = {"d_model", "embed_dim", "reverse", "layer_idx", "device", "dtype"}
    parameters = inspect.signature(mixer).parameters
    allowed = set(parameters) - own
    missing = [key for key in allowed if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise ValueError(f"{field}: {name} needs {', '.join(missing)}, got {sorted(arguments)}")
    for key in arguments:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"wanted some of {sorted(allowed)}"
            raise ValueError(f"{field}: {name} has no argument {key!r}; {hint}")


@torch.no_grad()
def init_weights(model: nn.Module, initializer_range: float = 0.02, *, branches: int) -> None:
    """Initialises a language model as published, on top of what its mixers did themselves.

    Embeddings are N(0, initializer_range^2), biases of linear layers zero (but not where marked ``_no_reinit``), and
    the last weight of each residual branch is divided by sqrt(branches), so that the stream's variance does not grow
    with depth (Radford et al. 2019, GPT-2, section 2.3).

    Args:
        model: The model to change.
        initializer_range: Standard deviation of the embeddings.
        branches: Number of residual branches in the whole model.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            parameter.div_(math.sqrt(branches))
