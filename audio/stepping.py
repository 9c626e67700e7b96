"""Generation steps of a Mamba U-Net as one compiled function: what a CPU needs to come near real time.

A step of ``SoundNet.forward_state`` is some hundred small operations, each of which costs more to call than to compute.
Here the weights lie in one array, a table says where, and a loop without calls runs the whole net for one sample:
``stepping_layers``, ``stepping_net`` and ``stepping_levels``. The numbers are the same up to rounding.

Legend: B clips, T samples, Q levels.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from audio.net import SoundNet
from audio.packing import Packed, can_pack
from audio.sashimi import StageState
from audio.stepping_net import advance
from core.generate import Sampling
from kernels import threads


def has_compiled_step(net: SoundNet) -> bool:
    """Tells whether there is a compiled step: for float32 nets of known layers on the CPU."""
    weight = net.embedding.weight
    return can_pack(net) and weight.dtype == torch.float32 and weight.device.type == "cpu"


class CompiledStepper:
    """A net and the state of B clips that it advances.

    Args:
        net: The net, in evaluation mode; see ``has_compiled_step``.
        state: State of the clips, copied.
        logits: (B, Q) what the net said last; needed to ``draw``.
        classes: (B,) int64 classes of the clips; 0 by default.
        strength: Of guidance (``audio.steppers.Guidance``); above 0 there are states, logits and classes of 2 B clips:
            those that are told their class, then the same ones untold.
    """

    def __init__(
        self,
        net: SoundNet,
        state: StageState,
        logits: Tensor | None = None,
        classes: Tensor | None = None,
        strength: float = 0.0,
    ) -> None:
        self._packed, self._unet = Packed(net, state), net.config.unet
        self._strength = np.float32(strength)
        count = len(self._packed.state)
        self._offset = np.zeros(count, np.int64)
        if classes is not None:
            self._offset[:] = classes.numpy() * net.levels
        self._logits = np.zeros((count, net.levels), np.float32)
        self._likelihood = np.zeros(count // 2 if strength else count)
        if logits is not None:
            self._logits[:] = logits.numpy()

    @property
    def log_likelihood(self) -> Tensor:
        """(B,) float64: of the levels drawn so far, under the net itself whatever the sampling, in nats."""
        return torch.from_numpy(self._likelihood.copy())

    def step(self, levels: Tensor) -> Tensor:
        """Advances every clip by one level (B,) int64; returns logits (B, Q) float32."""
        self._run(levels[:, None].numpy().copy(), np.zeros((len(levels), 0)), Sampling(), False)
        return torch.from_numpy(self._logits[: len(levels)].copy())

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Draws the next T levels of every clip.

        Args:
            uniform: (B, T) float64 random numbers in [0, 1).
            sampling: How; without a repetition penalty.

        Returns:
            (B, T) int64.
        """
        levels = np.empty(uniform.shape, np.int64)
        self._run(levels, np.ascontiguousarray(uniform.numpy()), sampling, True)
        return torch.from_numpy(levels)

    def _run(self, levels: np.ndarray, uniform: np.ndarray, sampling: Sampling, draw: bool) -> None:
        p, count = self._packed, len(levels)
        how = float(sampling.temperature), int(sampling.top_k), float(sampling.top_p), float(sampling.min_p)
        parts = min(count, torch.get_num_threads())
        edges = [count * i // parts for i in range(parts + 1)]
        arrays = (p.blocks, p.stages, p.weights, p.state, p.phase, p.ends, self._logits, self._offset, self._strength)
        given = levels, uniform, how, draw, self._unet, self._likelihood
        threads.run(advance, [(a, b, *given, *arrays) for a, b in pairwise(edges)])
