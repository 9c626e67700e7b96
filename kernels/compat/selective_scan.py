"""``selective_scan_fn`` and ``mamba_inner_fn`` of ``mamba_ssm.ops.selective_scan_interface``.

B batch, L length, D channels, N state, G groups, R dt rank, W conv width, M output width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.causal_conv1d import causal_conv1d
from kernels.checks import check_shape
from kernels.norm import norm
from kernels.selective_scan import selective_scan


def selective_scan_fn(
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
    """The selective scan (Gu & Dao 2023, algorithm 2).

    Args:
        u: ``(B, D, L)``.
        delta: ``(B, D, L)``.
        A: ``(D, N)``, real or complex.
        B: ``(B, N, L)`` or ``(B, G, N, L)``, constant ``(D, N)``; with complex A real ``(..., 2 L)``, real and
            imaginary parts in turn, or constant complex.
        C: As B; one of the two may have one group, the other more.
        D: ``(D,)``.
        z: Gate ``(B, D, L)``.
        delta_bias: ``(D,)``.
        delta_softplus: Whether delta goes through softplus.
        return_last_state: Whether to return the last state too.

    Returns:
        ``(B, D, L)`` in u's dtype, and the last state ``(B, D, N)`` if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    if u.ndim != 3:
        raise ValueError(f"u: got shape {tuple(u.shape)}, wanted (B, D, L)")
    check_shape("A", A, (u.shape[1], A.shape[-1]), "(D, N) as u (B, D, L)")
    check_shape("delta", delta, tuple(u.shape), "the shape of u")
    check_shape("z", z, tuple(u.shape), "the shape of u")
    B, C = _over_time("B", B, A, u), _over_time("C", C, A, u)
    if B.ndim == C.ndim == 4 and 1 in (B.shape[2], C.shape[2]):  # (B, N, L) beside (B, G, N, L)
        B, C = (t.expand(-1, -1, max(B.shape[2], C.shape[2]), -1) for t in (B, C))
    found = selective_scan(
        u.mT, delta.mT, A, B, C, D, None if z is None else z.mT, delta_bias,
        dt_softplus=delta_softplus, return_final_state=return_last_state,
    )  # fmt: skip
    if isinstance(found, tuple):
        return found[0].mT, found[1]
    return found.mT


def _over_time(name: str, t: Tensor, A: Tensor, u: Tensor) -> Tensor:
    """B or C ``(B, N, L)`` or ``(B, G, N, L)`` beside u ``(B, _, L)`` as ``(B, L, G, N)``; constants as they are."""
    if t.ndim == 2:
        return t
    pairs = A.is_complex() and not t.is_complex()
    if t.ndim not in (3, 4) or (t.shape[0], *t.shape[-2:]) != (u.shape[0], A.shape[1], u.shape[2] * (1 + pairs)):
        sizes = f"B = {u.shape[0]}, N = {A.shape[1]}, L = {u.shape[2]}"
        length = "2 L" if pairs else "L"
        wanted = f"(B, N, {length}), (B, G, N, {length}) or constant (D, N) with {sizes}"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {wanted}")
    if t.ndim == 3:
        t = t.unsqueeze(1)
    if pairs:
        t = _complex_pairs(t)
    return t.permute(0, 3, 1, 2)


def _complex_pairs(t: Tensor) -> Tensor:
    """Real ``(..., 2 n)``, real and imaginary parts in turn, as complex ``(..., n)``."""
    wide = t if t.dtype in (torch.float32, torch.float64) else t.float()  # there is no complex bfloat16
    return torch.complex(*wide.unflatten(-1, (-1, 2)).unbind(-1))  # no view: columns of a product begin anywhere


