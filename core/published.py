"""Language models on disk: this project's folders, and those that mamba_ssm and transformers publish.

A folder of ours holds ``config.json`` (the fields of ``MambaConfig``) and ``model.safetensors``. mamba_ssm's
(``pytorch_model.bin``) and transformers' (``MambaForCausalLM``, ``Mamba2ForCausalLM``, ``*-hf`` on the hub, also in
shards) are read as they are, and the latter is written too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.checkpoints import (
    CONFIG,
    WEIGHTS,
    check_absent,
    download,
    find_weights,
    load_into,
    read_json,
    read_weights,
    replacing,
    save_weights,
)
from core.config import MambaConfig, config_from_dict
from core.errors import UserError
from core.lm import MambaLM

Model = TypeVar("Model", bound=MambaLM)


def save_lm(model: MambaLM, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a language model's configuration and weights to a folder, which is made if needed.

    Args:
        model: The model.
        folder: Where to.
        overwrite: Whether a model already there may be replaced.

    Raises:
        UserError: If one of the files exists and ``overwrite`` is False; nothing is written then.
    """
    _write(Path(folder), asdict(model.config), model.state_dict(), overwrite)


def export_transformers(model: MambaLM, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a language model as transformers' ``MambaForCausalLM`` or ``Mamba2ForCausalLM``.

    transformers' Mamba-2 normalises over all channels where ``ngroups`` > 1, which is not the published model: such a
    model is written, but gives other logits there.

    Args:
        model: The model; without attention or MLPs, with RMSNorm.
        folder: Where to.
        overwrite: Whether a model already there may be replaced.

    Raises:
        UserError: If transformers has no such model, or as in ``save_lm``.
    """
    values = config_to_transformers(model.config, model.lm_head.weight.dtype)
    state = {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    _write(Path(folder), values, state, overwrite)


def _write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], overwrite: bool) -> None:
    for name in (CONFIG, WEIGHTS):
        check_absent(folder / name, overwrite)
    save_weights(state, folder / WEIGHTS, overwrite=overwrite)
    with replacing(folder / CONFIG, overwrite) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def load_lm(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    model_class: type[Model] = MambaLM,  # type: ignore[assignment]  a default cannot be of the caller's type
) -> Model:
    """Reads a language model in this project's, mamba_ssm's or transformers' layout.

    Args:
        name: A folder with ``config.json`` and the weights, or a name on the Hugging Face hub.
        device: Where the model goes.
        dtype: Its dtype; the default one where not given. Parameters that are float32 by design stay so.
        model_class: The class to build.

    Raises:
        UserError: If a file is missing or the weights are those of another model.
    """
    folder = find_folder(name)
    config = read_config(folder)
    state = rename_transformers(read_weights(find_weights(folder)))
    if config.tie_embeddings:
        state = complete_tied_head(state)
    try:
        model = model_class(config, device=device, dtype=dtype)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    except TypeError as error:  # the fields' own types are right
        raise UserError(f"{folder / CONFIG}: a value in ssm_cfg or attn_cfg is of the wrong type ({error})") from error
    load_into(model, state, str(folder))
    return model


def find_folder(name: str | Path) -> Path:
    """A model's folder: ``name`` itself, or what the hub has under that name.

    Raises:
        UserError: If there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model: {name} is a file; wanted the folder that holds it and {CONFIG}")
    if folder.is_absolute() or str(name).startswith(".") or len(folder.parts) != 2:
        raise UserError(f"model: no folder {name}; wanted one with {CONFIG}, or a name on the hub such as owner/model")
    return download(str(name))


def read_config(folder: str | Path) -> MambaConfig:
    """Reads ``config.json`` of a folder in any of the three layouts.

    Raises:
        UserError: If the file is missing, is no JSON, or describes a model that is not a Mamba language model.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"model: no {path}; wanted a folder with {CONFIG} and the weights ({WEIGHTS})")
    values = read_json(path)
    try:
        return config_from_transformers(values) if "model_type" in values else config_from_dict(values)
    except KeyError as error:
        raise UserError(f"{path}: no entry {error}, wanted the configuration of a Mamba language model") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except TypeError as error:  # of arithmetic on them
        raise UserError(f"{path}: a value is of the wrong type ({error})") from error


# Our arguments of a mixer and transformers' names for them, with transformers' defaults.
_COMMON = (
    ("d_state", "state_size", {"mamba": 16, "mamba2": 128}),
    ("d_conv", "conv_kernel", {"mamba": 4, "mamba2": 4}),
    ("expand", "expand", {"mamba": 2, "mamba2": 2}),
    ("conv_bias", "use_conv_bias", {"mamba": True, "mamba2": True}),
    ("bias", "use_bias", {"mamba": False, "mamba2": False}),
)
_OWN = {
    "mamba": (("dt_rank", "time_step_rank", "auto"),),
    "mamba2": (
        ("headdim", "head_dim", 64),
        ("ngroups", "n_groups", 8),
        ("rmsnorm", "rms_norm", True),
        ("dt_limit", "time_step_limit", (0.0, float("inf"))),
    ),
}
_LAYERS = {"mamba": "Mamba1", "mamba2": "Mamba2"}


def config_from_transformers(values: Mapping[str, Any]) -> MambaConfig:
    """The configuration of a transformers ``MambaForCausalLM`` or ``Mamba2ForCausalLM``.

    Raises:
        ValueError: If it describes another model, or an option that a Mamba language model does not have.
    """
    kind = values["model_type"]
    if kind not in _LAYERS:
        raise ValueError(f'model_type: got {kind!r}, wanted "mamba" or "mamba2"')
    for key, wanted in (("layer_norm_epsilon", 1e-5), ("hidden_act", "silu")):
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{key}: got {values[key]!r}, wanted {wanted!r}, the only one of the published models")
    d_model = values["hidden_size"]
    ssm_cfg = {ours: values.get(theirs, defaults[kind]) for ours, theirs, defaults in _COMMON}
    ssm_cfg |= {ours: values.get(theirs, default) for ours, theirs, default in _OWN[kind]}
    if "dt_limit" in ssm_cfg:  # since transformers 5 infinity is {"__float__": "Infinity"}
        limits = [limit["__float__"] if isinstance(limit, dict) else limit for limit in ssm_cfg["dt_limit"]]
        ssm_cfg["dt_limit"] = tuple(float(limit) for limit in limits)
    inner = ssm_cfg["expand"] * d_model
    if kind == "mamba" and values.get("intermediate_size", inner) != inner:
        ssm_cfg["expand"] = values["intermediate_size"] / d_model
    if kind == "mamba2" and values.get("num_heads", 128) * ssm_cfg["headdim"] != inner:
        raise ValueError(
            f"num_heads: got {values.get('num_heads', 128)}, wanted expand * hidden_size / head_dim = "
            f"{inner / ssm_cfg['headdim']:g}"
        )
    return MambaConfig(
        d_model=d_model,
        n_layer=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        ssm_cfg={"layer": _LAYERS[kind], **ssm_cfg},
        residual_in_fp32=values.get("residual_in_fp32", True),
        pad_vocab_size_multiple=1,  # vocab_size counts the padding already
        tie_embeddings=values.get("tie_word_embeddings", kind == "mamba"),
    )


def config_to_transformers(config: MambaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The entries of transformers' ``config.json`` for a model, the inverse of ``config_from_transformers``.

    Raises:
        UserError: If transformers has no such model.
    """
    name = config.ssm_cfg.get("layer", "Mamba1")
    kinds = {layer: kind for kind, layer in _LAYERS.items()}
    problems = [
        f"{what} = {value!r}"
        for what, value, bad in (
            ("ssm_cfg.layer", name, name not in kinds),
            ("attn_layer_idx", config.attn_layer_idx, bool(config.attn_layer_idx)),
            ("d_intermediate", config.d_intermediate, config.d_intermediate > 0),
            ("rms_norm", config.rms_norm, not config.rms_norm),
        )
        if bad
    ]
    kind = kinds.get(name, "mamba")
    default = MambaLM.mixers[_LAYERS[kind]]
    names = [(ours, theirs) for ours, theirs, _ in (*_COMMON, *_OWN[kind])]
    options = {ours: _argument(config, default, ours) for ours, _ in names}
    expressible = {*options, "layer", "chunk_size", "use_mem_eff_path"} | {"dt_min", "dt_max", "dt_init_floor"}
    for key, value in config.ssm_cfg.items():
        if key not in expressible and not problems and value != _argument(MambaConfig(), default, key):
            problems.append(f"ssm_cfg.{key} = {value!r}")
    if problems:
        raise UserError(f"transformers has no model with {', '.join(problems)}; save it with save_pretrained instead")
    inner = int(options["expand"] * config.d_model)
    values = {
        "architectures": ["MambaForCausalLM" if kind == "mamba" else "Mamba2ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        **{theirs: options[ours] for ours, theirs in names},
        "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "mamba":
        rank = options["dt_rank"]
        rank = -(-config.d_model // 16) if rank == "auto" else rank
        return {**values, "intermediate_size": inner, "time_step_rank": rank}
    limits = [float(limit) for limit in options["dt_limit"]]
    return {**values, "num_heads": inner // options["headdim"], "time_step_limit": limits}


def _argument(config: MambaConfig, mixer: Callable[..., Any], name: str) -> Any:
    """A mixer's argument in a configuration, or its default."""
    return config.ssm_cfg.get(name, inspect.signature(mixer).parameters[name].default)


def rename_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns transformers' names into the published ones; only ``backbone.embeddings`` differs."""
    return {name.replace("backbone.embeddings.", "backbone.embedding."): tensor for name, tensor in state.items()}


def complete_tied_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the head's weight where a file holds the tied one under the embedding's name only."""
    state = dict(state)
    if "backbone.embedding.weight" in state:
        state.setdefault("lm_head.weight", state["backbone.embedding.weight"])
    return state
