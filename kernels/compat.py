"""The functions of ``mamba_ssm`` and ``causal_conv1d`` with their argument order and ``(B, D, L)`` layouts.

Existing code switches by an import. Beyond the originals: they run on any device and dtype, states have gradients,
``seq_idx`` goes together with states, and any width is accepted. What has no counterpart here is refused by name.
Inside, everything is channel-last: a caller who can, calls ``kernels.selective_scan`` and its neighbours directly.

B batch, L length, D channels, N state, G groups, R dt rank, W conv width, S new tokens of an update.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.causal_conv1d import causal_conv1d
from kernels.norm import norm
from kernels.selective_scan import selective_scan

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "layer_norm_fn",
    "layernorm_fn",
    "mamba_inner_fn",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
]


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
    """The selective scan of ``mamba_ssm.ops.selective_scan_interface`` (Gu & Dao 2023, algorithm 2).

    Args:
        u: ``(B, D, L)``.
        delta: ``(B, D, L)``.
        A: ``(D, N)``, real or complex.
        B: ``(B, N, L)`` or ``(B, G, N, L)``, constant ``(D, N)``; with complex A real ``(..., 2 L)``, real and
            imaginary parts in turn, or constant complex.
        C: As B.
        D: ``(D,)``.
        z: Gate ``(B, D, L)``.
        delta_bias: ``(D,)``.
        delta_softplus: Whether delta goes through softplus.
        return_last_state: Whether to return the last state too.

    Returns:
        ``(B, D, L)`` in u's dtype, and the last state ``(B, D, N)`` if asked for.
    """
    found = selective_scan(
        _swap(u), _swap(delta), A, _over_time(B, A), _over_time(C, A), D, None if z is None else _swap(z), delta_bias,
        dt_softplus=delta_softplus, return_final_state=return_last_state,
    )  # fmt: skip
    if isinstance(found, tuple):
        return _swap(found[0]), found[1]
    return _swap(found)


def _swap(t: Tensor) -> Tensor:
    """``(B, D, L)`` to ``(B, L, D)`` and back."""
    return t.transpose(1, 2)


def _over_time(t: Tensor, A: Tensor) -> Tensor:
    """B or C ``(B, N, L)`` or ``(B, G, N, L)`` as ``(B, L, G, N)``; constants as they are."""
    if t.ndim == 2:
        return t
    if t.ndim == 3:
        t = t.unsqueeze(1)
    if A.is_complex() and not t.is_complex():
        wide = t if t.dtype in (torch.float32, torch.float64) else t.float()  # there is no complex bfloat16
        t = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return t.permute(0, 3, 1, 2)


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
    """
    if A.is_complex() and not (b_rms_weight is None and c_rms_weight is None):
        raise ValueError("b_rms_weight, c_rms_weight: got complex A, wanted real; leave the norms of B and C out")

    def inner(xz: Tensor) -> Tensor:
        x, z = _swap(xz).chunk(2, dim=-1)
        x = _one(causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu"))
        width = A.shape[1] * (2 if A.is_complex() else 1)
        rank = delta_proj_weight.shape[1]
        projected = F.linear(x, x_proj_weight)
        dt, dt_weight = projected[..., :rank], delta_proj_weight
        if dt_rms_weight is not None:
            dt = _one(norm(F.linear(dt, delta_proj_weight), dt_rms_weight, eps=b_c_dt_rms_eps))
        at_time = [_over_time(t, A) if t is not None else None for t in (B, C)]
        columns = (projected[..., rank : rank + width], projected[..., -width:])
        terms = zip(at_time, columns, (B_proj_bias, C_proj_bias), (b_rms_weight, c_rms_weight), strict=True)
        b, c = (_projected(*term, A.is_complex(), b_c_dt_rms_eps) for term in terms)
        y = selective_scan(
            x, dt, A, b, c, D, z, delta_bias,
            dt_weight=dt_weight if dt_rms_weight is None else None, dt_softplus=delta_softplus,
        )  # fmt: skip
        return F.linear(_one(y), out_proj_weight, out_proj_bias)

    if checkpoint_lvl >= 1 and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(inner, xz, use_reentrant=False, preserve_rng_state=False))
    return inner(xz)


