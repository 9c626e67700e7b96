"""What released HyenaDNA checkpoints look like, turned into this project's configuration and names."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genomics.hyenadna import HyenaDNAConfig


def config_from_published(values: Mapping[str, Any]) -> HyenaDNAConfig:
    """The configuration in a published ``config.json``, of the original layout or transformers'.

    Raises:
        ValueError: For an entry that does not exist or is not supported.
    """
    if values.get("model_type") == "hyenadna" or "max_seq_len" in values:
        return _from_transformers(values)
    known = list(HyenaDNAConfig.__dataclass_fields__)
    dropped = {"return_hidden_state", "_name_", "model_type"}
    for key in values:
        if key not in known and key not in dropped:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"wanted some of {known}"
            raise ValueError(f"HyenaDNA has no argument {key!r}; {hint}")
    return HyenaDNAConfig(**{key: value for key, value in values.items() if key in known})


def _from_transformers(values: Mapping[str, Any]) -> HyenaDNAConfig:
    layer = {
        "l_max": values["max_seq_len"],
        "order": values.get("hyena_order", 2),
        "filter_order": values.get("filter_order", 64),
        "short_filter_order": values.get("short_filter_order", 3),
        "emb_dim": values.get("emb_dim", 3),
        "w": values.get("activation_freq", 1),
        "num_inner_mlps": values.get("num_inner_mlps", 2),
        "train_freq": values.get("train_freq", True),
        "bias": values.get("use_bias", True),
        "dropout": values.get("hyena_dropout", 0.0),
        "filter_dropout": values.get("hyena_filter_dropout", 0.0),
        "lr_pos_emb": 0.0,
    }
    return HyenaDNAConfig(
        d_model=values["d_model"],
        n_layer=values["n_layer"],
        d_inner=values.get("d_inner"),
        vocab_size=values.get("vocab_size", 12),
        layer=layer,
        embed_dropout=values.get("embed_dropout", 0.1),
        layer_norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        initializer_cfg={"initializer_range": values.get("initializer_range", 0.02)},
        pad_vocab_size_multiple=values.get("pad_vocab_size_multiple", 8),
    )


def rename_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the names of released checkpoints into this model's.

    Dropped are the prefixes of Lightning (``model.``) and transformers (``hyena.``), the ``.layer`` that the published
    gradient checkpointing put into names, metrics, and heads that are no language model's.
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.").removeprefix("hyena.")
        name = name.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")
        if name.startswith(("backbone.", "lm_head.")):
            renamed[name] = tensor
    if "backbone.embeddings.word_embeddings.weight" in renamed:
        renamed.setdefault("lm_head.weight", renamed["backbone.embeddings.word_embeddings.weight"])
    return renamed
