"""Models of DNA on the Mamba blocks of ``core.lm``: a causal language model, and a classifier with the same backbone.

Legend: B batch, L length, D model width, V padded vocabulary (16), K classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.checkpoints import load_into, read_weights
from core.errors import UserError
from core.lm import MambaConfig, MambaLM
from genomics.caduceus import Caduceus, CaduceusConfig
from genomics.hyenadna import HyenaDNA, HyenaDNAConfig
from genomics.kmers import KmerBackbone
from genomics.strands import StrandClassifier
from genomics.vocabulary import PAD, TOKENS, A, T

Pooling = Literal["max", "mean", "last"]
MixerName = Literal["mamba", "mamba2", "mamba3", "hyena", "attention"]
Objective = Literal["causal", "masked"]


class GenomeLM(MambaLM):
    """A causal language model of DNA: token ids (B, L) -> logits of the next token (B, L, V).

    The vocabulary is HyenaDNA's, 12 tokens padded to 16. Parameter names are those of ``core.lm.MambaLM``.

    Args:
        d_model: Width D.
        n_layer: Number of blocks.
        d_state: State size of each channel.
        d_conv: Width of the causal convolution, which Mamba-3 does without. Wider than text models' 4, a block sees a
            whole k-mer at once.
        expand: Inner width over D.
        layer: Published name of the mixer, a key of ``MambaLM.mixers``.
        attention_layers: Blocks that hold attention instead, counted from 0: heads of about 64 channels with rotary
            positions, no biases.
        d_mlp: Hidden width of a gated MLP in every block; 0 leaves it out.

    Raises:
        ValueError: For sizes that do not fit, an unknown mixer, or a block that there is not.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        layer: str = "Mamba1",
        attention_layers: Sequence[int] = (),
        d_mlp: int = 0,
    ) -> None:
        wrong = [index for index in attention_layers if not 0 <= index < n_layer]
        if wrong:
            raise ValueError(f"attention_layers: got {wrong}, wanted blocks from 0 to {n_layer - 1}")
        config = MambaConfig(
            d_model=d_model,
            n_layer=n_layer,
            vocab_size=len(TOKENS),
            ssm_cfg={"layer": layer, "d_state": d_state, "expand": expand, **_own(layer, expand * d_model, d_conv)},
            attn_layer_idx=list(attention_layers),
            attn_cfg=_attention(d_model) if attention_layers else {},
            d_intermediate=d_mlp,
        )
        super().__init__(config)


def _own(layer: str, channels: int, d_conv: int) -> dict[str, Any]:
    """Arguments that not every mixer has: Mamba-3 has no convolution, Mamba no heads, here of at most 64 channels."""
    own: dict[str, Any] = {"a_activation": "heavy_tail"} if layer == "Mamba3" else {"d_conv": d_conv}
    if layer != "Mamba1":
        own["headdim"] = next(width for width in range(min(64, channels), 0, -1) if channels % width == 0)
    return own