def mamba_inner_fn(
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
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The inside of a Mamba block: convolution, projections, scan, gate, output projection.

    Args:
        xz: ``(B, 2 D, L)``, input and gate.
        conv1d_weight: ``(D, 1, W)``.
        conv1d_bias: ``(D,)`` or None.
        x_proj_weight: ``(R + 2 N, D)``, ``(R + 4 N, D)`` for complex A; without the rows of a B or C that is given.
        delta_proj_weight: ``(D, R)``.
        out_proj_weight: ``(M, D)``.
        out_proj_bias: ``(M,)`` or None.
        A: ``(D, N)``, real or complex.
        B: Constant ``(D, N)``, or over time as in ``selective_scan_fn``; None: projected from the input.
        C: As B.
        D: ``(D,)`` or None.
        delta_bias: ``(D,)`` or None.
        B_proj_bias: Added to a projected B, ``(N,)`` (``(2 N,)`` for complex A).
        C_proj_bias: As B_proj_bias.
        delta_softplus: Whether delta goes through softplus.
        checkpoint_lvl: From 1 on, the backward computes everything from xz on again instead of keeping it.
        b_rms_weight: RMSNorm of B, ``(N,)``, as in FalconMamba.
        c_rms_weight: RMSNorm of C, ``(N,)``.
        dt_rms_weight: RMSNorm of the projected delta, ``(D,)``.
        b_c_dt_rms_eps: Of these norms.

    Returns:
        ``(B, L, M)``.

    Raises:
        ValueError: If a shape, dtype or device doesn't fit, or for complex A together with norms of B or C.
    """
    if A.is_complex() and not (b_rms_weight is None and c_rms_weight is None):
        raise ValueError("b_rms_weight, c_rms_weight: got complex A, wanted real; leave the norms of B and C out")
    rank, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)

    _check_inner(xz, conv1d_weight, x_proj_weight, A.shape[0], rank + width * ((B is None) + (C is None)))

    def b_or_c(
        name: str, given: Tensor | None, columns: Tensor, bias: Tensor | None, rms_weight: Tensor | None
    ) -> Tensor:
        if given is not None:
            return _over_time(name, given, A, xz)
        if bias is not None:
            columns = columns + bias.to(columns.dtype)
        if rms_weight is not None:
            columns = cast(Tensor, norm(columns, rms_weight, eps=b_c_dt_rms_eps))
        return (_complex_pairs(columns) if A.is_complex() else columns).unsqueeze(2)

    def inner(xz: Tensor) -> Tensor:
        x, z = xz.mT.chunk(2, dim=-1)
        x = cast(Tensor, causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu"))
        projected = F.linear(x, x_proj_weight)
        dt, dt_weight = projected[..., :rank], delta_proj_weight
        if dt_rms_weight is not None:  # between the projection and the scan, which then cannot project inside
            dt, dt_weight = norm(F.linear(dt, dt_weight), dt_rms_weight, eps=b_c_dt_rms_eps), None
        y = selective_scan(
            x, cast(Tensor, dt), A,
            b_or_c("B", B, projected[..., rank : rank + width], B_proj_bias, b_rms_weight),
            b_or_c("C", C, projected[..., -width:], C_proj_bias, c_rms_weight),
            D, z, delta_bias, dt_weight=dt_weight, dt_softplus=delta_softplus,
        )  # fmt: skip
        return F.linear(cast(Tensor, y), out_proj_weight, out_proj_bias)

    if checkpoint_lvl >= 1 and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(inner, xz, use_reentrant=False, preserve_rng_state=False))
    return inner(xz)


def _check_inner(xz: Tensor, conv1d_weight: Tensor, x_proj_weight: Tensor, channels: int, rows: int) -> None:
    """Raises unless the input and the first two weights of ``mamba_inner_fn`` fit A and what x_proj is to give."""
    if xz.ndim != 3 or conv1d_weight.ndim != 3:
        got = f"xz {tuple(xz.shape)} and conv1d_weight {tuple(conv1d_weight.shape)}"
        raise ValueError(f"xz, conv1d_weight: got shapes {got}, wanted (B, 2 D, L) and (D, 1, W)")
    check_shape("xz", xz, (xz.shape[0], 2 * channels, xz.shape[2]), "(B, 2 D, L) with A (D, N)")
    check_shape("conv1d_weight", conv1d_weight, (channels, 1, conv1d_weight.shape[2]), "(D, 1, W) with A (D, N)")
    check_shape("x_proj_weight", x_proj_weight, (rows, channels), "(R + the columns of B and C not given, D)")
