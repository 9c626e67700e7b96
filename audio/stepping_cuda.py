"""Generation steps of a U-Net on an NVIDIA GPU as one kernel, ``stepping.cu``: any number of samples a launch.

A step layer by layer is hundreds of launches, each of which takes longer than its arithmetic; even in a CUDA graph they
cost more than the 62 microseconds that a sample of 16 kHz may take. Here a block of threads owns a few clips for the
whole launch, draws their levels itself, and waits for nobody.

Legend: B clips, T samples, Q levels.
"""

from __future__ import annotations

import functools
import math
from array import array
from pathlib import Path

import torch
from torch import Tensor

from audio.kernel_stepper import KernelStepper
from audio.net import SoundNet
from audio.packing import can_pack
from audio.sashimi import ResidualBlock, StageState
from audio.stepping_layout import Layout
from core.mixers import Mamba
from kernels import nvrtc

PARTS = (
    "stepping_machine.cuh", "stepping_functions.cuh", "stepping_stream.cuh", "stepping_products.cuh",
    "stepping_layers.cuh", "stepping_net.cuh", "stepping_levels.cuh", "stepping.cu",
)  # fmt: skip
POINTERS = ("stream", "state", "embedding", "logits", "levels", "offset", "uniform", "how", "likelihood", "profile")
INTEGERS = ("count", "length", "seen", "draw", "top_k")
WARPS = 8  # of a block of threads that compute; two more bring the weights
MOST_LOW = 240  # numbers that make a layer's dt, B and C: their sums are in registers
SHARED_LIMIT = 227 << 10  # bytes of shared memory that a block of threads may have on sm_90
CLIPS = (1, 2, 4, 8)  # of one block of threads
RINGS = (128 << 10, 64 << 10)  # bytes of the stream of weights in shared memory
SLOTS = 4  # pieces of the ring that are copied at once


def has_cuda_step(net: SoundNet) -> bool:
    """Tells whether the kernel runs a net: float32 or bfloat16 layers of known kinds on a GPU that can compile it."""
    weight = net.embedding.weight
    mixers = [module.layer for module in net.modules() if isinstance(module, ResidualBlock)]
    small = all(m.dt_rank + 2 * m.d_state <= MOST_LOW for m in mixers if isinstance(m, Mamba))
    known = can_pack(net) and net.levels <= 1024 and small
    if not (known and weight.is_cuda and weight.dtype in (torch.float32, torch.bfloat16) and nvrtc.available()):
        return False
    return torch.cuda.get_device_capability(weight.device) >= (9, 0)  # bulk copies


@functools.cache
def source() -> str:
    """The kernel with the struct of its arguments."""
    parts = [nvrtc.arguments(POINTERS, INTEGERS)]
    return "\n".join(parts + [(Path(__file__).parent / name).read_text() for name in PARTS])


def fit(layout: Layout, clips: int) -> tuple[int, int]:
    """Bytes of the ring of weights and of all shared memory that a block of threads takes.

    Raises:
        ValueError: If it does not fit.
    """
    rooms = 4 * (clips * layout.words + 4)
    for ring in RINGS:
        shared = ring + rooms + 16 * SLOTS + 16
        if shared <= SHARED_LIMIT and layout.largest <= ring - ring // SLOTS:
            return ring, shared
    raise ValueError(
        f"net: {clips} clips need {rooms:,} bytes of shared memory and its weights {RINGS[-1]:,}, "
        f"wanted <= {SHARED_LIMIT:,} together"
    )


def macros(layout: Layout, clips: int, ring: int) -> tuple[str, ...]:
    """What the kernel is compiled with."""
    return (f"NS {clips}", f"RING {ring}", f"SLOTS {SLOTS}", *layout.macros)


class CudaStepper(KernelStepper):
    """A net and the state of B clips that it advances, on the GPU.

    Args:
        net: The net, in evaluation mode; see ``has_cuda_step``. The products of a bfloat16 net have bfloat16 weights,
            inputs of 16 bits of precision and float32 sums; those of a float32 net lose 2^-21 of a factor.
        state: State of the clips, copied.
        logits: (B, Q) what the net said last; needed to ``draw``.
        classes: (B,) int64 classes of the clips; 0 by default.
        clips: Clips of one block of threads, 1, 2, 4 or 8; by default as few as the multiprocessors can take at once.
        profile: Whether to count (64,) ``cycles``, which costs some.

    Raises:
        ValueError: If the activations of a net do not fit into shared memory.
    """

    pointers, integers = POINTERS, INTEGERS

    def __init__(
        self,
        net: SoundNet,
        state: StageState,
        logits: Tensor | None = None,
        classes: Tensor | None = None,
        clips: int | None = None,
        profile: bool = False,
    ) -> None:
        weight = net.embedding.weight
        layout, self._clips, ring, shared = _choose_clips(net, state, weight.dtype == torch.bfloat16, clips)
        count = len(layout.state)
        spare = layout.state.new_zeros(-count % self._clips, layout.state.shape[1])
        tensors = {
            "stream": torch.from_numpy(layout.stream).to(weight.device),
            "state": (torch.cat([layout.state, spare]) if len(spare) else layout.state).to(weight.device),
        }
        super().__init__(net, tensors, count, (layout.seen, math.prod(net.config.pool)), (64,), logits, classes)
        defined = macros(layout, self._clips, ring) + (("PROFILE 1",) if profile else ())
        self._kernel = nvrtc.kernel(source(), "advance", defined, shared + (1024 if profile else 0))

    def _launch(self, count: int, arguments: array[int]) -> None:
        self._kernel(-(-count // self._clips), 32 * (WARPS + 2), arguments)


def _choose_clips(net: SoundNet, state: StageState, half: bool, clips: int | None) -> tuple[Layout, int, int, int]:
    """The layout for ``clips`` of a block of threads, their number, and bytes of the ring and of all shared memory.

    By default as few clips as the multiprocessors take at once, or as many as fit.
    """
    count = len(state.current if isinstance(state, StageState) else state[0][0])
    processors = torch.cuda.get_device_properties(net.embedding.weight.device).multi_processor_count
    wanted = clips or next((n for n in CLIPS if math.ceil(count / n) <= processors), CLIPS[-1])
    while True:
        try:
            ring, shared = fit(Layout(net, net.init_state(1), wanted, half, WARPS), wanted)
        except ValueError:
            if clips or wanted == 1:
                raise
            wanted //= 2
            continue
        return Layout(net, state, wanted, half, WARPS), wanted, ring, shared
