"""Turns a published checkpoint into safetensors for timm: ``python -m vision.convert FILE``."""

import difflib
import sys
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

from core.cli import run
from core.errors import UserError
from vision.models.loading import read, unwrap
from vision.module import our_models

CLASSIFIERS = ("head", "head.fc", "head.1", "classifier.head", "cls_head.fc_cls", "backbone.head")


def convert(file: str, model: str | None = None, out: str | None = None, overwrite: bool = False) -> None:
    """Writes the weights of a published file under our names; ``timm.create_model(..., checkpoint_path=)`` takes them.

    Plain weights are taken where a file also holds averaged ones: published accuracies are those of the plain ones.

    Args:
        file: A published checkpoint (.pth, .ckpt, .safetensors) of one of this project's models.
        model: Name of its model; None finds it by the names and shapes in the file.
        out: File to write instead of FILE with the ending .safetensors.
        overwrite: Replace that file if it exists.
    """
    source = Path(file).expanduser()
    target = source.with_suffix(".safetensors") if out is None else Path(out).expanduser()
    if target.suffix != ".safetensors":
        raise UserError(f"--out {target}: wanted a name that ends in .safetensors")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; name another file with --out, or replace it with --overwrite true")
    weights = _read(source)
    name, state, classes = find_model(weights, source, model)
    tensors = {key: value.contiguous().clone() for key, value in state.items()}
    save_file(tensors, target, {"model": name, "num_classes": str(classes)})
    print(f"{name}, {len(state)} tensors, {sum(v.numel() for v in state.values()):,} numbers")
    print(f"timm.create_model({name!r}, num_classes={classes}, checkpoint_path={str(target)!r})")
    print(target)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file}: no such file, wanted a published checkpoint")
    try:
        raw = read(file)
    except Exception as error:  # whatever a foreign file makes the unpickler raise
        raise UserError(f"{file}: not a file of weights ({str(error).strip().splitlines()[0]})") from error
    weights = unwrap(raw) if isinstance(raw, dict) else {}
    if not weights:
        raise UserError(f"{file}: no tensors in it, wanted a published checkpoint")
    return weights


def find_model(weights: dict[str, Tensor], file: Path, model: str | None) -> tuple[str, dict[str, Tensor], int]:
    """The model that weights belong to, the weights under its names, and its number of classes.

    Raises:
        UserError: If they fit no model, or not the one named.
    """
    classes = next((len(weights[f"{c}.weight"]) for c in CLASSIFIERS if f"{c}.weight" in weights), 1000)
    if model is not None and model not in timm.list_models():
        raise UserError(f"--model {model}: unknown, wanted one of {', '.join(our_models())}")
    fits: list[tuple[int, str, dict[str, Tensor]]] = []
    reason = ""
    likely = sorted(our_models(), key=lambda name: -difflib.SequenceMatcher(None, name, file.stem).ratio())
    for name in likely if model is None else [model]:
        net = timm.create_model(name, num_classes=classes, device="meta")
        try:
            state = converted(weights, name, net)
        except (ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            continue
        fits.append((_resampled(weights, net), name, state))
        if fits[-1][0] == 0:
            break
    if not fits:
        if model is not None:
            raise UserError(f"{file}: --model {model}: {reason[:400]}")
        raise UserError(f"{file}: no model has its names and shapes; wanted a file of {', '.join(our_models())}")
    _, name, state = min(fits, key=lambda fit: fit[0])
    return name, state, classes


def converted(weights: dict[str, Tensor], name: str, net: nn.Module) -> dict[str, Tensor]:
    """Weights as a model of ours takes them.

    Raises:
        ValueError: If they are another model's.
    """
    module: Any = sys.modules[timm.model_entrypoint(name).__module__]
    state = module.checkpoint_filter_fn(dict(weights), net)
    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    if wanted != {k: tuple(v.shape) for k, v in state.items()} or any(v.is_meta for v in state.values()):
        raise ValueError("its names or shapes are another model's")
    return state


def _resampled(weights: dict[str, Tensor], net: nn.Module) -> int:
    """Rows of position embeddings that a model has more or less than the file: zero for the model it was saved from."""
    own = net.state_dict().get("pos_embed")
    theirs = next((v for k, v in weights.items() if k.endswith("pos_embed")), own)
    return 0 if own is None or theirs is None else abs(own.shape[1] - theirs.shape[1])


if __name__ == "__main__":
    run(convert)
