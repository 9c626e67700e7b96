"""Four tasks that tell sequence layers apart: copying, selective copying, induction heads, associative recall.

A batch is a function of (seed, split, step) and of nothing else; see ``core.synthetics.counter``. Training draws a
fresh batch each step, so that nothing can be learnt by heart.

Legend: B sequences, L tokens of one, V vocabulary, A answers of a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.synthetics import counter


class Batch(NamedTuple):
    """Sequences and what a model should say in them."""

    tokens: Tensor  # (B, L) int64
    where: Tensor  # (B, A) int64: the positions whose outputs are the answers, increasing
    answers: Tensor  # (B, A) int64


@dataclass(frozen=True)
class Task(ABC):
    """A generator of batches.

    Args:
        length: Tokens that a sequence takes up, unless ``batch`` is asked for others.
        vocab_size: V.

    Raises:
        ValueError: For sizes that do not fit.
    """

    length: int
    vocab_size: int

    def __post_init__(self) -> None:
        self.check(self.length)

    def batch(self, seed: int, split: int, step: Tensor, size: int, length: int | None = None) -> Batch:
        """Draws a batch on the device of ``step``.

        Args:
            seed: Of the run.
            split: 0 for training, others for tests: no two splits share their numbers.
            step: () int64.
            size: B.
            length: In place of the task's own.

        Raises:
            ValueError: If the length does not fit the task.
        """
        length = self.length if length is None else length
        self.check(length)
        return self.draw((seed, split), step, size, length)

    def total(self, length: int) -> int:
        """Tokens L of a sequence of that length."""
        return length

    @abstractmethod
    def check(self, length: int) -> None:
        """Raises ValueError where the sizes do not fit."""

    @abstractmethod
    def draw(self, key: tuple[int, int], step: Tensor, size: int, length: int) -> Batch:
        """Draws a batch whose sizes are checked."""


@dataclass(frozen=True)
class Copying(Task):
    """Copying (Arjovsky et al. 2016, section 4.1): the first tokens are data, blanks follow, then as many markers.

    Token 0 is the blank, V - 1 the marker, 1 to V - 2 the data. At the i-th marker the i-th data token is wanted.

    Args:
        length: Tokens before the markers; the whole is ``length + data`` long.
        vocab_size: V, with blank and marker.
        data: Tokens to copy.
    """

    length: int = 4096
    vocab_size: int = 16
    data: int = 16

    def check(self, length: int) -> None:
        """Raises ValueError where the data do not fit in."""
        _at_least("vocab_size", self.vocab_size, 3, "a blank, a marker and a data token")
        _at_least("data", self.data, 1, "one token to copy")
        _at_least("length", length, self.data, f"room for {self.data} data tokens")

    def total(self, length: int) -> int:
        """With the markers."""
        return length + self.data

    def places(self, key: tuple[int, int], step: Tensor, size: int, length: int) -> Tensor:
        """Where the data stand, (B, A)."""
        return torch.arange(self.data, device=step.device).expand(size, -1)

    def draw(self, key: tuple[int, int], step: Tensor, size: int, length: int) -> Batch:
        """Draws a batch."""
        data = counter.integers(counter.key(*key, 0), step, 1, self.vocab_size - 1, size, self.data)
        tokens = torch.zeros(size, length + self.data, dtype=torch.int64, device=step.device)
        tokens.scatter_(1, self.places(key, step, size, length), data)
        tokens[:, length:] = self.vocab_size - 1
        where = torch.arange(length, length + self.data, device=step.device).expand(size, -1)
        return Batch(tokens, where, data)


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """Selective copying (Gu & Dao 2023, section 4.1.1): the data stand at random places between blanks.

    The gaps differ from sequence to sequence, so that a layer has to tell data and blanks apart by their content.
    """

    def places(self, key: tuple[int, int], step: Tensor, size: int, length: int) -> Tensor:
        """Where the data stand, (B, A), increasing."""
        return counter.choices(counter.key(*key, 1), step, size, length, self.data).sort(dim=1).values


@dataclass(frozen=True)
class InductionHeads(Task):
    """Induction heads (Olsson et al. 2022; Gu & Dao 2023, section 4.1.2): what followed the trigger the last time?

    Token V - 1 is the trigger, the others are noise. It stands once at a random place, and again at the end, where the
    token that followed it is wanted.

    Args:
        length: Tokens, with the last trigger.
        vocab_size: V, with the trigger.
    """

    length: int = 256
    vocab_size: int = 16

    def check(self, length: int) -> None:
        """Raises ValueError where trigger, answer and trigger do not fit in."""
        _at_least("vocab_size", self.vocab_size, 3, "a trigger and two tokens to tell apart")
        _at_least("length", length, 3, "trigger, answer and trigger")

    def draw(self, key: tuple[int, int], step: Tensor, size: int, length: int) -> Batch:
        """Draws a batch."""
        trigger = self.vocab_size - 1
        tokens = counter.integers(counter.key(*key, 0), step, 0, trigger, size, length)
        place = counter.integers(counter.key(*key, 1), step, 0, length - 2, size, 1)
        answers = tokens.gather(1, place + 1)
        tokens.scatter_(1, place, trigger)
        tokens[:, -1] = trigger
        return Batch(tokens, torch.full_like(place, length - 1), answers)


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall, MQAR (Arora et al. 2023, section 4; Dao & Gu 2024, section 9.1).

    A sequence begins with ``pairs`` keys and their values, k1 v1 k2 v2 ... Then each key is asked for once more, at an
    even place after them, and its value is wanted there. Gaps follow a power law, p(i) ~ i^(power - 1): most queries
    come soon. Keys are different ones of 1 to V/2 - 1, values of V/2 to V - 1. The rest is noise from the whole
    vocabulary as in Mamba-2's harder version, or token 0.

    Args:
        length: Tokens.
        vocab_size: V, even.
        pairs: Keys of a sequence, at most length / 4; None: length / 4.
        power: Exponent of the gaps.
        noise: Whether the rest is noise.
    """

    length: int = 256
    vocab_size: int = 8192
    pairs: int | None = None
    power: float = 0.01
    noise: bool = True

    def check(self, length: int) -> None:
        """Raises ValueError where keys, values and queries do not fit in."""
        pairs = self.count(length)
        _at_least("pairs", pairs, 1, "one key to ask for")
        if 4 * pairs > length:
            raise ValueError(f"length: got {length}, wanted at least {4 * pairs}: pairs, then as many places to ask")
        if self.vocab_size % 2 or self.vocab_size // 2 <= pairs:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted an even number above {2 * pairs}")
        if self.power <= 0:
            raise ValueError(f"power: got {self.power}, wanted a positive number; 1 spreads the queries evenly")

    def count(self, length: int) -> int:
        """Keys of a sequence of that length."""
        return length // 4 if self.pairs is None else self.pairs

    def draw(self, key: tuple[int, int], step: Tensor, size: int, length: int) -> Batch:
        """Draws a batch."""
        pairs, half = self.count(length), self.vocab_size // 2
        names = 1 + counter.choices(counter.key(*key, 0), step, size, half - 1, pairs)
        values = half + counter.choices(counter.key(*key, 1), step, size, half, pairs)
        if self.noise:
            tokens = counter.integers(counter.key(*key, 2), step, 0, self.vocab_size, size, length)
        else:
            tokens = torch.zeros(size, length, dtype=torch.int64, device=step.device)
        tokens[:, : 2 * pairs] = torch.stack([names, values], dim=2).flatten(1)
        where = 2 * pairs + 2 * self._gaps(key, step, size, (length - 2 * pairs) // 2, pairs)
        where, order = where.sort(dim=1)
        tokens.scatter_(1, where, names.gather(1, order))
        return Batch(tokens, where, values.gather(1, order))

    def _gaps(self, key: tuple[int, int], step: Tensor, size: int, places: int, count: int) -> Tensor:
        """``count`` different ones of ``places``, drawn one after the other by p(i) ~ i^(power - 1), (B, count).

        The largest of log p plus Gumbel noise are such a draw (Efraimidis & Spirakis 2006).
        """
        u = counter.uniforms(counter.key(*key, 3), step, size, places)
        log_p = (self.power - 1) * torch.log(torch.arange(1, places + 1, device=step.device, dtype=torch.float64))
        return (log_p - torch.log(-torch.log(u))).topk(count, dim=1).indices


TASKS: dict[str, type[Task]] = {
    "copying": Copying,
    "selective_copying": SelectiveCopying,
    "induction_heads": InductionHeads,
    "mqar": AssociativeRecall,
}


def _at_least(name: str, value: int, least: int, reason: str) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}: {reason}")
