"""Converts the published layouts of SaShiMi's weights to that of ``audio.sashimi.Sashimi``: pure functions on dicts.

The authors published three that hold the same model: a standalone one, whose linear layers are convolutions of width
1; that of the paper's experiments, whose poolings are transposed and weight-normalised; and a later U-Net with the same
poolings, plain, and one flat list of layers for the way up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from core.mixers.s4_layouts import from_published as s4_from_published


def from_published(state: Mapping[str, Tensor], stages: int | None = None) -> dict[str, Tensor]:
    """A published state_dict, of any of the three layouts, as that of ``Sashimi``.

    Args:
        state: The backbone's state_dict; a prefix ``model.`` is dropped, encoder and decoder are left out.
        stages: Number of poolings; needed where the way up is one flat list.

    Returns:
        The state_dict of ``Sashimi``.

    Raises:
        ValueError: If it holds no SaShiMi, or the way up is flat and ``stages`` does not divide it.
    """
    state = {k.removeprefix("model."): v for k, v in state.items() if not k.startswith(("encoder.", "decoder."))}
    if not any(k.startswith("c_layers.") for k in state):
        names = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(f"state: got {names}, wanted d_layers, c_layers, u_layers and norm of a SaShiMi")
    state = s4_from_published(_nested(_pooling(state), stages))
    return {k: v.squeeze(-1) if ".ff." in k and v.ndim == 3 else v for k, v in state.items()}


def _pooling(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Poolings as plain linear layers ``linear.{weight (out, in), bias}``."""
    result = {}
    for key, value in state.items():
        if key.endswith("linear.weight_v"):
            g = state[key.removesuffix("v") + "g"]
            value, key = _weight_norm(g, value).t(), key.removesuffix("_v")
        elif key.endswith("linear.weight_g"):
            continue
        elif re.search(r"_layers\.[\d.]+\.linear\.weight$", key):
            value = value.squeeze(-1) if value.ndim == 3 else value.t()  # a convolution, or a transposed layer
        result[key] = value
    return result


def _weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """The weight of a weight-normalised layer: v / |v| g, with a norm for each entry of g (Salimans & Kingma 2016)."""
    others = [d for d in range(v.ndim) if g.shape[d] == 1]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _nested(state: Mapping[str, Tensor], stages: int | None) -> dict[str, Tensor]:
    """The way up as a list for each stage: ``u_layers.stage.layer.*``."""
    flat = re.compile(r"u_layers\.(\d+)\.(?!\d)(.+)")
    if not any(flat.match(k) for k in state):
        return dict(state)
    count = 1 + max(int(m[1]) for k in state if (m := flat.match(k)))
    if not stages or count % stages:
        raise ValueError(
            f"stages: got {stages}, wanted the number of poolings, a divisor of the {count} layers upwards"
        )
    each, result = count // stages, {}
    for key, value in state.items():
        found = flat.match(key)
        if found:
            stage, layer = divmod(int(found[1]), each)
            key = f"u_layers.{stage}.{layer}.{found[2]}"
        result[key] = value
    return result
