"""The inside of a Mamba-2 layer as one op that keeps little: convolution, SSD, norm, output projection.

Of what lies between the two projections only the SSD's output is kept, as wide as its input; the convolution, the gated
norm and the MLP beside them are computed again, which costs two passes over memory. Plain autograd keeps three times
as much. ``mamba2_inner`` is the function to call, ``torch.ops.triscan.mamba2_inner`` the custom op behind it.

B batch, L length, F channels of the scan, H heads, P head dim, N state, G groups, W conv width, C = F + 2 G N channels
of the convolution, M channels of the MLP, D output width, S packed sequences.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import causal_conv1d, norm, ssd  # noqa: F401  registers the ops that this one is made of
from kernels.checks import check_float, check_shape
from kernels.registration import Op, op

__all__ = ["mamba2_inner"]

DIFFERENTIABLE = 10  # the first so many arguments


def mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    headdim: int,
    ngroups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    reverse: bool = False,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs everything of a Mamba-2 layer behind its input projection (Dao & Gu 2024, section 7.1 and figure 6).

    Args:
        zxbcdt: ``(B, L, 2 M + 2 F + 2 G N + H)``: MLP gate and input, gate, x, B, C, dt.
        conv_weight: ``(C, W)``.
        conv_bias: ``(C,)`` or None.
        dt_bias: ``(H,)``.
        A: ``(H,)``, negative.
        D: ``(H,)`` or ``(H, P)``, or None.
        norm_weight: ``(F,)``; None: no norm, y is gated only.
        out_weight: ``(D, M + F)``.
        out_bias: ``(D,)`` or None.
        initial_state: ``(B, H, P, N)``, with ``cu_seqlens`` ``(S, H, P, N)``.
        headdim: P.
        ngroups: G; the norm works on groups of F / G channels.
        eps: Of the norm.
        norm_before_gate: norm(y) silu(z), else norm(y silu(z)).
        dt_limit: dt is clamped between these two, after the softplus.
        reverse: Scans and convolves from the last token to the first.
        return_final_state: Whether to return the scan's state after the last token.
        cu_seqlens: ``(S + 1,)`` bounds of packed sequences in a batch of one.
        seq_idx: ``(B, L)`` numbers of packed sequences, -1 for padding.
        backend: See ``kernels.backend``.

    Returns:
        ``(B, L, D)`` in zxbcdt's dtype, in which the output projection is computed, and the state if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit.
    """
    out, state, _, _, _ = _mamba2_inner(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, out_bias, initial_state, cu_seqlens,
        seq_idx, headdim, ngroups, eps, norm_before_gate, float(dt_limit[0]), float(dt_limit[1]), reverse,
        return_final_state, backend,
    )  # fmt: skip
    return (out, state) if return_final_state else out


class _Parts(NamedTuple):
    """The columns of zxbcdt, views."""

    mlp: Tensor  # (B, L, 2 M)
    z: Tensor  # (B, L, F)
    xbc: Tensor  # (B, L, C)
    dt: Tensor  # (B, L, H)


def _split(zxbcdt: Tensor, conv_weight: Tensor, A: Tensor, headdim: int) -> _Parts:
    heads, channels = A.shape[0], conv_weight.shape[0]
    scan = heads * headdim
    rest = zxbcdt.shape[-1] - scan - channels - heads
    return _Parts(*zxbcdt.split([rest, scan, channels, heads], dim=-1))


