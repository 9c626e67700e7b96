"""What classifiers of DNA have in common: a sequence and its reverse complement are the same molecule.

Legend: B batch, L length, K classes.
"""

import torch
from torch import Tensor, nn

from genomics.vocabulary import COMPLEMENT, PAD


class StrandClassifier(nn.Module):
    """Scores of sequences, (B, L) -> (B, K). A subclass has ``_score``.

    Args:
        average_strands: Score both strands of each sequence and average the logits, so that a sequence and its
            reverse complement get the same scores (Schiff et al. 2024, Caduceus, section 4.2, post-hoc conjoining).
            In training a strand is scored as it comes.
    """

    complement: Tensor

    def __init__(self, average_strands: bool) -> None:
        super().__init__()
        self.average_strands = average_strands
        self.register_buffer("complement", torch.from_numpy(COMPLEMENT).long(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Score sequences.

        Args:
            ids: (B, L) int64, right-padded with [PAD].

        Returns:
            Logits (B, K).
        """
        logits = self._score(ids)
        if self.average_strands and not self.training:
            logits = (logits + self._score(self.other_strand(ids))) / 2
        return logits

    def other_strand(self, ids: Tensor) -> Tensor:
        """Return reverse complements (B, L); padding stays at the right."""
        real = (ids != PAD).sum(1, keepdim=True)
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.complement[ids.gather(1, torch.where(index < real, real - 1 - index, index))]

    def _score(self, ids: Tensor) -> Tensor:
        """Logits (B, K) of the strand that is given."""
        raise NotImplementedError
