"""Classifiers on any pretrained model of DNA: HyenaDNA, Caduceus, and language models of every mixer.

Legend: B batch, L length, D model width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from genomics.caduceus import Caduceus
from genomics.inference import Loaded
from genomics.models import Pooling, pool
from genomics.strands import StrandClassifier
from genomics.vocabulary import PAD


class PretrainedClassifier(StrandClassifier):
    """A pretrained model whose hidden states are pooled, and a linear head: (B, L) -> (B, K).

    Scores are averaged over both strands in evaluation. Caduceus-PS has both strands'
    hidden states; each strand is pooled in its own direction and goes through the one head, so that a sequence and its
    reverse complement have the same scores in training too (Schiff et al. 2024, section 4.3).

    Args:
        model: The pretrained model, which is trained on.
        num_classes: K.
        pooling: What stands for the sequence: each channel's maximum, its mean, or the last position. Padding is left
            out.
    """

    def __init__(self, model: Loaded, num_classes: int, pooling: Pooling = "max") -> None:
        two_strands = isinstance(model.net, Caduceus) and model.net.config.rcps
        super().__init__(average_strands=not two_strands)
        self.net, self.start = model.net, model.start
        self._hidden = model.hidden
        self.pooling: Pooling = pooling
        self.two_strands = two_strands
        self.head = nn.Linear(model.backbone().embedding.embedding_dim, num_classes)

    def loss(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy of sequences (B, L) with their classes (B,)."""
        return F.cross_entropy(self(ids), classes)

    def _score(self, ids: Tensor) -> Tensor:
        real = ids != PAD
        hidden = self._states(ids, real)
        if not self.two_strands:
            return self.head(pool(hidden, real, self.pooling))
        one, two = hidden.chunk(2, dim=-1)
        two = two.flip(-1)  # the second strand's channels, position by position of the first one
        ends = two[:, 0] if self.pooling == "last" else pool(two, real, self.pooling)
        return (self.head(pool(one, real, self.pooling)) + self.head(ends)) / 2

    def _states(self, ids: Tensor, real: Tensor) -> Tensor:
        """Hidden states (B, L, D) or (B, L, 2 D) of the sequences' own tokens."""
        if isinstance(self.net, Caduceus):  # reads from the right too, where padding is
            return self.net.hidden(ids, seq_idx=None if bool(real.all()) else real.int() - 1)
        if self.start is None:
            return self._hidden(ids)
        return self._hidden(torch.cat([ids.new_full((len(ids), 1), self.start), ids], dim=1))[:, 1:]


def check_fits(model: Loaded, longest: int, where: str) -> None:
    """Make sure that a model has positions for the longest sequence.

    Raises:
        UserError: If it has not.
    """
    room = None if model.longest is None else model.longest - int(model.start is not None)
    if room is not None and longest > room:
        raise UserError(f"{where}: the longest sequence has {longest:,} bases, and the model reads at most {room:,}")
