"""Weights on disk: safetensors beside a JSON configuration, and the layouts that others publish.

A model folder holds ``config.json`` and ``model.safetensors``. Published folders of mamba_ssm (``pytorch_model.bin``)
and of transformers (``*-hf``, also in shards) are read too; pickled files only as plain tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import UserError
from core.lm import MambaConfig, MambaLM, config_from_dict

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# In the order of preference: safe before pickled, one file before shards.
PUBLISHED_WEIGHTS = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def save_weights(
    state: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None, overwrite: bool = False
) -> None:
    """Writes tensors to one safetensors file, whole or not at all.

    Tensors that share storage (tied weights) are written under each of their names.

    Args:
        state: Names and tensors.
        path: The file.
        metadata: Strings for the file's header.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UserError: If the file exists and ``overwrite`` is False.
    """
    # Clones: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    with _replacing(Path(path), overwrite) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, a pickled one, or an index of shards (``*.index.json``), on the CPU.

    Raises:
        UserError: If the file is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}; wanted .safetensors, a pickled state_dict, or an index of shards")
    if path.name.endswith(".index.json"):
        shards = sorted(set(_read_json(path).get("weight_map", {}).values()))
        return {name: tensor for shard in shards for name, tensor in read_weights(path.parent / shard).items()}
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"weights: {path} is not a whole file of tensors ({_first_line(error)})") from error
    except Exception as error:
        # pickle.UnpicklingError and whatever a stream of other bytes provokes in the unpickler
        raise UserError(
            f"weights: {path} is not a plain state_dict ({_first_line(error)}); save it again as safetensors"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"weights: {path} holds {type(state).__name__} with more than tensors, wanted a state_dict")
    return dict(state)


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a state_dict that must fit exactly; the model stays as it is if it does not.

    Args:
        model: Where the weights go.
        state: Names and tensors.
        source: Where they come from, for the message.

    Raises:
        UserError: One message with every missing, unexpected and misshapen entry (the first few of each kind).
    """
    wanted = model.state_dict()
    problems = [
        _listing("missing", [name for name in wanted if name not in state]),
        _listing("unexpected", [name for name in state if name not in wanted]),
        _listing(
            "wrong shape",
            [
                f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
    ]
    found = "; ".join(filter(None, problems))
    if found:
        raise UserError(
            f"weights: {source} does not fit {type(model).__name__}: {found}. "
            "Is it the checkpoint of another model or size?"
        )
    model.load_state_dict(state)


def save_lm(model: MambaLM, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a language model's configuration and weights to a folder, which is made if needed.

    Args:
        model: The model.
        folder: Where to.
        overwrite: Whether a model already there may be replaced.

    Raises:
        UserError: If one of the files exists and ``overwrite`` is False; nothing is written then.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        _check_absent(folder / name, overwrite)
    save_weights(model.state_dict(), folder / WEIGHTS, overwrite=overwrite)
    with _replacing(folder / CONFIG, overwrite) as temporary:
        temporary.write_text(json.dumps(asdict(model.config), indent=2) + "\n")


def load_lm(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    model_class: type[MambaLM] = MambaLM,
) -> MambaLM:
    """Reads a language model from a folder: this project's, mamba_ssm's or transformers' layout.

    Args:
        folder: The folder with ``config.json`` and the weights.
        device: Where the model goes.
        dtype: Its dtype; the default one where not given. Parameters that are float32 by design stay so.
        model_class: The class to build.

    Raises:
        UserError: If a file is missing or the weights are those of another model.
    """
    folder = Path(folder)
    config = read_config(folder)
    state = rename_transformers(read_weights(_find_weights(folder)))
    if config.tie_embeddings:
        state = complete_tied_head(state)
    try:
        model = model_class(config, device=device, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    load_into(model, state, str(folder))
    return model


def read_config(folder: str | Path) -> MambaConfig:
    """Reads ``config.json`` of a folder in any of the three layouts.

    Raises:
        UserError: If the file is missing, is no JSON, or describes a model that is not a Mamba language model.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"model: no {path}; wanted a folder with {CONFIG} and the weights ({WEIGHTS})")
    values = _read_json(path)
    try:
        return config_from_transformers(values) if "model_type" in values else config_from_dict(values)
    except KeyError as error:
        raise UserError(f"{path}: no entry {error}, wanted the configuration of a Mamba language model") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def config_from_transformers(values: Mapping[str, Any]) -> MambaConfig:
    """The configuration of a transformers ``MambaForCausalLM``, as published in the ``*-hf`` folders.

    Raises:
        ValueError: If it describes another model, or an option that a Mamba language model does not have.
    """
    if values["model_type"] != "mamba":
        raise ValueError(f'model_type: got {values["model_type"]!r}, wanted "mamba"')
    for key, wanted in (("layer_norm_epsilon", 1e-5), ("hidden_act", "silu")):
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{key}: got {values[key]!r}, wanted {wanted!r}, the only one of the published models")
    d_model, expand = values["hidden_size"], values.get("expand", 2)
    if values.get("intermediate_size", expand * d_model) != expand * d_model:
        expand = values["intermediate_size"] / d_model
    ssm_cfg = {
        "d_state": values.get("state_size", 16),
        "d_conv": values.get("conv_kernel", 4),
        "expand": expand,
        "dt_rank": values.get("time_step_rank", "auto"),
        "conv_bias": values.get("use_conv_bias", True),
        "bias": values.get("use_bias", False),
    }
    return MambaConfig(
        d_model=d_model,
        n_layer=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        ssm_cfg=ssm_cfg,
        residual_in_fp32=values.get("residual_in_fp32", True),
        pad_vocab_size_multiple=1,  # vocab_size counts the padding already
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def rename_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns transformers' names into the published ones; only ``backbone.embeddings`` differs."""
    return {name.replace("backbone.embeddings.", "backbone.embedding."): tensor for name, tensor in state.items()}


def complete_tied_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the head's weight where a file holds the tied one under the embedding's name only."""
    state = dict(state)
    if "backbone.embedding.weight" in state:
        state.setdefault("lm_head.weight", state["backbone.embedding.weight"])
    return state


def download(name: str) -> Path:
    """Fetches a model's configuration and weights from the Hugging Face hub, or finds them in its cache.

    Raises:
        UserError: If huggingface_hub is not installed, or the model cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"model: no folder {name}, and huggingface_hub, which would fetch it by that name, is not installed; "
            "give a local folder or run `pip install huggingface_hub`"
        ) from error
    patterns = [CONFIG, "*.safetensors", "*.bin", "*.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's, the network's and the file system's, all with one meaning here
        raise UserError(f"model: no folder {name}, and the hub does not give it: {error}") from error


def _find_weights(folder: Path) -> Path:
    for name in PUBLISHED_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"model: no weights in {folder}; wanted one of {', '.join(PUBLISHED_WEIGHTS)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # broken JSON or bytes that are no text
        raise UserError(f"{path}: not a JSON file ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a JSON {type(values).__name__}, wanted an object with named entries")
    return values


def _check_absent(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another place, or ask for it to be overwritten")


@contextlib.contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place at the end, or vanishes if writing fails."""
    _check_absent(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _listing(kind: str, names: list[str], most: int = 4) -> str:
    if not names:
        return ""
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind} ({', '.join(names[:most])}{rest})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