def _projected(
    given: Tensor | None, columns: Tensor, bias: Tensor | None, rms_weight: Tensor | None, is_complex: bool, eps: float
) -> Tensor:
    """B or C: the one that is given, else the projected columns ``(B, L, N)`` as ``(B, L, 1, N)``."""
    if given is not None:
        return given
    if bias is not None:
        columns = columns + bias.to(columns.dtype)
    if is_complex:
        wide = columns if columns.dtype == torch.float64 else columns.float()
        return torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()).unsqueeze(2)
    if rms_weight is not None:
        columns = _one(norm(columns, rms_weight, eps=eps))
    return columns.unsqueeze(2)


def _one(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The result of an op that was asked for one tensor."""
    assert isinstance(found, Tensor)
    return found


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal depthwise convolution of ``causal_conv1d``.

    Args:
        x: ``(B, D, L)``, any strides.
        weight: ``(D, W)``.
        bias: ``(D,)`` or None.
        seq_idx: ``(B, L)``; tokens see only their own sequence, -1 is padding with output zero.
        initial_states: ``(B, D, W - 1)``.
        return_final_states: Whether to return the last W - 1 inputs too.
        final_states_out: ``(B, D, W - 1)``, where these are written if they are returned.
        activation: None, ``silu`` or ``swish`` (the same).

    Returns:
        ``(B, D, L)``, and the final states ``(B, D, W - 1)`` if asked for.
    """
    found = causal_conv1d(
        _swap(x), weight, bias, activation=_activation(activation), seq_idx=seq_idx,
        initial_state=None if initial_states is None else _swap(initial_states),
        return_final_state=return_final_states,
    )  # fmt: skip
    if not isinstance(found, tuple):
        return _swap(found)
    y, state = _swap(found[0]), _swap(found[1])
    return y, (state if final_states_out is None else final_states_out.copy_(state))


def _activation(name: str | None) -> Literal["silu"] | None:
    """``swish`` is another name of SiLU."""
    if name not in (None, "silu", "swish"):
        raise ValueError(f"activation: got {name!r}, wanted None, 'silu' or 'swish'; apply another one to the output")
    return None if name is None else "silu"


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Continues a convolution by one or more tokens and updates its state in place.

    Args:
        x: ``(B, D)`` or ``(B, D, S)``.
        conv_state: ``(B, D, T)`` with T >= W - 1, the last inputs, oldest first; ``(rows, D, T)`` with indices.
        weight: ``(D, W)``.
        bias: ``(D,)`` or None.
        activation: None, ``silu`` or ``swish``.
        cache_seqlens: ``(B,)`` tokens seen so far; the state is then a circular buffer whose next slot is that
            number modulo T.
        conv_state_indices: ``(B,)`` row of ``conv_state`` of each sequence, each at most once; -1 leaves a sequence
            out: its output is zero, no state changes.

    Returns:
        The output in the shape of x.
    """
    step = x.unsqueeze(-1) if x.ndim == 2 else x
    past, length, size = weight.shape[-1] - 1, step.shape[-1], conv_state.shape[-1]
    if size < past:
        raise ValueError(f"conv_state: got {size} columns, wanted at least W - 1 = {past}; allocate it (B, D, W - 1)")
    valid = None if conv_state_indices is None else conv_state_indices >= 0
    rows = None if conv_state_indices is None else conv_state_indices.long().clamp(min=0)
    old = conv_state if rows is None else conv_state[rows]
    if cache_seqlens is None:
        history = old[..., size - past :]
        new = torch.cat([old, step.to(old.dtype)], -1)[..., length:]
    else:
        last = (cache_seqlens[:, None] + torch.arange(-past, 0, device=x.device)) % size
        history = old.gather(-1, last[:, None].expand(-1, step.shape[1], -1).long())
        kept = min(length, size)  # of more tokens than slots, the earlier ones are overwritten
        slots = (cache_seqlens[:, None] + torch.arange(length - kept, length, device=x.device)) % size
        index = slots[:, None].expand(-1, step.shape[1], -1).long()
        new = old.scatter(-1, index, step[..., length - kept :].to(old.dtype))
    state = _swap(history).clone()  # the buffer itself is about to change
    y = _swap(_one(causal_conv1d(_swap(step), weight, bias, activation=_activation(activation), initial_state=state)))
    if valid is not None:
        y = torch.where(valid[:, None, None], y, 0)
    _write_rows(conv_state, rows, valid, old, new)
    return y.squeeze(-1) if x.ndim == 2 else y


@torch.no_grad()
def _write_rows(state: Tensor, rows: Tensor | None, valid: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Writes ``new`` to the valid rows of ``state`` without waiting for the device to learn which those are."""
    if rows is None or valid is None:
        state.copy_(new)
        return
    if not rows.shape[0]:
        return
    # an invalid entry repeats the write of the first valid one; with none at all, row 0 gets what it holds
    new = torch.where(valid[:, None, None], new, old)
    pick = torch.where(valid, torch.arange(rows.shape[0], device=rows.device), valid.int().argmax())
    state.index_copy_(0, rows[pick], new[pick])


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of each packed sequence, zeros before its start.

    Args:
        x: ``(T, D)``, the sequences end to end.
        cu_seqlens: ``(sequences + 1,)`` their bounds.
        state_len: Number of inputs, W - 1 for a convolution.

    Returns:
        ``(sequences, D, state_len)``.
    """
    place = cu_seqlens[1:, None].long() + torch.arange(-state_len, 0, device=x.device)
    inside = place >= cu_seqlens[:-1, None]
    if not x.shape[0]:
        return x.new_zeros(place.shape[0], x.shape[1], state_len)
    return _swap(torch.where(inside[..., None], x[place.clamp(min=0)], 0)).contiguous()


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add, then LayerNorm, as ``mamba_ssm.ops.triton.layer_norm``.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        residual: Shape of x; its dtype is that of the returned sum.
        x1: Refused, as are weight1, bias1, rowscale, dropout_p > 0 and return_dropout_mask: apply them outside.
        weight1: See x1.
        bias1: See x1.
        eps: Added to the variance.
        dropout_p: See x1.
        rowscale: See x1.
        prenorm: Whether to return x + residual too.
        residual_in_fp32: Whether that is float32 when no residual is given.
        is_rms_norm: RMSNorm instead.
        return_dropout_mask: See x1.

    Returns:
        ``(..., D)`` in x's dtype, and x + residual with ``prenorm``.
    """
    refused = {
        "x1": x1, "weight1": weight1, "bias1": bias1, "rowscale": rowscale,
        "dropout_p": dropout_p or None, "return_dropout_mask": return_dropout_mask or None,
    }  # fmt: skip
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name}: got a value, wanted the default; this norm has no such step, apply it outside")
    return norm(
        x, weight, bias, residual=residual, kind="rms" if is_rms_norm else "layer", eps=eps,
        residual_in_fp32=residual_in_fp32 and residual is None, return_residual=prenorm,
    )  # fmt: skip


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add, then RMSNorm; the arguments are those of ``layer_norm_fn``."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        True, return_dropout_mask,
    )  # fmt: skip


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """LayerNorm with a gate, as ``mamba_ssm.ops.triton.layernorm_gated``.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        z: Gate, shape of x, or None.
        eps: Added to the variance.
        group_size: Channels that share statistics; None is the whole row.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        is_rms_norm: RMSNorm instead.

    Returns:
        ``(..., D)`` in x's dtype.
    """
    return _one(
        norm(
            x, weight, bias, z=z, kind="rms" if is_rms_norm else "layer", eps=eps, group_size=group_size,
            norm_before_gate=norm_before_gate,
        )
    )  # fmt: skip


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm with a gate; the arguments are those of ``layernorm_fn``."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)
