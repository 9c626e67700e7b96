"""A classifier that learns what the sequences of each class look like, and answers with the class that fits best.

Legend: B batch, L length, D model width, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genomics.models import GenomeClassifier, Pooling
from genomics.vocabulary import A, T

Goal = Literal["discriminative", "generative"]
BASES = T - A + 1


class GenerativeClassifier(GenomeClassifier):
    """Bayes' rule over the classes of a language model: (B, L) -> (B, K).

    The backbone reads a sequence once. For every class k a head of its own predicts the next base from the hidden
    state, p_k(x_{t+1} | x_1 ... x_t) = softmax((W + U_k) h_t + b), and the class's score is the log-likelihood of the
    sequence, the sum over t: with all classes equally likely beforehand, the softmax of the scores is the posterior.
    Training maximises the likelihood under the sequence's own class (generative classifiers: Ng & Jordan 2002).

    A label is log2(K) bits a sequence, the bases are two bits each. Where classes differ at few positions of long
    sequences, as close relatives do, a discriminative loss hardly moves before those positions are found, while this
    one learns the sequences position by position, and what is peculiar to a class along with them.

    Args:
        num_classes: K.
        average_strands: As of ``GenomeClassifier``.
        kmer: The same.
        kmer_width: The same.
        sizes: Arguments of ``GenomeLM``.

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(
        self, num_classes: int, average_strands: bool = True, kmer: int = 0, kmer_width: int = 64, **sizes: Any
    ) -> None:
        super().__init__(num_classes, "last", average_strands, 0.0, kmer, kmer_width, **sizes)
        self.head = nn.Linear(sizes["d_model"], BASES)  # W and b, of all classes
        self.own = nn.Parameter(torch.zeros(num_classes, BASES, sizes["d_model"]))  # U

    def score_states(self, hidden: Tensor, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """Log-likelihoods of bases under each class.

        Args:
            hidden: (B, L, D) hidden states at the bases.
            ids: (B, L) the bases. What is not A, C, G or T counts for nothing.
            before: (B, 1, D) hidden state at the base before; without it nothing is said of the first base.

        Returns:
            (B, K) float32.
        """
        wanted, real = self._wanted(ids if before is not None else ids[:, 1:])
        states = hidden[:, :-1] if before is None else torch.cat([before, hidden[:, :-1]], dim=1)
        weight = self.head.weight + self.own  # (K, bases, D)
        bias = None if self.head.bias is None else self.head.bias.repeat(self.num_classes)
        logits = F.linear(
            states, weight.flatten(0, 1).to(states.dtype), None if bias is None else bias.to(states.dtype)
        )
        scores = logits.unflatten(2, (self.num_classes, BASES)).float().log_softmax(-1)
        index = wanted[:, :, None, None].expand(-1, -1, self.num_classes, 1)
        return (scores.gather(3, index)[..., 0] * real[:, :, None]).sum(1)

    def loss(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Mean nats of a base, but the first of each sequence, under the sequence's own class.

        Args:
            ids: (B, L) int64, right-padded with [PAD].
            classes: (B,) int64.
        """
        wanted, real = self._wanted(ids[:, 1:])
        weight = (self.head.weight + self.own[classes]).transpose(1, 2)  # (B, D, bases)
        logits = (self.backbone(ids)[:, :-1] @ weight).float() + self.head.bias
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return (nats * real).sum() / real.sum().clamp(min=1)

    @staticmethod
    def _wanted(ids: Tensor) -> tuple[Tensor, Tensor]:
        """Bases counted from 0, 0 where there is none, and where there is one."""
        real = (ids >= A) & (ids <= T)
        return torch.where(real, ids - A, 0), real


def build_classifier(
    goal: Goal,
    num_classes: int,
    pooling: Pooling = "max",
    average_strands: bool = True,
    language: float = 0.0,
    kmer: int = 0,
    kmer_width: int = 64,
    **sizes: Any,
) -> GenomeClassifier:
    """Build a classifier by what it learns.

    Args:
        goal: ``discriminative``: the class, from pooled positions. ``generative``: the sequences of each class.
        num_classes: K.
        pooling: Of discriminative ones.
        average_strands: See ``GenomeClassifier``.
        language: The same, of discriminative ones.
        kmer: The same.
        kmer_width: The same.
        sizes: Arguments of ``GenomeLM``.

    Raises:
        ValueError: For sizes that do not fit, or another goal.
    """
    if goal == "generative":
        return GenerativeClassifier(num_classes, average_strands, kmer, kmer_width, **sizes)
    if goal != "discriminative":
        raise ValueError(f"goal: got {goal!r}, wanted 'discriminative' or 'generative'")
    return GenomeClassifier(num_classes, pooling, average_strands, language, kmer, kmer_width, **sizes)