def _check(
    zxbcdt: Tensor, conv_weight: Tensor, dt_bias: Tensor, A: Tensor, norm_weight: Tensor | None, out_weight: Tensor,
    out_bias: Tensor | None, headdim: int, ngroups: int,
) -> None:  # fmt: skip
    """Raises unless the widths follow from each other; the ops inside check the rest."""
    check_float(zxbcdt, conv_weight=conv_weight, dt_bias=dt_bias, A=A, norm_weight=norm_weight, out_weight=out_weight)
    if zxbcdt.ndim != 3 or A.ndim != 1 or conv_weight.ndim != 2 or out_weight.ndim != 2:
        shapes = [tuple(t.shape) for t in (zxbcdt, conv_weight, A, out_weight)]
        raise ValueError(
            f"zxbcdt, conv_weight, A, out_weight: got shapes {shapes}, wanted (B, L, E), (C, W), (H,), (D, M + F)"
        )
    heads, channels = A.shape[0], conv_weight.shape[0]
    scan = heads * headdim
    if (channels - scan) % (2 * ngroups) or channels <= scan:
        raise ValueError(
            f"conv_weight: got {channels} channels, wanted H P + 2 G N with H P = {scan} and G = {ngroups}; "
            "check headdim and ngroups"
        )
    rest = zxbcdt.shape[-1] - scan - channels - heads
    if rest < 0 or rest % 2:
        raise ValueError(
            f"zxbcdt: got {zxbcdt.shape[-1]} columns, wanted 2 M + {scan + channels + heads}: "
            "MLP gate and input, z, x, B, C, dt"
        )
    check_shape("norm_weight", norm_weight, (scan,), "(H P,)")
    check_shape("out_weight", out_weight, (out_weight.shape[0], rest // 2 + scan), "(D, M + H P)")
    check_shape("out_bias", out_bias, (out_weight.shape[0],), "(D,)")


def _convolve(xbc: Tensor, weight: Tensor, bias: Tensor | None, cu: Tensor | None, idx: Tensor | None,
              reverse: bool, backend: str) -> Tensor:  # fmt: skip
    return Op.named["causal_conv1d"](xbc, weight, bias, None, None, cu, idx, "silu", reverse, False, backend)[0]


def _heads(xbc: Tensor, A: Tensor, headdim: int, ngroups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H, P), B and C (B, L, G, N) of the convolution's outputs."""
    scan = A.shape[0] * headdim
    size = (xbc.shape[-1] - scan) // 2
    x, B, C = xbc.split([scan, size, size], dim=-1)
    return x.unflatten(-1, (-1, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))


def _normed(y: Tensor, z: Tensor, weight: Tensor, ngroups: int, eps: float, first: bool, backend: str) -> Any:
    """Norm and gate of y (B, L, F), and the statistics."""
    y, _, mean, rstd = Op.named["norm"](
        y, weight, None, None, z, "rms", eps, y.shape[-1] // ngroups, first, True, backend
    )
    return y, mean, rstd


@op
def _mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    headdim: int,
    ngroups: int,
    eps: float,
    norm_before_gate: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the final state (empty if not asked for), and for the backward the SSD's output, mean and rstd."""
    _check(zxbcdt, conv_weight, dt_bias, A, norm_weight, out_weight, out_bias, headdim, ngroups)
    parts = _split(zxbcdt, conv_weight, A, headdim)
    xbc = _convolve(parts.xbc, conv_weight, conv_bias, cu_seqlens, seq_idx, reverse, backend)
    x, B, C = _heads(xbc, A, headdim, ngroups)
    gate = parts.z.unflatten(-1, (-1, headdim)) if norm_weight is None else None
    y, state = Op.named["ssd"](
        x, parts.dt, A, B, C, D, gate, dt_bias, None, initial_state, cu_seqlens, seq_idx, True, dt_min, dt_max, "sum",
        reverse, return_final_state, backend,
    )  # fmt: skip
    del xbc, x, B, C
    inner, mean, rstd = y.flatten(2), zxbcdt.new_empty(0), zxbcdt.new_empty(0)
    if norm_weight is not None:
        inner, mean, rstd = _normed(inner, parts.z, norm_weight, ngroups, eps, norm_before_gate, backend)
    inner = _with_mlp(parts.mlp, inner)
    bias = None if out_bias is None else out_bias.to(inner.dtype)
    return F.linear(inner, out_weight.to(inner.dtype), bias), state, y, mean, rstd


def _with_mlp(mlp: Tensor, inner: Tensor) -> Tensor:
    """[silu(gate) input, inner]."""
    if mlp.shape[-1] == 0:
        return inner
    gate, value = mlp.chunk(2, dim=-1)
    return torch.cat([F.silu(gate) * value, inner], dim=-1)


@_mamba2_inner.register_fake
def _(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, out_bias, initial_state, cu_seqlens,
    seq_idx, headdim, ngroups, eps, norm_before_gate, dt_min, dt_max, reverse, return_final_state, backend,
):  # fmt: skip
    _check(zxbcdt, conv_weight, dt_bias, A, norm_weight, out_weight, out_bias, headdim, ngroups)
    lead, heads = zxbcdt.shape[:2], A.shape[0]
    wide = torch.float64 if zxbcdt.dtype == torch.float64 else torch.float32
    size = (0,)
    if return_final_state:
        rows = lead[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        size = (rows, heads, headdim, (conv_weight.shape[0] - heads * headdim) // (2 * ngroups))
    out, y = zxbcdt.new_empty((*lead, out_weight.shape[0])), zxbcdt.new_empty((*lead, heads, headdim))
    if norm_weight is None:
        mean, rstd = zxbcdt.new_empty(0), zxbcdt.new_empty(0)
    else:
        mean, rstd = (zxbcdt.new_empty((*lead, ngroups), dtype=wide) for _ in range(2))
    return out, zxbcdt.new_empty(size, dtype=wide), y, mean, rstd


@op
def _mamba2_inner_backward(
    dout: Tensor,
    dstate: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    headdim: int,
    ngroups: int,
    eps: float,
    norm_before_gate: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first ten arguments of ``mamba2_inner``; empty for absent ones."""
    parts, flat = _split(zxbcdt, conv_weight, A, headdim), y.flatten(2)
    dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    grads = _split(dzxbcdt, conv_weight, A, headdim)
    norm_flags = ("rms", eps, flat.shape[-1] // ngroups, norm_before_gate, True, backend)
    inner = flat
    if norm_weight is not None:
        inner, _, _ = _normed(flat, parts.z, norm_weight, ngroups, eps, norm_before_gate, backend)
    dy, dweight, dbias = _project_backward(dout, _with_mlp(parts.mlp, inner), out_weight, out_bias)
    del inner
    dy = _mlp_backward(dy, parts.mlp, grads.mlp)
    dnorm, gate = zxbcdt.new_empty(0), parts.z.unflatten(-1, (-1, headdim))
    if norm_weight is not None:
        dy, dnorm, _, _, dz = Op.named["norm_backward"](
            dy.contiguous(), None, mean, rstd, flat, norm_weight, None, None, parts.z, None, *norm_flags
        )
        grads.z.copy_(dz)
    xbc = _convolve(parts.xbc, conv_weight, conv_bias, cu_seqlens, seq_idx, reverse, backend)
    x, B, C = _heads(xbc, A, headdim, ngroups)
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = Op.named["ssd_backward"](
        dy.unflatten(-1, (-1, headdim)), dstate, x, parts.dt, A, B, C, D, gate if norm_weight is None else None,
        dt_bias, None, initial_state, cu_seqlens, seq_idx, True, dt_min, dt_max, "sum", reverse, backend,
    )  # fmt: skip
    if norm_weight is None:
        grads.z.copy_(dz.flatten(2))
    grads.dt.copy_(ddt)
    del dy, xbc, x, B, C
    dxbc = torch.cat([dx.flatten(2), dB.flatten(2), dC.flatten(2)], dim=-1)
    del dx, dB, dC
    dconv_in, dconv, dconv_bias, _ = Op.named["causal_conv1d_backward"](
        dxbc, None, parts.xbc, conv_weight, conv_bias, None, None, cu_seqlens, seq_idx, "silu", reverse, backend
    )
    grads.xbc.copy_(dconv_in)
    return dzxbcdt, dconv, dconv_bias, ddt_bias, dA, dD, dnorm, dweight, dbias, dinitial


def _project_backward(
    dout: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the output projection's input, weight and bias (empty without one)."""
    rows = dout.flatten(0, 1)
    dweight = (rows.mT @ inner.flatten(0, 1).to(rows.dtype)).to(weight.dtype)
    dbias = rows.new_empty(0) if bias is None else rows.sum(0).to(bias.dtype)
    return (rows @ weight.to(rows.dtype)).view(*dout.shape[:2], -1), dweight, dbias


def _mlp_backward(dinner: Tensor, mlp: Tensor, dmlp: Tensor) -> Tensor:
    """Writes the gradient of ``mlp`` into ``dmlp`` and returns that of what stands beside silu(gate) value."""
    hidden = mlp.shape[-1] // 2
    if hidden == 0:
        return dinner
    gate, value = mlp.chunk(2, dim=-1)
    grad, sigmoid = dinner[..., :hidden], torch.sigmoid(gate)
    dmlp[..., :hidden] = grad * value * sigmoid * (1 + gate * (1 - sigmoid))
    dmlp[..., hidden:] = grad * gate * sigmoid
    return dinner[..., hidden:]


@_mamba2_inner_backward.register_fake
def _(
    dout, dstate, y, mean, rstd, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, out_bias,
    initial_state, cu_seqlens, seq_idx, headdim, ngroups, eps, norm_before_gate, dt_min, dt_max, reverse, backend,
):  # fmt: skip
    inputs = (zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, out_bias, initial_state)
    return tuple(zxbcdt.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flags, return_final_state, backend = inputs[DIFFERENTIABLE + 2 :]
    ctx.flags, ctx.has_state = (*flags, backend), return_final_state
    ctx.given = [t is not None for t in inputs[:DIFFERENTIABLE]]
    out, _, y, mean, rstd = output
    ctx.out = (out.shape, out.dtype, out.device)
    ctx.save_for_backward(y, mean, rstd, *inputs[: DIFFERENTIABLE + 2])
    ctx.mark_non_differentiable(y, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (len(ctx.flags) + 3)
    dstate = dstate if ctx.has_state else None
    if dout is None and dstate is None:
        return (None,) * DIFFERENTIABLE + none
    if dout is None:
        shape, dtype, device = ctx.out
        dout = torch.zeros(shape, dtype=dtype, device=device)
    grads = _mamba2_inner_backward(dout, dstate, *ctx.saved_tensors, *ctx.flags)
    return (*(g if given else None for g, given in zip(grads, ctx.given, strict=True)), *none)


_mamba2_inner.register_autograd(_backward, setup_context=_setup_context)
