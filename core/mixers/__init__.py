"""Layers that mix a sequence, (B, L, D) -> (B, L, D), one a file; ``Mixer`` says what they have in common."""

from core.mixers.attention import Attention, AttentionCache, AttentionState
from core.mixers.bidirectional import BiMamba
from core.mixers.contract import Mixer
from core.mixers.hyena import Hyena, HyenaState
from core.mixers.mamba import Mamba, MambaState
from core.mixers.mamba2 import Mamba2, Mamba2State
from core.mixers.mamba3 import Mamba3, Mamba3State
from core.mixers.mamba_complex import MambaComplex
from core.mixers.mamba_s4 import MambaS4, MambaS4State
from core.mixers.s4 import S4
from core.mixers.s4d import S4D, S4State

__all__ = [
    "S4",
    "S4D",
    "Attention",
    "AttentionCache",
    "AttentionState",
    "BiMamba",
    "Hyena",
    "HyenaState",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "MambaComplex",
    "MambaS4",
    "MambaS4State",
    "MambaState",
    "Mixer",
    "S4State",
]
