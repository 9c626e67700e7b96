"""``causal_conv1d_fn``, ``causal_conv1d_update`` and ``causal_conv1d_varlen_states`` of ``causal_conv1d``.

B batch, L length, D channels, W conv width, S new tokens of an update, T columns of its state.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.checks import check_index, check_rows, check_shape, is_concrete


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
    """The causal depthwise convolution.

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

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    if x.ndim != 3 or weight.ndim != 2:
        got = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(
            f"x, weight: got shapes {got}, wanted (B, D, L) and (D, W); a Conv1d's weight takes squeeze(1)"
        )
    state_shape = (x.shape[0], x.shape[1], weight.shape[1] - 1)
    check_shape("initial_states", initial_states, state_shape, "(B, D, W - 1)")
    check_shape("final_states_out", final_states_out, state_shape, "(B, D, W - 1)")
    found = causal_conv1d(
        x.mT, weight, bias, activation=_activation(activation), seq_idx=seq_idx,
        initial_state=None if initial_states is None else initial_states.mT,
        return_final_state=return_final_states,
    )  # fmt: skip
    if not isinstance(found, tuple):
        return found.mT
    y, state = (t.mT for t in found)
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

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix. Values of
            indices are checked on the CPU only.
    """
    step = x.unsqueeze(-1) if x.ndim == 2 else x
    _check_update(step, conv_state, weight, cache_seqlens, conv_state_indices)
    past, size = weight.shape[-1] - 1, conv_state.shape[-1]
    old = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long().clamp(min=0)]
    if cache_seqlens is None:
        history = old[..., size - past :]
        new = torch.cat([old, step.to(old.dtype)], -1)[..., step.shape[-1] :]
    else:
        history, new = _circular(old, step, cache_seqlens, past)
    initial = history.mT.clone()  # the buffer itself is about to change
    y = causal_conv1d(step.mT, weight, bias, activation=_activation(activation), initial_state=initial)
    y = cast(Tensor, y).mT
    if conv_state_indices is None:
        with torch.no_grad():
            conv_state.copy_(new)
    else:
        _write_rows(conv_state, conv_state_indices, old, new)
        y = torch.where((conv_state_indices >= 0)[:, None, None], y, 0)
    return y.squeeze(-1) if x.ndim == 2 else y


def _check_update(
    step: Tensor, conv_state: Tensor, weight: Tensor, cache_seqlens: Tensor | None, indices: Tensor | None
) -> None:
    """Raises unless the arguments of ``causal_conv1d_update`` fit each other."""
    if step.ndim != 3:
        raise ValueError(f"x: got shape {tuple(step.shape)}, wanted (B, D) or (B, D, S)")
    batch, channels = step.shape[:2]
    if weight.ndim != 2 or conv_state.ndim != 3:
        got = f"weight {tuple(weight.shape)} and conv_state {tuple(conv_state.shape)}"
        raise ValueError(f"weight, conv_state: got shapes {got}, wanted (D, W) and (B, D, T)")
    check_shape("weight", weight, (channels, weight.shape[1]), "(D, W) as x")
    rows, past = conv_state.shape[0] if indices is not None else batch, weight.shape[1] - 1
    check_shape("conv_state", conv_state, (rows, channels, conv_state.shape[2]), "(B, D, T) as x")
    if conv_state.shape[2] < past:
        raise ValueError(
            f"conv_state: got {conv_state.shape[2]} columns, wanted at least W - 1 = {past}; allocate it (B, D, W - 1)"
        )
    if cache_seqlens is not None:
        check_index("cache_seqlens", cache_seqlens, step.device)
        check_shape("cache_seqlens", cache_seqlens, (batch,), "(B,)")
    if indices is not None:
        check_rows("conv_state_indices", indices, step, rows)


def _circular(old: Tensor, step: Tensor, seen: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """The last ``past`` inputs ``(B, D, past)`` of circular buffers, and the buffers after ``step (B, D, S)``."""
    size, length = old.shape[-1], step.shape[-1]

    def slots(first: int, last: int) -> Tensor:
        places = (seen[:, None] + torch.arange(first, last, device=old.device)) % size
        return places[:, None].expand(-1, step.shape[1], -1).long()

    kept = min(length, size)  # of more tokens than slots, the earlier ones are overwritten
    new = old.scatter(-1, slots(length - kept, length), step[..., length - kept :].to(old.dtype))
    return old.gather(-1, slots(-past, 0)), new


@torch.no_grad()
def _write_rows(state: Tensor, rows: Tensor, old: Tensor, new: Tensor) -> None:
    """Writes ``new`` to the valid rows of ``state`` without waiting for the device to learn which those are."""
    if not rows.shape[0]:
        return
    # an invalid entry repeats the write of the first valid one; with none at all, row 0 gets what it holds
    valid = rows >= 0
    new = torch.where(valid[:, None, None], new, old)
    pick = torch.where(valid, torch.arange(rows.shape[0], device=rows.device), valid.int().argmax())
    state.index_copy_(0, rows.long().clamp(min=0)[pick], new[pick])


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of each packed sequence, zeros before its start.

    Args:
        x: ``(T, D)``, the sequences end to end.
        cu_seqlens: ``(sequences + 1,)`` their bounds.
        state_len: Number of inputs, W - 1 for a convolution.

    Returns:
        ``(sequences, D, state_len)``, channels next to each other in memory.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    if x.ndim != 2 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or state_len < 0:
        raise ValueError(
            f"x, cu_seqlens, state_len: got shapes {tuple(x.shape)}, {tuple(cu_seqlens.shape)} and {state_len}, wanted "
            "(T, D), (sequences + 1,) and at least 0; x[0] takes the batch of one away"
        )
    check_index("cu_seqlens", cu_seqlens, x.device)
    if is_concrete(cu_seqlens):
        bounds = [0, *cu_seqlens.tolist(), x.shape[0]]
        if bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens: got {bounds[1:-1][:8]}, wanted ascending bounds from 0 to T = {x.shape[0]}")
    place = cu_seqlens[1:, None].long() + torch.arange(-state_len, 0, device=x.device)
    inside = place >= cu_seqlens[:-1, None]
    if not x.shape[0]:
        return x.new_zeros(place.shape[0], state_len, x.shape[1]).mT
    return torch.where(inside[..., None], x[place.clamp(min=0)], 0).mT
