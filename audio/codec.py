"""Waveforms as integer levels and back: mu-law and linear quantisation with named normalisation.

The bits per sample of a model depend on scheme, normalisation and number of levels, so they travel together as one
``Codec``, which checkpoints record.

Dimension letters: L samples.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """How a waveform becomes levels 0 ... levels - 1, and back.

    With Q = levels and a normalised waveform x in [-1, 1], after companding by y = x (linear) or
    y = sign(x) ln(1 + mu |x|) / ln(1 + mu), mu = Q - 1 (ITU-T G.711, for any Q)::

        q = floor((Q - 0.01) (y + 1) / 2 + 0.005)        encode, as published with SaShiMi (Goel et al. 2022)
        y = 2 (q + 1/2) / Q - 1                          decode at the centre of the level's bin
        y = 2 q / Q - 1                                  decode at its lower edge, as published

    The defaults are the published ones but for ``decode_at``: the edge costs 6 dB of signal-to-noise ratio, and
    encoding what it gave may yield another level; from the centre encoding returns to the same level. The published
    normalisation, ``minmax``, moves each clip so that its extremes meet both ends of the range; a clip that is not
    symmetric then has a constant offset, and its silence any level at all. ``peak`` keeps silence in the middle.

    Args:
        scheme: Companding: ``mu-law``, fine near zero, or ``linear``.
        normalize: What is done to each clip first: ``minmax`` maps its minimum to -1 and its maximum to 1; ``peak``
            divides by the largest magnitude; ``none`` leaves it. What is then out of [-1, 1] is clipped, and a constant
            clip, which has no range, becomes silence (``minmax``, ``peak``).
        levels: Number of levels Q, at least 2.
        decode_at: Where in a level's bin decoding puts the sample: ``centre`` or ``edge``.

    Raises:
        ValueError: For an unknown name or fewer than 2 levels.
    """

    scheme: Literal["mu-law", "linear"] = "mu-law"
    normalize: Literal["minmax", "peak", "none"] = "minmax"
    levels: int = 256
    decode_at: Literal["centre", "edge"] = "centre"

    def __post_init__(self) -> None:
        for name, wanted in (
            ("scheme", ("mu-law", "linear")),
            ("normalize", ("minmax", "peak", "none")),
            ("decode_at", ("centre", "edge")),
        ):
            if getattr(self, name) not in wanted:
                raise ValueError(f"codec: {name} is {getattr(self, name)!r}, wanted one of {', '.join(wanted)}")
        if not 2 <= self.levels <= 2**15:
            raise ValueError(f"codec: levels is {self.levels}, wanted 2 to 32768")

    @property
    def start(self) -> int:
        """The level that stands before the first sample: the middle one, 128 of 256."""
        return self.levels // 2

    def normalized(self, wave: Tensor) -> Tensor:
        """Brings one clip (L,) of any amplitude into [-1, 1], as ``normalize`` says.

        Raises:
            ValueError: For samples that are not finite.
        """
        if not torch.isfinite(wave).all():
            raise ValueError("codec: got samples that are NaN or infinite, wanted finite ones")
        if not wave.numel() or self.normalize == "none":
            return wave.clamp(-1, 1)
        if self.normalize == "peak":
            peak = wave.abs().max()
            return wave / peak if peak > 0 else wave
        low, high = wave.min(), wave.max()
        return (2 * (wave - low) / (high - low) - 1).clamp(-1, 1) if high > low else torch.zeros_like(wave)

    def encode(self, wave: Tensor) -> Tensor:
        """Normalises and quantises one clip.

        Args:
            wave: (L,) floating point, of any amplitude. It is computed in float64, so that a level does not depend on
                the machine.

        Returns:
            (L,) int64 levels.
        """
        y = self.normalized(wave.double())
        if self.scheme == "mu-law":
            y = torch.sign(y) * torch.log1p((self.levels - 1) * y.abs()) / math.log(self.levels)
        levels = torch.floor((self.levels - 0.01) * (y + 1) / 2 + 0.005).long()
        return levels.clamp(0, self.levels - 1)

    def decode(self, levels: Tensor) -> Tensor:
        """Turns levels into samples in [-1, 1]; normalisation is not undone, since levels do not hold the scale.

        Args:
            levels: Integers of any shape, 0 to ``levels`` - 1.

        Returns:
            float32 samples of the same shape.

        Raises:
            ValueError: For integers that are no levels.
        """
        if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < self.levels:
            raise ValueError(
                f"codec: got levels from {int(levels.min())} to {int(levels.max())}, wanted 0 to {self.levels - 1}"
            )
        offset = 0.5 if self.decode_at == "centre" else 0.0
        y = 2 * (levels.double() + offset) / self.levels - 1
        if self.scheme == "mu-law":
            y = torch.sign(y) * torch.expm1(y.abs() * math.log(self.levels)) / (self.levels - 1)
        return y.float()

    def __str__(self) -> str:
        return f"{self.scheme}, {self.levels} levels, {self.normalize} normalisation, decoded at the {self.decode_at}"


# Checkpoints hold the codec, and are read with weights_only.
torch.serialization.add_safe_globals([Codec])
