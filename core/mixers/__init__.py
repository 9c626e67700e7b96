"""Layers that mix a sequence, (B, L, D) -> (B, L, D), one a file; ``Mixer`` says what they have in common."""

from core.mixers.contract import Mixer
from core.mixers.mamba import Mamba, MambaState

__all__ = ["Mamba", "MambaState", "Mixer"]
