"""Activations that the backward pass computes again because that is cheaper than keeping them.

Of a Mamba block's activations two are one pass over memory away from others that are kept: the normalised input, from
the residual stream, and the output of the short convolution, from its input. On a sequence of a million tokens they
are a fifth of the block's memory, and cost 4 % of a training step. (mamba_ssm forgets the convolution's output too.)

Gradient checkpointing computes whole blocks again; this goes with what is kept otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Forgotten:
    """A tensor that autograd asked to keep, and how to compute it.

    It is computed at the first of the requests for it and dropped at the last.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute, self._value = compute, None
        self._kept = self._left = 0

    def keep(self) -> None:
        """One more node of the graph will ask for it."""
        self._kept += 1

    def value(self) -> Tensor:
        """The tensor."""
        if self._value is None:
            with torch.no_grad():
                self._value, self._left = self._compute(), self._kept
        value = self._value
        self._left -= 1
        if self._left == 0:
            self._value = None
        return value


_known: list[dict[int, tuple[Tensor, Forgotten]]] = []  # of the contexts that are entered, by address


@contextmanager
def forgetting() -> Iterator[None]:
    """Does without the tensors that ``forget`` is called with inside.

    Where other hooks handle what is saved (gradient checkpointing, offloading), these have it all.
    """
    if not torch.is_grad_enabled() or _others():
        yield
        return
    known: dict[int, tuple[Tensor, Forgotten]] = {}
    _known.append(known)

    def pack(t: Tensor) -> Any:
        found = known.get(t.data_ptr())
        if found is None or found[0].numel() != t.numel() or found[0].dtype != t.dtype or not t.is_contiguous():
            return t
        found[1].keep()
        return found[1], t.shape

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].value().view(kept[1])

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _known.pop()
        known.clear()  # autograd keeps the hooks, and with them this, as long as the graph


def may_forget() -> bool:
    """Whether ``forget`` does anything here."""
    return len(_known) > 0


def forget(t: Tensor, compute: Callable[[], Tensor]) -> None:
    """Has autograd compute ``t`` again instead of keeping it; nothing outside ``forgetting``.

    Args:
        t: Contiguous. It is not the output of the node that saves it.
        compute: Returns it anew, but for the order of its sums; may hold detached tensors that are kept in any case.
    """
    if _known:
        _known[-1][t.data_ptr()] = (t, Forgotten(compute))


def _others() -> bool:
    """Whether somebody else's hooks are entered, which ours would hide what is saved from."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
