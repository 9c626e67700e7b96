"""Caduceus: bidirectional Mamba over DNA, reverse-complement equivariant or not (Schiff et al. 2024).

Caduceus-PS runs every block on a sequence and on its reverse complement, with the same weights. Published code keeps
the second strand flipped, in the upper half of the channels; here the strands are rows of one batch, read in their own
directions, and only embedding and head know of the complement: no block flips anything.

Legend: B batch, L length, D model width, V padded vocabulary.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.block import AddNorm, Block
from core.lm import init_weights
from core.mixers import BiMamba
from core.parallel.group import active, sequence_parallel
from genomics.vocabulary import COMPLEMENT

COMPLEMENTS = {i: int(c) for i, c in enumerate(COMPLEMENT)}


@dataclass
class CaduceusConfig:
    """The published configuration of Caduceus.

    Args:
        d_model: Width D.
        n_layer: Number of blocks.
        vocab_size: Number of tokens, before padding.
        ssm_cfg: Arguments of ``core.mixers.Mamba``.
        rms_norm: RMSNorm; otherwise LayerNorm.
        residual_in_fp32: Keep the residual stream in float32.
        fused_add_norm: With ``rcps`` another function of the same weights: the published fused blocks take the second
            strand for the first, so that the strands change places in every block. Released weights were trained so.
        pad_vocab_size_multiple: The embedding's rows are padded to a multiple of it.
        norm_epsilon: Of the norms.
        initializer_cfg: ``initializer_range`` (0.02).
        bidirectional: Read both directions.
        bidirectional_strategy: "add" or "ew_multiply".
        bidirectional_weight_tie: Share in_proj and out_proj between the directions.
        rcps: Reverse-complement equivariant: Caduceus-PS, otherwise -Ph.
        gradient_checkpointing_stride: 1: see ``Caduceus.set_gradient_checkpointing``.
        complement_map: Id of each token's complement.
    """

    d_model: int
    n_layer: int
    vocab_size: int = 12
    ssm_cfg: dict[str, Any] | None = None
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    norm_epsilon: float = 1e-5
    initializer_cfg: dict[str, Any] | None = None
    bidirectional: bool = True
    bidirectional_strategy: str | None = "add"
    bidirectional_weight_tie: bool = True
    rcps: bool = False
    gradient_checkpointing_stride: int = 1
    complement_map: dict[Any, int] | None = field(default_factory=lambda: dict(COMPLEMENTS))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class _StrandMixer(BiMamba):
    """Mixes two strands, the halves of a batch; of sequences in parts, the second runs through the ranks backwards."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``BiMamba.forward``, of (2 B, L, D)."""
        group = active()
        if group is None:
            return super().forward(x, *args, **kwargs)
        first, second = x.chunk(2)
        y = super().forward(first, *args, **kwargs)
        with sequence_parallel(group.turned()):
            return torch.cat([y, super().forward(second, *args, **kwargs)])


