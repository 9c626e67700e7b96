"""The net that is trained: levels in, scores of the next level out.

Legend: B batch, L length, D width, Q levels.
"""

import math

import torch
from torch import Tensor, nn

from audio.sashimi import Sashimi, SashimiConfig, StageState


class SoundNet(nn.Module):
    """Levels in, scores of the next level out: embedding, ``Sashimi``, linear head.

    Embedding and head start as smooth functions of the level rather than at random: sounds are short of data for 256
    unrelated symbols. On the spoken digits 60 steps from there are worth 200 from random numbers.

    Args:
        config: Sizes of the U-Net.
        levels: Number of levels Q.
        classes: Number of classes K, such as the ten digits, or 0. In a sequence of class c every level goes in as
            level + c Q, the start level too: the class's own embedding is added to the level's. It is not enough to
            say the class at the start: nets trained so ignored it.
    """

    def __init__(self, config: SashimiConfig, levels: int = 256, classes: int = 0) -> None:
        super().__init__()
        self.config, self.levels, self.classes = config, levels, classes
        self.embedding = nn.Embedding(levels, config.d_model)
        self.class_embedding = nn.Embedding(classes, config.d_model) if classes else None
        self.model = Sashimi(config)
        self.head = nn.Linear(config.d_model, levels)
        smooth = waves(levels, config.d_model)
        with torch.no_grad():
            self.embedding.weight.copy_(smooth)
            if self.class_embedding is not None:
                self.class_embedding.weight.normal_(std=0.2)  # about as large as the levels' vectors
            self.head.weight.copy_(0.3 * smooth)

    def table(self) -> Tensor:
        """The vectors of all that can go in: (max(K, 1) Q, D), the levels of class 0 first."""
        if self.class_embedding is None:
            return self.embedding.weight
        return (self.class_embedding.weight[:, None] + self.embedding.weight).flatten(0, 1)

    def embed(self, x: Tensor) -> Tensor:
        """Looks up levels (B, L), which hold their class; returns (B, L, D)."""
        if self.class_embedding is None:
            return self.embedding(x)
        return self.embedding(x % self.levels) + self.class_embedding(x // self.levels)

    def forward(self, x: Tensor) -> Tensor:
        """Scores every next level.

        Args:
            x: (B, L) int64 levels from the start of the sequences, with their class; begin them with the codec's start
                level.

        Returns:
            (B, L, Q) logits; those at t are about the level at t + 1.
        """
        return self.head(self.model(self.embed(x)))

    def forward_state(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """Continues from ``state`` with levels (B, L); returns logits (B, L, Q) and the state afterwards."""
        y, state = self.model.forward_state(self.embed(x), state)
        return self.head(y), state

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StageState:
        """The state before the first level."""
        return self.model.init_state(batch_size, device, dtype)


def waves(levels: int, dim: int) -> Tensor:
    """Sines and cosines of the level, 1/4, 2/4, 3/4 ... periods over all of them, with amplitudes like f^-1/2.

    Returns:
        (levels, dim) float32.
    """
    frequency = 1 + torch.arange(dim) // 2
    angle = (2 * (torch.arange(levels) + 0.5) / levels - 1)[:, None] * (0.5 * math.pi * frequency)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()) / frequency.sqrt()
