"""The published functions by ours, and the references that their tests import.

B batch, D channels, L length, N state, G groups, R dt rank.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import selective_scan
from kernels.compat import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn

__all__ = ["mamba_inner_fn", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref"]


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Our reference op with channels before tokens; the arguments are those of ``selective_scan_fn``."""
    u, delta = (torch.einsum("bdl->bld", t) for t in (u, delta))
    z = None if z is None else torch.einsum("bdl->bld", z)
    y, state = selective_scan(
        u, delta, A, _tokens_first(B, A), _tokens_first(C, A), D, z, delta_bias,
        dt_softplus=delta_softplus, return_final_state=True, backend="reference",
    )  # fmt: skip
    y = torch.einsum("bld->bdl", y)
    return (y, state) if return_last_state else y


def _tokens_first(t: Tensor, A: Tensor) -> Tensor:
    """``(B, N, L)`` or ``(B, G, N, L)`` to ``(B, L, G, N)``; pairs of reals become complex numbers for complex A."""
    if t.ndim == 2:
        return t
    if A.is_complex():
        wide = t if t.dtype == torch.float64 else t.float()
        t = torch.complex(wide[..., 0::2], wide[..., 1::2])
    return torch.einsum("bgnl->blgn", t if t.ndim == 4 else t[:, None])


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """The inside of a Mamba block step by step; the arguments are those of ``mamba_inner_fn``.

    Made of the functions under test, as the published one is: the tests' inputs lead to values of a million, where
    another order of summation alone would pass the tolerances.
    """
    x, z = xz.chunk(2, dim=1)
    x = cast(Tensor, causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu"))
    parts = 2 if A.is_complex() else 1
    widths = [delta_proj_weight.shape[1], *(A.shape[1] * parts for given in (B, C) if given is None)]
    low, *columns = F.linear(torch.einsum("bdl->bld", x), x_proj_weight).split(widths, -1)
    terms = []
    for given, bias in ((B, B_proj_bias), (C, C_proj_bias)):
        if given is None:
            projected = columns.pop(0) if bias is None else columns.pop(0) + bias
            given = torch.einsum("blnp->bnlp", projected.unflatten(-1, (-1, parts))).flatten(-2)
        terms.append(given)
    delta = torch.einsum("bld->bdl", F.linear(low, delta_proj_weight))
    y = cast(Tensor, selective_scan_fn(x, delta, A, *terms, D, z, delta_bias, delta_softplus))
    return F.linear(torch.einsum("bdl->bld", y), out_proj_weight, out_proj_bias)
