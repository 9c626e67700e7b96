"""Weights on disk: safetensors, written whole or not at all, and whatever others publish.

Pickled files are read as plain tensors only.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import UserError

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
    with replacing(Path(path), overwrite) as temporary:
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
        shards = read_json(path).get("weight_map")
        if not (isinstance(shards, dict) and shards and all(isinstance(shard, str) for shard in shards.values())):
            raise UserError(f"weights: {path} has no weight_map, wanted one of tensors' names and their files")
        shards = sorted(set(shards.values()))
        return {name: tensor for shard in shards for name, tensor in read_weights(path.parent / shard).items()}
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"weights: {path} is not a whole file of tensors ({first_line(error)})") from error
    except Exception as error:
        # pickle.UnpicklingError and whatever a stream of other bytes provokes in the unpickler
        raise UserError(
            f"weights: {path} is not a plain state_dict: it holds more than tensors, or is no file of PyTorch's; "
            "save a state_dict as safetensors"
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
    patterns = [CONFIG, "*.safetensors", "*.bin", "*.index.json", "generation_config.json", "tokenizer*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's, the network's and the file system's, all with one meaning here
        raise UserError(f"model: no folder {name}, and the hub does not give it: {first_line(error)}") from error


def find_weights(folder: Path) -> Path:
    """The file with the weights in a model's folder.

    Raises:
        UserError: If there is none.
    """
    for name in PUBLISHED_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"model: no weights in {folder}; wanted one of {', '.join(PUBLISHED_WEIGHTS)}")


def read_json(path: Path) -> dict[str, Any]:
    """The named entries of a JSON file.

    Raises:
        UserError: If it is something else.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # broken JSON or bytes that are no text
        raise UserError(f"{path}: not a JSON file ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a JSON {type(values).__name__}, wanted an object with named entries")
    return values


def check_absent(path: Path, overwrite: bool) -> None:
    """Raises ``UserError`` if the file exists and must not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another place, or ask for it to be overwritten")


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place at the end, or vanishes if writing fails."""
    check_absent(path, overwrite)
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


def first_line(error: BaseException) -> str:
    """The start of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
