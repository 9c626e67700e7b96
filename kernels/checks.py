"""Checks that several ops share: shapes, routes and packed sequences. Every message says what, got, wanted, how to fix.

B batch, L tokens, K routes, P scan positions, S packed sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_shape(name: str, t: Tensor | None, wanted: tuple[int, ...], letters: str) -> None:
    """Raises unless ``t`` is None or has the shape ``wanted``, which ``letters`` spells out."""
    if t is not None and tuple(t.shape) != wanted:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {letters} = {wanted}")


def check_float(x: Tensor, **others: Tensor | None) -> None:
    """Raises unless all tensors are real floating point and on the device of ``x``."""
    for name, t in (("x", x), *others.items()):
        if t is None:
            continue
        if not t.is_floating_point():
            raise ValueError(f"{name}: got dtype {t.dtype}, wanted a real floating-point one; convert it with .float()")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, wanted {x.device} as x; move it with .to(x.device)")


def is_concrete(t: Tensor) -> bool:
    """Whether the values can be read without waiting for a device: a real CPU tensor, not one being traced."""
    return t.device.type == "cpu" and type(t) is Tensor and not torch.compiler.is_compiling()


def check_index(name: str, t: Tensor, device: torch.device) -> None:
    """Raises unless ``t`` holds int32 or int64 on ``device``."""
    if t.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: got dtype {t.dtype}, wanted int32 or int64; convert it with .int()")
    if t.device != device:
        raise ValueError(f"{name}: got device {t.device}, wanted {device} as x; move it with .to(x.device)")


def check_rows(name: str, rows: Tensor, x: Tensor, count: int) -> None:
    """Raises unless ``rows (B,)`` chooses a row of ``count``, or -1, for each of ``x (B, ...)``, none of them twice.

    The values are looked at on the CPU only: elsewhere that would wait for the device at each call.
    """
    check_index(name, rows, x.device)
    check_shape(name, rows, (x.shape[0],), "(B,)")
    if not is_concrete(rows) or not rows.numel():
        return
    low, high = int(rows.min()), int(rows.max())
    if low < -1 or high >= count:
        raise ValueError(f"{name}: got values in [{low}, {high}], wanted rows in [0, {count}) or -1 for padding")
    real = rows[rows >= 0]
    if real.unique().numel() < real.numel():
        raise ValueError(f"{name}: got {rows.tolist()[:8]}, wanted each row at most once; which of two states is left?")


def check_route(route: Tensor, length: int) -> None:
    """Raises unless ``route (K, P)`` holds tokens below ``length`` or -1, each at most once a route.

    The values are looked at on the CPU only: elsewhere that would wait for the device at each call.
    """
    if route.ndim != 2:
        raise ValueError(f"route: got shape {tuple(route.shape)}, wanted (K, P): one row of token indices per route")
    if not is_concrete(route) or not route.numel():
        return
    low, high = int(route.min()), int(route.max())
    if low < -1 or high >= length:
        raise ValueError(f"route: got values in [{low}, {high}], wanted tokens in [0, {length}) or -1 for padding")
    visits = torch.zeros(route.shape[0], length + 1, dtype=torch.int32)
    visits.scatter_add_(1, route.long() % (length + 1), torch.ones_like(route, dtype=torch.int32))  # -1 counts last
    if (visits[:, :length] > 1).any():
        raise ValueError("route: a token is visited twice by one route, wanted at most once; split it in two routes")


def check_packing(x: Tensor, route: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> None:
    """Raises unless at most one of the two descriptions of packed sequences is given, and it fits ``x (B, L, ...)``."""
    batch, length = x.shape[:2]
    if seq_idx is not None:
        check_index("seq_idx", seq_idx, x.device)
        check_shape("seq_idx", seq_idx, (batch, length), "(B, L)")
        if cu_seqlens is not None:
            raise ValueError("seq_idx and cu_seqlens: got both, wanted one; both say where packed sequences start")
    if cu_seqlens is None:
        return
    check_index("cu_seqlens", cu_seqlens, x.device)
    if route is not None:
        raise ValueError("cu_seqlens: got it together with a route, wanted seq_idx; routes index the tokens of a row")
    if batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} for x with B = {batch}, wanted (S + 1,) and B = 1; "
            "lay the sequences end to end in one row"
        )
    if is_concrete(cu_seqlens):
        bounds = cu_seqlens.long()
        if int(bounds[0]) != 0 or int(bounds[-1]) != length or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: got {bounds.tolist()[:8]}, wanted ascending bounds from 0 to L = {length}; "
                "it is the running sum of the lengths, with a 0 in front"
            )


def check_values(x: Tensor, route: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> None:
    """Checks of indices that passed all others in an earlier call: those of their values."""
    if route is not None:
        check_route(route, x.shape[1])
    if cu_seqlens is not None:
        check_packing(x, route, cu_seqlens, seq_idx)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast, if it is on, gives products of float32 and narrower tensors on a device."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off, which would round the operands of products."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def owned(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A dense tensor of this shape that is nobody's view: what a custom op returns, for callers to change as they like.

    Args:
        t: A tensor that nothing else refers to.
        shape: Of the result, with as many elements.
    """
    return torch.ops.aten._unsafe_view(t.contiguous(), tuple(shape))
