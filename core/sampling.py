"""How the next token is drawn from a model's logits.

Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.decode import largest


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order given here.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep exactly this many tokens, of equal ones those with the smaller id; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches it (Holtzman et al. 2020); 1 keeps all.
        min_p: Keep tokens at least this likely relative to the most likely one (Nguyen et al. 2024); 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens of the prompt and of the text so
            far (Keskar et al. 2019, CTRL, section 4.1), before everything else; 1 changes nothing.

    Raises:
        ValueError: For a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all)"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 keeps all)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 changes nothing)"),
        ):
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted {wanted}")

    @property
    def draws(self) -> bool:
        """Whether there is anything to draw: else the most likely token is taken."""
        return self.temperature != 0 and self.top_k != 1


PLAIN = Sampling()  # from the model's own distribution


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Applies temperature, top-k, top-p and min-p.

    Args:
        logits: (B, V).
        sampling: What to apply; its temperature must not be 0.

    Returns:
        (B, V) float32 (float64 for float64 logits): logits of the distribution to draw from, -inf where excluded.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)  # stable: equal tokens by id
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        probability = ordered.masked_fill(~keep, -math.inf).double().softmax(dim=-1)
        # A token is needed while those before it fall short of top_p, by more than float32 logits can resolve.
        keep &= probability.cumsum(dim=-1) - probability < sampling.top_p - 1e-7
        keep[:, 0] = True
    if sampling.min_p:
        keep &= ordered >= ordered[:, :1] + math.log(sampling.min_p)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(1, index, keep), -math.inf)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draws one token a row.

    Args:
        logits: (B, V).
        sampling: How.
        generator: Source of randomness, on the logits' device; the global one by default.

    Returns:
        (B,) int64.
    """
    if not sampling.draws:
        return largest(logits.detach())
    probability = filter_logits(logits, sampling).softmax(dim=-1)
    # The largest of p / Exp(1) falls on a token with probability p; multinomial would wait for the device.
    noise = torch.empty_like(probability).exponential_(generator=generator)
    return (probability / noise).argmax(dim=-1)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens less likely (penalty > 1) where ``seen (B, V)``; returns new logits (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
