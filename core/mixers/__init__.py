"""Layers that mix a sequence, (B, L, D) -> (B, L, D), one a file; ``Mixer`` says what they have in common."""

from core.mixers.bidirectional import BiMamba
from core.mixers.contract import Mixer
from core.mixers.hyena import Hyena, HyenaState
from core.mixers.mamba import Mamba, MambaState

__all__ = ["BiMamba", "Hyena", "HyenaState", "Mamba", "MambaState", "Mixer"]
