"""A backbone whose inputs are words of bases beside bases.

Legend: B batch, L length, D model width.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from core.lm import Backbone
from genomics.vocabulary import PAD, A, T

MOST_BASES = 12  # of a k-mer: 16.8 million vectors


class KmerBackbone(Backbone):
    """A backbone that reads k-mers beside bases: each position's vector has one added for the k bases that end there.

    Overlapping k-mers as tokens (Ji et al. 2021, DNABERT) make a rare word one look-up, which a gradient finds at once;
    from single bases a network has to build a detector for each. Positions whose k bases are not all A, C, G or T have
    none added.

    Args:
        plain: The backbone whose parts it takes over.
        k: Bases of a k-mer.
        width: Of its vectors, of which there are 4^k.
    """

    def __init__(self, plain: Backbone, k: int, width: int) -> None:
        super().__init__(plain.embedding, plain.layers, plain.norm_f)
        if not 1 <= k <= MOST_BASES or width < 1:
            raise ValueError(f"kmer: got {k} of width {width}, wanted 0 to {MOST_BASES} and at least 1")
        self.k = k
        self.kmers = nn.Embedding(4**k, width)
        self.from_kmers = nn.Linear(width, cast(nn.Embedding, plain.embedding).embedding_dim, bias=False)
        nn.init.normal_(self.kmers.weight, std=0.1)

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run whole sequences (B, L); see ``core.lm.Backbone``."""
        before = input_ids.new_full((len(input_ids), self.k - 1), PAD)
        x, residual = self._embed(before, input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        return self.norm_f(x, residual)[0]

    def forward_state(
        self, input_ids: Tensor, state: tuple[Any, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Continue from a state: the last k - 1 ids, then the layers'; see ``init_state`` and ``core.lm.Backbone``."""
        before, *rest = state
        x, residual, states = self._embed(before, input_ids), None, []
        for layer, inner in zip(self.layers, rest, strict=True):
            x, residual, after = layer.forward_state(x, residual, inner, lengths)
            states.append(after)
        joined = torch.cat([before, input_ids], dim=1)
        return self.norm_f(x, residual)[0], (joined[:, joined.shape[1] - self.k + 1 :], *states)

    def _embed(self, before: Tensor, ids: Tensor) -> Tensor:
        words = torch.cat([before, ids], dim=1).unfold(1, self.k, 1)  # (B, L, k)
        real = ((words >= A) & (words <= T)).all(-1)
        powers = 4 ** torch.arange(self.k - 1, -1, -1, device=ids.device)
        index = torch.where(real, ((words - A) * powers).sum(-1), 0)
        return self.embedding(ids) + self.from_kmers(self.kmers(index)) * real.unsqueeze(-1)


def init_state(backbone: Any, batch_size: int) -> tuple[Any, ...]:
    """The state of a backbone before the first token; no bases, where it reads k-mers."""
    states = tuple(layer.mixer.init_state(batch_size) for layer in backbone.layers)
    if not isinstance(backbone, KmerBackbone):
        return states
    return torch.full((batch_size, backbone.k - 1), PAD, device=backbone.kmers.weight.device), *states
