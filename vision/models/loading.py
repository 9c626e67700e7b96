"""Checkpoints of other programs: unwrapped, and refused in one message where they belong to another model."""

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

# Official files hold the options of their run beside the weights, as an argparse.Namespace: plain data.
torch.serialization.add_safe_globals([argparse.Namespace])


class _ConfigNode:
    """What yacs' configurations become when they are read: dictionaries, so that yacs need not be there."""

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


def configurations() -> AbstractContextManager[None]:
    """Inside it ``torch.load(weights_only=True)`` takes files that hold a yacs configuration too, as VMamba's do.

    Nothing of such a file is run: a configuration is read as a dictionary.
    """
    return torch.serialization.safe_globals([(_ConfigNode, "yacs.config.CfgNode")])


def read(path: str | Path) -> Any:
    """What is in a file of weights, ``.safetensors`` or one of ``torch.save``, on the CPU."""
    if Path(path).suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with configurations():
        return torch.load(path, "cpu", weights_only=True)


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, without the wrappings and prefixes of training programs.

    Published accuracies are those of ``model``; ``model_ema`` is taken where there is nothing else.
    """
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "net."):
        while weights and all(name.startswith(prefix) for name in weights):  # an average of a wrapped model has two
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def fit_to_model(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights themselves, if ``model`` can load them.

    A classifier of another number of classes is left to timm, which drops it when the model asks for a new one; a first
    convolution of other channels likewise.

    Raises:
        ValueError: Listing missing and unexpected names and wrong shapes, if any.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    cfg = getattr(model, "pretrained_cfg", {})
    ours = {f"{cfg.get('classifier')}.weight", f"{cfg.get('classifier')}.bias", f"{cfg.get('first_conv')}.weight"}
    if getattr(model, "num_classes", None) == cfg.get("num_classes"):
        ours = {f"{cfg.get('first_conv')}.weight"} if getattr(model, "in_chans", 3) != cfg["input_size"][0] else set()
    missing = [name for name in wanted if name not in weights and name not in ours]
    unexpected = [name for name in weights if name not in wanted and name not in ours]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in weights and name not in ours and tuple(weights[name].shape) != shape
    ]
    if not (missing or unexpected or shapes):
        return weights
    faults = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    raise ValueError(
        f"the checkpoint is not one of {cfg.get('architecture', type(model).__name__)}: got {'; '.join(faults)}. "
        "Wanted its parameters by their published names; choose the model that the checkpoint was trained with"
    )
