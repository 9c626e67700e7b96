"""SaShiMi checkpoints that the authors' repository wrote, whole: with encoder and decoder, sizes read off the weights.

Legend: D width of a stage, S samples pooled into one, Q levels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.codec import Codec
from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from audio.sashimi_layouts import from_published
from audio.trained import Trained
from core.checkpoints import load_into
from core.errors import UserError

ENDS = {  # ours -> theirs, the first of which there is one
    "embedding.weight": ("encoder.0.weight", "encoder.weight"),
    "head.weight": ("decoder.0.output_transform.weight", "decoder.output_transform.weight"),
    "head.bias": ("decoder.0.output_transform.bias", "decoder.output_transform.bias"),
}
POOLING = re.compile(r"d_layers\.(\d+)\.linear\.bias")


def load_published(path: Path, codec: Codec, sample_rate: int = 16000) -> Trained:
    """Reads a checkpoint of the authors' repository (state-spaces/s4): SaShiMi with S4 or S4D layers over levels.

    Widths, depth, poolings, kind of layers and all else about the net are those of its weights. What its levels mean
    they do not say. The repository's S4D is discretised by zero-order hold unless its configuration says otherwise, of
    which weights show nothing.

    Args:
        path: A state_dict (.pt), or a Lightning checkpoint (.ckpt) that holds nothing but tensors and plain types.
        codec: What its levels mean: of SC09 and YouTubeMix mu-law, of Beethoven linear.
        sample_rate: In Hz.

    Raises:
        UserError: If it cannot be read, or holds something else.
    """
    state = _state(path)
    try:
        weights = {ours: _first(state, names) for ours, names in ENDS.items()}
        inner, config = convert(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no published SaShiMi over levels: {error}") from error
    weights |= {f"model.{name}": value for name, value in inner.items()}
    net = SoundNet(config, codec.levels)
    load_into(net, weights, str(path))
    return Trained(net.eval(), codec, sample_rate)


def _first(state: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    for name in names:
        if name in state:
            return state[name]
    raise ValueError(f"it has none of {', '.join(names)}")


def _state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"no published checkpoint at {path}; give a .pt or .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for files that are something else
        raise UserError(
            f"{path} holds more than tensors, or is no checkpoint; where it was made, keep its weights alone: "
            f"torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], SashimiConfig]:
    """Converts a published net to ``Sashimi``'s weights and sizes, without encoder and decoder.

    Args:
        state: A published state_dict, of any of the three layouts, with or without the prefix ``model.``.

    Raises:
        ValueError: If it is none.
    """
    names = [name.removeprefix("model.") for name in state]
    poolings = sorted(int(found[1]) for name in names if (found := POOLING.fullmatch(name)))
    if not poolings:
        raise ValueError("it has no poolings d_layers.*.linear")
    inner = from_published(state, len(poolings))
    dim = d_model = len(inner["norm.weight"])
    pool = []
    for i in poolings:
        out, taken = inner[f"d_layers.{i}.linear.weight"].shape
        pool.append(taken // dim)
        dim, expand = out, out // dim
    centre = {name.removeprefix("c_layers."): value for name, value in inner.items() if name.startswith("c_layers.")}
    mixers = [name.removesuffix("layer.D") for name in centre if name.endswith(".layer.layer.D")]
    hidden = [len(value) for name, value in centre.items() if name.endswith(".ff.0.0.bias")]
    config = SashimiConfig(
        d_model, len(mixers), tuple(pool), expand, mlp=hidden[0] // dim if hidden else 0,
        unet=len(poolings) < 1 + max(int(name.split(".")[1]) for name in inner if name.startswith("d_layers.")),
        **_mixer(centre, mixers[0]),
    )  # fmt: skip
    return inner, config


def _mixer(centre: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Kind and options of the layers, of the weights of one."""
    copies, states = centre[f"{prefix}layer.kernel.A_real"].shape
    dim, made = centre[f"{prefix}layer.D"].shape[-1], len(centre[f"{prefix}output_linear.0.bias"])
    options = {"d_state": 2 * states, "n_ssm": None if copies == dim else copies, "glu": made == 2 * dim}
    return {"mixer": "s4" if f"{prefix}layer.kernel.P" in centre else "s4d", "mixer_cfg": options}
