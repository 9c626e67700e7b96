"""Weights of a Mamba layer's part in the order in which a block of the relay takes them: ``relay_layers.cuh``.

Legend: D width, E inner width of a mixer, N state, R dt rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from audio.tiles import TILE, half_tiles, padded, up_to
from core.mixers.mamba import decay_rates


def norm_vectors(norm: Any) -> list[Tensor]:
    """Scales and shifts of a LayerNorm, with zeros up to a whole tile."""
    size = up_to(len(norm.weight), TILE)
    return [padded(t.detach().float().cpu(), size) for t in (norm.weight, norm.bias)]


def part_of_layer(block: Any, inner: int, here: slice) -> list[Tensor]:
    """The weights of the channels ``here`` of a Mamba layer and its norm, of ``inner`` channels with zeros."""
    layer = block.layer
    D16, E, N, R = up_to(layer.d_model, TILE), layer.d_inner, layer.d_state, layer.dt_rank
    R4, N8 = up_to(R, 4), up_to(N, 8)

    def wide(tensor: Tensor, *sizes: int) -> Tensor:
        return padded(tensor.detach().float().cpu(), *sizes)

    bias = layer.in_proj.weight.new_zeros(2 * E) if layer.in_proj.bias is None else layer.in_proj.bias
    both = [wide(part, inner, D16)[here] for part in layer.in_proj.weight.split(E)]
    low = [
        wide(t, size, inner)[:, here]
        for t, size in zip(layer.x_proj.weight.split([R, N, N]), (R4, N8, N8), strict=True)
    ]
    low = padded(torch.cat(low), up_to(R4 + 2 * N8, TILE), low[0].shape[1])
    conv = layer.conv1d
    first = conv.weight.new_zeros(E) if conv.bias is None else conv.bias
    taps = torch.cat([first[None], conv.weight.squeeze(1).t()])
    vectors = [*bias.split(E), *taps, layer.dt_proj.bias, layer.D]
    decays = (decay_rates(layer.A_log.detach()).double() / math.log(2)).float()
    out = wide(layer.out_proj.weight, D16, inner)[:, here]
    out_bias = layer.out_proj.weight.new_zeros(layer.d_model) if layer.out_proj.bias is None else layer.out_proj.bias
    return [
        *norm_vectors(block.norm),
        half_tiles(torch.cat(both)), half_tiles(out.contiguous()), half_tiles(low.contiguous()),
        *(wide(vector, inner)[here] for vector in vectors),
        wide(layer.dt_proj.weight, inner, R4)[here], wide(decays, inner, N8)[here], wide(out_bias, D16),
    ]  # fmt: skip