def _attention(d_model: int) -> dict[str, Any]:
    """Arguments of the attention of a width: that of Transformer++ (Gu & Dao 2023, section 4.2.1)."""
    heads = next(count for count in range(max(d_model // 64, 1), 0, -1) if d_model % count == 0)
    rotary = d_model // heads // 2 * 2
    return {"num_heads": heads, "rotary_emb_dim": rotary, "qkv_proj_bias": False, "out_proj_bias": False}


def build_lm(
    mixer: MixerName = "mamba",
    objective: Objective = "causal",
    d_model: int = 128,
    n_layer: int = 8,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
    rcps: bool = False,
    attention_layers: Sequence[int] = (),
    l_max: int = 1026,
) -> "GenomeLM | HyenaDNA | Caduceus":
    """Build a language model of DNA by the name of its mixer and its objective.

    Causal with ``mamba``, ``mamba2`` or ``mamba3`` is ``GenomeLM``; with ``attention`` it is that too, every block
    attention and a gated MLP of 8/3 D; causal with ``hyena`` is ``HyenaDNA`` with the filters of the released models;
    masked is ``Caduceus``, -PS with ``rcps``.

    Args:
        mixer: Name of the mixer.
        objective: ``causal`` or ``masked``.
        d_model: Width D.
        n_layer: Number of blocks.
        d_state: State size; of Mamba.
        d_conv: Width of the short convolution; of Mamba and Mamba-2.
        expand: Inner width over D; of Mamba.
        rcps: Reverse-complement equivariant; masked models only.
        attention_layers: Blocks of a Mamba that hold attention instead; causal models only.
        l_max: Longest sequence; of Hyena.

    Raises:
        ValueError: For parts that do not go together.
    """
    if n_layer < 1:
        raise ValueError(f"n_layer: got {n_layer}, wanted at least 1")
    mamba = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
    if attention_layers and (objective == "masked" or mixer in ("hyena", "attention")):
        raise ValueError(
            f"attention_layers: got {list(attention_layers)} for {mixer}, {objective}; wanted none, or the causal "
            "objective and one of mamba, mamba2, mamba3"
        )
    if objective == "masked":
        if mixer != "mamba":
            raise ValueError(f"mixer: got {mixer!r}, wanted 'mamba' for the masked objective, which reads both ways")
        config = CaduceusConfig(d_model=d_model, n_layer=n_layer, rcps=rcps, ssm_cfg=mamba, fused_add_norm=False)
        return Caduceus(config)
    if rcps:
        raise ValueError("rcps: got true for a causal model, wanted objective masked: strands need both directions")
    if mixer == "hyena":
        layer = {"l_max": l_max, "emb_dim": 5, "filter_order": 64, "w": 10, "lr_pos_emb": 0.0}
        return HyenaDNA(HyenaDNAConfig(d_model=d_model, n_layer=n_layer, layer=layer, embed_dropout=0.0))
    if mixer == "attention":
        return GenomeLM(d_model, n_layer, attention_layers=range(n_layer), d_mlp=round(d_model / 3) * 8)
    layer_names = {"mamba": "Mamba1", "mamba2": "Mamba2", "mamba3": "Mamba3"}
    return GenomeLM(d_model, n_layer, layer=layer_names[mixer], attention_layers=attention_layers, **mamba)


class GenomeClassifier(StrandClassifier):
    """A backbone of ``GenomeLM``, pooled over the positions, and a linear head: (B, L) -> (B, K).

    Args:
        num_classes: K.
        pooling: What stands for the sequence: each channel's maximum, its mean, or the last position. Padding is
            left out.
        average_strands: See ``StrandClassifier``.
        language: Weight of a second loss, nats of the next base, which trains the backbone on every position; 0 leaves
            it and its head out.
        kmer: Bases of the k-mers that the backbone reads beside single bases (``genomics.kmers``); 0 is none.
        kmer_width: Width of their vectors.
        sizes: Arguments of ``GenomeLM``.

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        pooling: Pooling = "max",
        average_strands: bool = True,
        language: float = 0.0,
        kmer: int = 0,
        kmer_width: int = 64,
        **sizes: Any,
    ) -> None:
        super().__init__(average_strands)
        self.num_classes = num_classes
        self.pooling: Pooling = pooling
        plain = GenomeLM(**sizes).backbone
        self.backbone = KmerBackbone(plain, kmer, kmer_width) if kmer else plain
        self.head = nn.Linear(sizes["d_model"], num_classes)
        self.language = language
        if language:
            self.next_base = nn.Linear(sizes["d_model"], T - A + 1)

    def loss(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy of sequences (B, L) with their classes (B,), and what ``language`` adds."""
        hidden = self.backbone(ids)
        loss = F.cross_entropy(self.score_states(hidden, ids), classes)
        if not self.language:
            return loss
        wanted = torch.where((ids >= A) & (ids <= T), ids - A, -1)[:, 1:]
        logits = self.next_base(hidden[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum")
        return loss + self.language * nats / (wanted >= 0).sum().clamp(min=1)

    def score_states(self, hidden: Tensor, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """Score sequences whose hidden states are known.

        Args:
            hidden: (B, L, D).
            ids: (B, L), right-padded with [PAD].
            before: (B, 1, D) hidden state before them, of pieces of a sequence; a head over pooled states has no use
                for it.

        Returns:
            Logits (B, K).
        """
        return self.head(pool(hidden, ids != PAD, self.pooling))

    def _score(self, ids: Tensor) -> Tensor:
        return self.score_states(self.backbone(ids), ids)


def pool(hidden: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """Reduce positions to one vector a sequence.

    Args:
        hidden: (B, L, D).
        real: (B, L) bool, False at right padding; a row has one real position at least.
        pooling: ``max``, ``mean`` or ``last``.

    Returns:
        (B, D).
    """
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), real.sum(1) - 1]
    if pooling == "mean":
        return (hidden * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True)
    return hidden.masked_fill(~real.unsqueeze(2), float("-inf")).amax(1)


def load_backbone(model: GenomeClassifier, path: str | Path) -> None:
    """Take over the backbone of a pretrained language model.

    Args:
        model: The classifier.
        path: A checkpoint (``.ckpt``) or run folder of ``genomics.pretrain``, or a file of weights (``.safetensors``,
            ``.bin``).

    Raises:
        UserError: If the file is none of these, or holds a model of another kind or size.
    """
    path = checkpoint_of(Path(path).expanduser())
    state = read_checkpoint(path)[0] if path.suffix == ".ckpt" else read_weights(path)
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not backbone:
        raise UserError(f"{path} holds no backbone of a language model; give a checkpoint of genomics.pretrain")
    if isinstance(model.backbone, KmerBackbone):  # language models read bases alone
        own = model.backbone.state_dict()
        backbone = {name: own[name] for name in own if name.startswith(("kmers.", "from_kmers."))} | backbone
    load_into(model.backbone, backbone, str(path))


def checkpoint_of(path: Path) -> Path:
    """The best or last checkpoint of a run folder; any other path as it is."""
    found = (path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    return next((file for file in found if file.is_file()), path) if path.is_dir() else path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a training checkpoint: the net's weights, and the options it was built with.

    Raises:
        UserError: If the file is missing or something else.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; wanted the .ckpt file of a run of genomics.pretrain or .classify")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(checkpoint["state_dict"])
    except Exception as error:  # torch raises half a dozen kinds for files that are something else
        first = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no checkpoint of a training run ({first}); give a .ckpt file of one") from error
    weights = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    return weights, dict(checkpoint.get("hyper_parameters", {}))