class CaduceusBackbone(nn.Module):
    """Embedding, blocks and the last norm: (B, L) -> (B, L, D), with ``rcps`` (2 B, L, D).

    With ``rcps`` the first B rows are the sequences, the others their reverse complements, each in its own direction.
    """

    def __init__(self, config: CaduceusConfig, **factory: Any) -> None:
        super().__init__()
        self.rcps, self.swap = config.rcps, config.rcps and config.fused_add_norm
        norm: dict[str, Any] = {"eps": config.norm_epsilon, "residual_in_fp32": config.residual_in_fp32, **factory}
        kind = "rms" if config.rms_norm else "layer"
        mixer: dict[str, Any] = {
            "bidirectional": config.bidirectional,
            "bidirectional_strategy": config.bidirectional_strategy or "add",
            "bidirectional_weight_tie": config.bidirectional_weight_tie,
            **(config.ssm_cfg or {}),
            **factory,
        }
        mixers: Any = _StrandMixer if config.rcps else BiMamba
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.layers = nn.ModuleList(
            Block(config.d_model, mixers(config.d_model, **mixer), None, kind, **norm) for _ in range(config.n_layer)
        )
        self.norm_f = AddNorm(config.d_model, kind, **norm)
        self.register_buffer("complement", complement_table(config), persistent=False)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of the tokens, under the name it has in ``core.lm``."""
        return cast(nn.Embedding, self.embeddings.word_embeddings)

    def strands(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (2 B, L): the sequences and their reverse complements."""
        return torch.cat([input_ids, self.complement[input_ids].flip(1)])  # type: ignore[index]

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Runs whole sequences; the arguments are those of ``Caduceus.forward``."""
        if self.rcps:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: packed sequences would have to be turned one by one; pass seq_idx")
            input_ids = self.strands(input_ids)
            seq_idx = None if seq_idx is None else torch.cat([seq_idx, seq_idx.flip(1)])
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            if self.swap:
                x, residual = exchange_strands(x), None if residual is None else exchange_strands(residual)
            x, residual = layer(x, residual, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        return self.norm_f(x, residual)[0]


def exchange_strands(x: Tensor) -> Tensor:
    """(2 B, L, D): each strand read as the published layout reads the other, backwards in length and channels."""
    return x.view(2, -1, *x.shape[1:]).flip(0, 2, 3).reshape(x.shape)


def complement_table(config: CaduceusConfig) -> Tensor:
    """Id of each token's complement, (V,) int64; padding rows are their own.

    Raises:
        ValueError: If the map is missing or is not its own inverse.
    """
    table = torch.arange(config.padded_vocab_size)
    if config.complement_map is None:
        if config.rcps:
            raise ValueError("complement_map: got None, wanted the id of each token's complement, as rcps needs it")
        return table
    for token, other in config.complement_map.items():  # JSON makes the keys strings
        table[int(token)] = int(other)
    if not torch.equal(table[table], torch.arange(len(table))):
        raise ValueError("complement_map: the complement of a complement must be the token itself")
    return table


class Caduceus(nn.Module):
    """A masked language model of DNA, token ids (B, L) -> logits (B, L, V).

    The state_dict has Caduceus-Ph's published names (``caduceus.backbone.*``, ``lm_head.weight``) for -PS too;
    ``rename_published`` translates -PS's. With ``rcps`` the logits of a reverse complement are those of the sequence,
    turned; the head is then W a + W[complement] b for the two strands a and b (Schiff et al. 2024, section 3.2).

    Args:
        config: Sizes and options.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For an argument that does not fit.
    """

    def __init__(
        self,
        config: CaduceusConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.caduceus = nn.Module()
        self.caduceus.backbone = CaduceusBackbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        init_weights(self, (config.initializer_cfg or {}).get("initializer_range", 0.02), branches=config.n_layer)
        self.lm_head.weight = self.backbone.embedding.weight

    @property
    def backbone(self) -> CaduceusBackbone:
        """Everything but the head."""
        return cast(CaduceusBackbone, self.caduceus.backbone)

    def hidden(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Hidden states in the published layout.

        Returns:
            (B, L, D); with ``rcps`` (B, L, 2 D), the second strand in the upper half, flipped in length and channels.
        """
        hidden = self.backbone(input_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        if not self.config.rcps:
            return hidden
        first, second = hidden.chunk(2)
        return torch.cat([first, second.flip(1, 2)], dim=-1)

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Scores the tokens at every position.

        Args:
            input_ids: (B, L) int64, [MASK] where a token is asked for.
            seq_idx: (B, L) integers; the model starts afresh where they change, and -1 marks padding.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one; not with ``rcps``.

        Returns:
            Logits (B, L, V).
        """
        hidden = self.backbone(input_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        if not self.config.rcps:
            return self.lm_head(hidden)
        first, second = hidden.chunk(2)
        turned = F.linear(second, self.lm_head.weight[self.backbone.complement])  # type: ignore[index]
        return self.lm_head(first) + turned.flip(1)

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are recomputed in the backward pass. No parameter changes its name."""
        for layer in self.backbone.layers:
            layer.gradient_checkpointing = enable  # type: ignore[assignment]


def config_from_published(values: Mapping[str, Any]) -> CaduceusConfig:
    """The configuration in a published ``config.json``; entries of transformers' own are dropped.

    Raises:
        ValueError: For an argument of the mixer that does not exist.
    """
    known = CaduceusConfig.__dataclass_fields__
    config = CaduceusConfig(**{key: value for key, value in values.items() if key in known})
    mixer = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
             "conv_bias", "bias", "use_fast_path")  # fmt: skip
    for key in config.ssm_cfg or {}:
        if key not in mixer:
            near = difflib.get_close_matches(key, mixer, 1)
            raise ValueError(f"ssm_cfg: Mamba has no argument {key!r}; {f'did you mean {near[0]!r}?' if near else ''}")
    if config.ssm_cfg:
        config.ssm_cfg = {key: value for key, value in config.ssm_cfg.items() if key != "use_fast_path"}
    return config


def rename_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the names of a released checkpoint, -Ph or -PS, fused or not, into this model's."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name.endswith("complement_map") or name.startswith(("score.", "torchmetrics.", "decoder.")):
            continue
        name = name.replace("word_embeddings.embedding.", "word_embeddings.").replace(".submodule.", ".")
        renamed[name.replace("lm_head.lm_head.", "lm_head.")] = tensor
    if "caduceus.backbone.embeddings.word_embeddings.weight" in renamed:
        renamed.setdefault("lm_head.weight", renamed["caduceus.backbone.embeddings.word_embeddings.weight"])
    for name in list(renamed):  # safetensors keeps one name of tied weights
        for own, other in (("mamba_fwd.", "mamba_rev."), ("mamba_rev.", "mamba_fwd.")):
            if own in name and (".in_proj." in name or ".out_proj." in name):
                renamed.setdefault(name.replace(own, other), renamed[name])
    return renamed


def published_names(state: Mapping[str, Tensor], config: CaduceusConfig) -> dict[str, Tensor]:
    """The inverse of ``rename_published``: the names that published code gives the same weights."""
    if not config.rcps:
        return dict(state)
    table = complement_table(config)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.replace("word_embeddings.", "word_embeddings.embedding.").replace("lm_head.", "lm_head.lm_head.")
        name = name.replace(".mixer.", ".mixer.submodule.")
        if not config.fused_add_norm:
            name = name.replace(".norm.", ".norm.submodule.").replace(".norm_f.", ".norm_f.submodule.")
        renamed[name] = tensor
    renamed["caduceus.backbone.embeddings.word_embeddings.complement_map"] = table
    renamed["lm_head.complement_map"] = table
    return renamed
