"""Layers that mix a sequence, (B, L, D) -> (B, L, D), one a file; ``Mixer`` says what they have in common."""

from core.mixers.around import AroundState
from core.mixers.attention import Attention, AttentionCache, AttentionState
from core.mixers.bidirectional import BiMamba
from core.mixers.contract import Mixer
from core.mixers.dss import DSS
from core.mixers.gated import GatedBlock
from core.mixers.h3 import H3
from core.mixers.hyena import Hyena, HyenaState
from core.mixers.mamba import Mamba, MambaState
from core.mixers.mamba2 import Mamba2, Mamba2State
from core.mixers.mamba3 import Mamba3, Mamba3State
from core.mixers.mamba_complex import MambaComplex
from core.mixers.mamba_s4 import MambaS4, MambaS4State
from core.mixers.retention import LinearAttention, Retention, RetentionState
from core.mixers.s4 import S4
from core.mixers.s4_block import S4State
from core.mixers.s4d import S4D
from core.mixers.s5 import S5, S5State
from core.mixers.ungated import UngatedBlock

__all__ = [
    "DSS",
    "H3",
    "S4",
    "S4D",
    "S5",
    "AroundState",
    "Attention",
    "AttentionCache",
    "AttentionState",
    "BiMamba",
    "GatedBlock",
    "Hyena",
    "HyenaState",
    "LinearAttention",
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
    "Retention",
    "RetentionState",
    "S4State",
    "S5State",
    "UngatedBlock",
]
