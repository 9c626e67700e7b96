"""The edges of a sequence's parts: what states remember of them, and what crosses between ranks.

Legend: R ranks, B batch, L tokens of a part, D channels, N state.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.parallel.group import SequenceGroup

CHUNK = 1 << 16  # tokens whose time steps exist at once
FORGOTTEN = {torch.float32: 21.0, torch.float64: 42.0}  # -log of a decay that is below rounding: 2^-30, 2^-60


def _place(length: int, begin: int, end: int, at_end: bool) -> slice:
    """Tokens ``begin`` to ``end``, counted from the sequence's end or from its start."""
    return slice(length - end, length - begin) if at_end else slice(begin, end)


class Edge:
    """The ``last`` (or first) tokens of a part, in the order of the scan: as many as its states remember.

    Args:
        group: The ranks.
        op: The scan.
        inputs: Its arguments.
        last: Which edge.
    """

    def __init__(self, group: SequenceGroup, op: Any, inputs: Sequence[Any], last: bool) -> None:
        x, bias = inputs[0], inputs[7]
        self._group, self._op, self._inputs, self._last = group, op, inputs, last
        self._length, self._at_end = x.shape[1], last != op.reverse
        self._wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._key = (0 if bias is None else bias.data_ptr(), x.shape, last, op)  # a layer's, more or less
        self._size = min(self._length, group.sizes.get(self._key, 0))
        if self._size == 0:
            self._size = min(self._length, group.window)
            self._look()
            while float(self._need) == 0.0:
                self._grow()
                self._look()
        else:
            self._look()

    @property
    def whole(self) -> bool:
        """Whether it is all of the part."""
        return self._size == self._length

    def cut(self, tensors: Sequence[Any]) -> list[Any]:
        """Its tokens of what has a length, among the scan's arguments."""
        part, along = _place(self._length, 0, self._size, self._at_end), self._op.along
        return [t[:, part] if i in along and t is not None and t.ndim > 2 else t for i, t in enumerate(tensors)]

    def _grow(self) -> None:
        self._size = min(self._length, 4 * self._size)

    def _look(self) -> None:
        """Sum the time steps up, and find how many windows it takes to forget; 0: more than there are."""
        window = self._group.window
        with torch.autocast(self._inputs[0].device.type, enabled=False):
            totals = self._totals(window)
            exponents: Tensor = self._op.exponent(self._inputs[2], totals).real
        self._steps = totals[-1]
        enough = exponents.flatten(1).amax(1) <= -FORGOTTEN[self._wide]
        if self.whole:
            enough[-1] = True
        self._need = torch.where(enough.any(), enough.int().argmax() + 1, 0).to(self._wide)

    def _totals(self, window: int) -> Tensor:
        """The sums of the time steps from the edge to the end of each window: (windows, B, ...)."""
        dt, found, stride = self._inputs[1], [], max(1, CHUNK // window) * window
        for begin in range(0, self._size, stride):
            end = min(self._size, begin + stride)
            part = _place(self._length, begin, end, self._at_end)
            steps = self._op.steps(dt[:, part].to(self._wide), self._inputs)
            steps = steps.flip(1) if self._at_end else steps
            steps = F.pad(steps, (0, 0, 0, (begin - end) % window))
            found.append(steps.unflatten(1, (-1, window)).sum(2))
        return torch.cat(found, 1).cumsum(1).transpose(0, 1)

    def carried(self, part: Tensor) -> Tensor:
        """What comes in from the parts before this one (``last``), or back from those after it: (B, ...).

        Args:
            part: The state that this part leaves alone, or the gradient of the state before it.
        """
        group, op, A, steps, forward = self._group, self._op, self._inputs[2], self._steps, self._last
        wide = torch.view_as_real(part) if part.is_complex() else part
        message = torch.cat([t.to(wide.dtype).flatten() for t in (wide, steps, self._need)])
        found = group.gather(message)
        self._tell(found[:, -1])
        parts = found[:, : wide.numel()].reshape(group.size, *wide.shape)
        parts = torch.view_as_complex(parts.contiguous()) if part.is_complex() else parts
        sums = found[:, wide.numel() : -1].reshape(group.size, *steps.shape)
        if forward != op.reverse:  # the parts that matter are those of lower ranks
            parts, sums = parts[: group.rank].flip(0), sums[: group.rank].flip(0)
        else:
            parts, sums = parts[group.rank + 1 :], sums[group.rank + 1 :]
        if not len(parts):
            return torch.zeros_like(part)
        # The steps that lie between each part and this one: the nearest comes first.
        between = torch.cat([torch.zeros_like(sums[:1]), sums[:-1].cumsum(0)])
        decay = op.exponent(A, between).exp()
        return ((decay if forward else decay.conj()) * parts).sum(0)

    def _tell(self, needs: Tensor) -> None:
        """Let the host know what all ranks need, once the GPU is there."""
        self._needs, self._event = torch.empty(needs.shape, dtype=needs.dtype, pin_memory=needs.is_cuda), None
        self._needs.copy_(needs, non_blocking=True)
        if needs.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def sufficed(self) -> bool:
        """Whether no rank remembers more than it took; all ranks find the same. Otherwise more are taken."""
        if self._event is not None:
            self._event.synchronize()
        needs = self._needs.tolist()
        own = int(needs[self._group.rank])
        if own == 0:
            self._grow()
        else:  # a few more, as what they remember changes from step to step
            self._group.sizes[self._key] = (own + own // 4 + 1) * self._group.window
        if all(needs):
            return True
        self._look()
        return False
