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

from audio.kernel_stepper import KernelStepper
from audio.net import SoundNet
from audio.relay_layout import WARPS, Relay
from audio.sashimi import StageState
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


class RelayStepper(KernelStepper):
    """A net and the state of one clip that it advances, on the GPU: a ``Stepper``.

    Args:
        net: The net, in evaluation mode.
        relay: From ``relay_of``.
        logits: (1, Q) what the net said last; needed to ``draw``.
        classes: (1,) int64 class of the clip; 0 by default.
        profile: Whether to count (blocks, marks) ``cycles``, which costs some.
    """

    pointers, integers = POINTERS, INTEGERS

    def __init__(
        self,
        net: SoundNet,
        relay: Relay,
        logits: Tensor | None = None,
        classes: Tensor | None = None,
        profile: bool = False,
    ) -> None:
        device = net.embedding.weight.device
        self.relay, blocks = relay, len(relay.table)
        tensors = {
            "weights": torch.from_numpy(relay.weights).to(device),
            "table": torch.from_numpy(relay.table).to(device),
            "mail": torch.zeros(relay.letters, dtype=torch.int64, device=device),
            "state": relay.state.to(device),
        }
        super().__init__(net, tensors, 1, (relay.seen, relay.period), (blocks, MARKS), logits, classes)
        defined = relay.macros + (("PROFILE 1",) if profile else ())
        self._kernel = nvrtc.kernel(source(), "relay", defined, relay.shared, together=True)

    def _launch(self, count: int, arguments: array[int]) -> None:
        self._tensors["mail"].zero_()  # counts begin at 1 again
        self._kernel(len(self.relay.table), 32 * WARPS, arguments)
