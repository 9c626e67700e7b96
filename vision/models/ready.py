"""The weights of Vim's mixers as its kernels take them, made ready for all layers at once where there are no gradients.

Dimension letters: E inner width, N state, R dt rank, W convolution width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.mixers.mamba import decay_rates

if TYPE_CHECKING:
    from vision.models.mixer import RouteMixer

__all__ = ["Ready", "filled_up", "make_ready"]


class Ready(NamedTuple):
    """Weights of a ``RouteMixer`` as products and ``scan_ways`` take them."""

    in_proj: Tensor
    out_proj: Tensor
    ways: list[list[Tensor]]


def filled_up(x_weight: Tensor, dt_weight: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """x_proj's weight (..., R + 2 N, E) with more rows of zeros and dt_proj's (..., E, R) with columns, as many.

    Rows and ranks that are no multiple of 16 bytes take the GPU's slow products.
    """
    more = -R % 8
    return (F.pad(x_weight, [0, 0, 0, more]), F.pad(dt_weight, [0, more])) if more > 0 else (x_weight, dt_weight)


def make_ready(mixers: Sequence["RouteMixer"], dtype: torch.dtype) -> list[Ready]:
    """The weights of mixers of one size, cast, filled up and scaled all at once: one by one that is 19 kernels a layer.

    Args:
        mixers: Of the layers.
        dtype: Of the products.
    """
    first = mixers[0]
    weights = [[m.in_proj.weight for m in mixers], [m.out_proj.weight for m in mixers]]
    in_proj, out_proj = (torch.empty(len(w), *w[0].shape, dtype=dtype, device=w[0].device) for w in weights)
    torch._foreach_copy_([*in_proj, *out_proj], [*weights[0], *weights[1]])  # pyright: ignore[reportPrivateImportUsage]
    out_proj /= first.K
    flat = [way for mixer in mixers for way in mixer.ways()]
    A = decay_rates(torch.stack([way[0] for way in flat]))
    x_weight, dt_weight = (torch.stack([way[i] for way in flat]).to(dtype) for i in (4, 5))
    x_weight, dt_weight = filled_up(x_weight, dt_weight, first.dt_rank)
    ways = [
        [A[i], D, conv.squeeze(1), bias, x_weight[i], dt_weight[i], dt_bias]
        for i, (_, D, conv, bias, _, _, dt_bias) in enumerate(flat)
    ]
    K = first.K
    return [Ready(in_proj[i], out_proj[i], ways[i * K : (i + 1) * K]) for i in range(len(mixers))]
