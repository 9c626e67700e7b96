"""What draws levels one after the other: by PyTorch, for any net, and with guidance around any other way.

Classifier-free guidance is Ho & Salimans 2022, https://arxiv.org/abs/2207.12598.

Legend: B clips, T generated samples, Q levels.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from audio.net import SoundNet
from core.generate import Sampling, filter_logits


class Stepper(Protocol):
    """A net and the state of B clips, which it advances."""

    @property
    def log_likelihood(self) -> Tensor:
        """(B,) float64, of the levels drawn so far; see ``Drawn``."""
        ...

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Draws the next T levels (B, T) by random numbers (B, T)."""
        ...

    def step(self, levels: Tensor) -> Tensor:
        """Advances every clip by a level (B,) that is given; returns logits (B, Q)."""
        ...


class Guidance(NamedTuple):
    """How a class is said more clearly than the net says it.

    The net has to know sequences of which it was not told the class. What the class adds to the log-probability of a
    level, against not being told, is added ``strength`` times more.
    """

    strength: float
    start: int  # the start level of the class that stands for any


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draws one level a row, where the distribution function passes a random number.

    Args:
        logits: (B, Q).
        sampling: Filters and temperature.
        uniform: (B,) float64 random numbers in [0, 1), where the logits are: a GPU then runs ahead of the host.

    Returns:
        (B,) int64.
    """
    if sampling.temperature == 0 or sampling.top_k == 1:
        return logits.argmax(dim=-1)
    reached = filter_logits(logits, sampling).double().softmax(dim=-1).cumsum(dim=-1)
    passed = reached <= (uniform * reached[:, -1])[:, None]
    return passed.sum(dim=-1)


class PlainStepper:
    """A ``Stepper`` for any net and device: the net itself, sample by sample.

    Args:
        net: The net, in evaluation mode.
        state: State of the clips.
        logits: (B, Q) what the net said last.
        classes: (B,) int64 classes of the clips.
    """

    def __init__(self, net: SoundNet, state: Any, logits: Tensor, classes: Tensor) -> None:
        self._net, self._state, self._logits = net, state, logits
        self._offset = (net.levels * classes).to(logits.device)
        self.log_likelihood = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """See ``Stepper``."""
        drawn, uniform = [], uniform.to(self._logits.device)
        for t in range(uniform.shape[1]):
            levels = choose(self._logits, sampling, uniform[:, t])
            log_p = self._logits.double().log_softmax(dim=-1)
            self.log_likelihood = self.log_likelihood + log_p.gather(1, levels[:, None])[:, 0]
            self.step(levels)
            drawn.append(levels)
        return torch.stack(drawn, dim=1)

    @torch.no_grad()
    def step(self, levels: Tensor) -> Tensor:
        """See ``Stepper``."""
        inputs = (levels.to(self._offset.device) + self._offset)[:, None]
        scores, self._state = self._net.forward_state(inputs, self._state)
        self._logits = scores[:, -1]
        return self._logits


class GuidedStepper:
    """A ``Stepper`` with guidance: every clip runs twice side by side, told its class and told none.

    Args:
        stepper: What advances 2 B clips: those that are told, then the others.
        logits: (2 B, Q) what the net said last.
        strength: See ``Guidance``.
    """

    def __init__(self, stepper: Stepper, logits: Tensor, strength: float) -> None:
        self._stepper, self._logits, self._strength = stepper, logits, strength
        self.log_likelihood = torch.zeros(len(logits) // 2, dtype=torch.float64, device=logits.device)

    @torch.no_grad()
    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """See ``Stepper``; the likelihood is that of the net told the class, without guidance."""
        drawn, uniform = [], uniform.to(self._logits.device)
        for t in range(uniform.shape[1]):
            told, untold = self._logits.float().chunk(2)
            levels = choose(told + self._strength * (told - untold), sampling, uniform[:, t])
            self.log_likelihood += told.double().log_softmax(dim=-1).gather(1, levels[:, None])[:, 0]
            self.step(levels)
            drawn.append(levels)
        return torch.stack(drawn, dim=1)

    def step(self, levels: Tensor) -> Tensor:
        """See ``Stepper``; the logits are those of the clips that are told."""
        self._logits = self._stepper.step(levels.to(self._logits.device).repeat(2))
        return self._logits.chunk(2)[0]
