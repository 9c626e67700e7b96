"""Generation of one clip on an NVIDIA GPU by a relay of blocks of threads, ``relay.cu``: many samples a launch.

A block of threads that runs all layers of one clip reads all their weights for every sample, and its layers wait for
each other although the inner stages' answers are not needed before the next frame. Here every layer has its own blocks.
"""

from __future__ import annotations

import functools
from array import array
from pathlib import Path

import torch
from torch import Tensor

from audio.net import SoundNet
from audio.relay_layout import WARPS, Relay
from audio.sashimi import StageState
from core.sampling import Sampling
from kernels import nvrtc

PARTS = (
    "stepping_machine.cuh", "stepping_functions.cuh", "stepping_levels.cuh", "relay_mail.cuh", "relay_layers.cuh",
    "relay.cu",
)  # fmt: skip
POINTERS = (
    "weights", "table", "mail", "state", "embedding", "logits", "levels", "offset", "uniform", "how", "likelihood",
    "profile",
)  # fmt: skip
INTEGERS = ("length", "seen", "draw", "top_k")
MARKS = 16  # of a block of threads, in a profile
LONGEST = 1 << 20  # samples of a launch


@functools.cache
def source() -> str:
    """The kernel with the struct of its arguments."""
    parts = [nvrtc.arguments(POINTERS, INTEGERS)]
    return "\n".join(parts + [(Path(__file__).parent / name).read_text() for name in PARTS])


def relay_of(net: SoundNet, state: StageState) -> Relay | None:
    """The net laid out for a relay, or None: it wants one clip, bfloat16 Mamba layers, and room for all its blocks."""
    weight = net.embedding.weight
    clips = len(state.current if isinstance(state, StageState) else state[0][0])
    if clips != 1 or weight.dtype != torch.bfloat16 or not weight.is_cuda or net.levels > 1024:
        return None
    try:
        relay = Relay(net, state)
    except ValueError:
        return None
    return relay if len(relay.table) <= torch.cuda.get_device_properties(weight.device).multi_processor_count else None


class RelayStepper:
    """A net and the state of one clip that it advances, on the GPU: a ``Stepper``.

    Args:
        net: The net, in evaluation mode.
        relay: From ``relay_of``.
        logits: (1, Q) what the net said last; needed to ``draw``.
        classes: (1,) int64 class of the clip; 0 by default.
        profile: Whether to count cycles, which costs some: see ``cycles``.
    """

    def __init__(
        self,
        net: SoundNet,
        relay: Relay,
        logits: Tensor | None = None,
        classes: Tensor | None = None,
        profile: bool = False,
    ) -> None:
        device = net.embedding.weight.device
        self.relay, self._blocks = relay, len(relay.table)
        self.log_likelihood = torch.zeros(1, dtype=torch.float64, device=device)
        # (blocks, marks) int64 cycles of the last launch between the marks in the source
        self.cycles = torch.zeros(self._blocks, MARKS, dtype=torch.int64, device=device)
        self._tensors = {
            "weights": torch.from_numpy(relay.weights).to(device),
            "table": torch.from_numpy(relay.table).to(device),
            "mail": torch.zeros(relay.letters, dtype=torch.int64, device=device),
            "state": relay.state.to(device),
            "embedding": net.table().detach().float().contiguous(),
            "logits": torch.zeros(1, net.levels, device=device),
            "offset": torch.zeros(1, dtype=torch.int64, device=device),
            "likelihood": self.log_likelihood,
            "profile": self.cycles,
        }
        if logits is not None:
            self._tensors["logits"].copy_(logits)
        if classes is not None:
            self._tensors["offset"].copy_(classes * net.levels)
        self._seen, self._period = relay.seen, relay.period
        macros = relay.macros + (("PROFILE 1",) if profile else ())
        self._kernel = nvrtc.kernel(source(), "relay", macros, relay.shared, together=True)

    def step(self, levels: Tensor) -> Tensor:
        """Advances the clip by a level (1,) int64; returns logits (1, Q) float32."""
        self._run(levels[:, None].clone(), None, Sampling())
        return self._tensors["logits"].clone()

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Draws the next T levels (1, T), as ``CudaStepper.draw``."""
        device = self._tensors["logits"].device
        levels = torch.empty(uniform.shape, dtype=torch.int64, device=device)
        for first in range(0, uniform.shape[1], LONGEST):
            part = levels[:, first : first + LONGEST]
            self._run(part, uniform[:, first : first + LONGEST].to(device).contiguous(), sampling)
        return levels

    def _run(self, levels: Tensor, uniform: Tensor | None, sampling: Sampling) -> None:
        length = levels.shape[1]
        if not length:
            return
        self._tensors["mail"].zero_()  # counts begin at 1 again
        how = torch.tensor([sampling.temperature, sampling.top_p, sampling.min_p], dtype=torch.float64)
        tensors = {**self._tensors, "levels": levels, "uniform": uniform, "how": how.to(levels.device)}
        pointers = [0 if tensors[n] is None else tensors[n].data_ptr() for n in POINTERS]  # type: ignore[union-attr]
        integers = [length, self._seen, int(uniform is not None), sampling.top_k]
        self._kernel(self._blocks, 32 * WARPS, array("q", [*pointers, *integers]))
        self._seen = (self._seen + length) % self._period
        self._last = tensors  # until the launch is over
