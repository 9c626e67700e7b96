"""The configuration of a Mamba language model, as published files hold it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# The types of fields: whether a value is of one, and how a message calls it.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_whole, "a whole number"),
    "dict[str, Any]": (lambda value: isinstance(value, Mapping), "an object with named entries"),
    "list[int]": (lambda value: isinstance(value, Sequence) and all(map(_whole, value)), "a list of whole numbers"),
}
LEAST = {"d_model": 1, "d_intermediate": 0, "n_layer": 0, "vocab_size": 1, "pad_vocab_size_multiple": 1}


@dataclass
class MambaConfig:
    """The published configuration of a Mamba language model.

    Args:
        d_model: Width D.
        d_intermediate: Hidden width of the gated MLP of each block; 0 leaves the MLP out.
        n_layer: Number of blocks.
        vocab_size: Number of tokens V, before padding.
        ssm_cfg: Arguments of the mixer, and under ``layer`` its published name: Mamba1 (if there is none), Mamba2 or
            Mamba3. ``chunk_size`` and ``use_mem_eff_path`` are accepted for the sake of published files.
        attn_layer_idx: Blocks that hold attention instead.
        attn_cfg: Arguments of attention, which is causal here whatever they say.
        rms_norm: RMSNorm; otherwise LayerNorm.
        residual_in_fp32: Keep the residual stream in float32.
        fused_add_norm: Accepted for the sake of published files: addition and norm are always one kernel here, the
            function is the same.
        pad_vocab_size_multiple: The embedding's rows are padded to a multiple of it.
        tie_embeddings: The head's weight is the embedding's.

    Raises:
        ValueError: For a value of another type, or out of range.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            fits, wanted = KINDS[str(entry.type)]
            if not fits(value):
                raise ValueError(f"{entry.name}: got {value!r}, wanted {wanted}")
            if entry.name in LEAST and value < LEAST[entry.name]:
                raise ValueError(f"{entry.name}: got {value}, wanted at least {LEAST[entry.name]}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


def config_from_dict(values: Mapping[str, Any]) -> MambaConfig:
    """The configuration that a JSON file holds, checked by name.

    Raises:
        ValueError: For a key that ``MambaConfig`` does not have, naming the nearest one.
    """
    known = list(MambaConfig.__dataclass_fields__)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"wanted some of {known}"
            raise ValueError(f"MambaConfig has no field {key!r}; {hint}")
    return MambaConfig(**values)
