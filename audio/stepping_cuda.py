"""Generation steps of a U-Net on an NVIDIA GPU as one kernel, ``stepping.cu``: any number of samples a launch.

A step layer by layer is hundreds of launches, each of which takes longer than its arithmetic; even in a CUDA graph they
cost more than the 62 microseconds that a sample of 16 kHz may take. Here a block of threads owns a few clips for the
whole launch, draws their levels itself, and waits for nobody.

Legend: B clips, T samples, Q levels.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from audio import packing
from audio.net import SoundNet
from audio.packing import Packed, can_pack
from audio.sashimi import StageState
from core.generate import Sampling
from kernels import nvrtc

POINTERS = (
    "blocks",
    "stages",
    "weights",
    "matrices",
    "state",
    "spare",
    "logits",
    "levels",
    "offset",
    "uniform",
    "how",
    "likelihood",
)
INTEGERS = (
    "stage_count", "block_count", "state_size", "count", "length", "seen", "draw", "top_k", "levels_count", "widest",
    "inner", "low", "part", "skip_count", "skips", "centre_skip", "embedding", "last_norm", "head",
)  # fmt: skip
COLUMN_NAMES = (
    "KIND", "DIM", "INNER", "STATE", "WIDTH", "RANK", "W_NORM", "W_IN", "W_CONV", "W_X", "W_DT", "W_A", "W_SKIP",
    "W_OUT", "S_CONV", "S_SSM", "COLUMNS", "MIXER", "DIAGONAL", "POOL", "WIDE", "FIRST_DOWN", "FIRST_UP", "BLOCKS",
    "UP_BLOCKS", "W_DOWN", "W_UP", "S_WAITING", "S_CURRENT", "STAGE_COLUMNS",
)  # fmt: skip
THREADS = 512
SHARED_LIMIT = 227 << 10  # bytes of shared memory that a block of threads may have on sm_90
CLIPS = (1, 2, 4, 8)  # of one block of threads


def has_cuda_step(net: SoundNet) -> bool:
    """Tells whether the kernel runs a net: float32 or bfloat16 layers of known kinds on a GPU that can compile it."""
    weight = net.embedding.weight
    known = can_pack(net) and net.levels <= 1024
    return known and weight.is_cuda and weight.dtype in (torch.float32, torch.bfloat16) and nvrtc.available()


@functools.cache
def source() -> str:
    """The kernel with the struct of its arguments."""
    fields = [f"void* {n};" for n in POINTERS] + [f"long long {n};" for n in INTEGERS]
    return f"struct Args {{ {' '.join(fields)} }};\n" + (Path(__file__).parent / "stepping.cu").read_text()


def macros(clips: int, half: bool) -> tuple[str, ...]:
    """What the kernel is compiled with, for so many clips of a block."""
    columns = tuple(f"{name} {getattr(packing, name)}" for name in COLUMN_NAMES)
    return (f"NS {clips}", f"THREADS {THREADS}", f"HALF {int(half)}", "INFINITY __int_as_float(0x7f800000)", *columns)


class CudaStepper:
    """A net and the state of B clips that it advances, on the GPU.

    Args:
        net: The net, in evaluation mode; see ``has_cuda_step``. The products of a bfloat16 net have bfloat16 weights
            and float32 sums; all else is float32.
        state: State of the clips, copied.
        logits: (B, Q) what the net said last; needed to ``draw``.
        classes: (B,) int64 classes of the clips; 0 by default.
        clips: Clips of one block of threads, 1, 2, 4 or 8; by default as few as keep the blocks to half the
            multiprocessors, beyond which they share the bandwidth of L2 rather than add to it.

    Raises:
        ValueError: If the activations of a net do not fit into shared memory.
    """

    def __init__(
        self,
        net: SoundNet,
        state: StageState,
        logits: Tensor | None = None,
        classes: Tensor | None = None,
        clips: int | None = None,
    ) -> None:
        device = net.embedding.weight.device
        packed = Packed(net, state)
        half = net.embedding.weight.dtype == torch.bfloat16
        count = len(packed.state)
        self._tensors = {
            name: torch.from_numpy(values).to(device)
            for name, values in (("blocks", packed.blocks), ("stages", packed.stages), ("weights", packed.weights))
        }
        self._tensors["matrices"] = self._tensors["weights"].bfloat16() if half else self._tensors["weights"]
        self._tensors["state"] = torch.from_numpy(packed.state).to(device)
        self._tensors["logits"] = torch.zeros(count, net.levels, device=device)
        if logits is not None:
            self._tensors["logits"].copy_(logits)
        self._tensors["offset"] = torch.zeros(count, dtype=torch.int64, device=device)
        if classes is not None:
            self._tensors["offset"].copy_(classes * net.levels)
        self.log_likelihood = torch.zeros(count, dtype=torch.float64, device=device)
        self._tensors["likelihood"] = self.log_likelihood
        self._integers = _sizes(packed, net)
        self._clips = clips or _clips(count, device, self._integers)
        shared = shared_bytes(self._clips, self._integers)
        if shared > SHARED_LIMIT:
            raise ValueError(f"net: its activations need {shared:,} bytes of shared memory, wanted <= {SHARED_LIMIT:,}")
        self._tensors["spare"] = torch.zeros(self._clips, packed.state.shape[1], device=device)
        self._kernel = nvrtc.kernel(source(), "advance", macros(self._clips, half), shared)

    def step(self, levels: Tensor) -> Tensor:
        """Advances every clip by one level (B,) int64; returns logits (B, Q) float32."""
        self._run(levels[:, None].clone(), None, Sampling())
        return self._tensors["logits"].clone()

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Draws the next T levels of every clip.

        Args:
            uniform: (B, T) float64 random numbers in [0, 1).
            sampling: How; without a repetition penalty.

        Returns:
            (B, T) int64 on the GPU. ``log_likelihood`` (B,) grows by the log of their probability under the net, in
            nats, whatever the sampling.
        """
        device = self._tensors["logits"].device
        levels = torch.empty(uniform.shape, dtype=torch.int64, device=device)
        self._run(levels, uniform.to(device).contiguous(), sampling)
        return levels

    def _run(self, levels: Tensor, uniform: Tensor | None, sampling: Sampling) -> None:
        how = torch.tensor([sampling.temperature, sampling.top_p, sampling.min_p], dtype=torch.float64)
        tensors = {**self._tensors, "levels": levels, "uniform": uniform, "how": how.to(levels.device)}
        pointers = [0 if tensors[n] is None else tensors[n].data_ptr() for n in POINTERS]  # type: ignore[union-attr]
        count, length = levels.shape
        given = {"length": length, "draw": int(uniform is not None), "top_k": sampling.top_k}
        integers = [{**self._integers, **given}[n] for n in INTEGERS]
        self._kernel(-(-count // self._clips), THREADS, [*pointers, *integers])
        self._integers["seen"] += length
        self._last = tensors  # until the launch is over


def _sizes(packed: Packed, net: SoundNet) -> dict[str, int]:
    """The struct's integers that a net and a state decide."""
    blocks, stages = packed.blocks, packed.stages
    stack = (stages[:, packing.POOL] * stages[:, packing.WIDE]).max()
    inner = max(2 * blocks[:, packing.INNER].max(), stack)
    skip = int(stages[:, packing.BLOCKS].sum() + len(stages)) if net.config.unet else len(stages)
    seen, stride = 0, 1
    for stage, phase in zip(stages[:-1], packed.phase[0], strict=False):
        seen, stride = seen + stride * int(phase), stride * int(stage[packing.POOL])
    return {
        "stage_count": len(stages), "block_count": len(blocks), "state_size": packed.state.shape[1],
        "count": len(packed.state), "seen": seen, "levels_count": net.levels,
        "widest": _even(stages[:, packing.WIDE].max()),
        "inner": _even(inner), "low": _even((blocks[:, packing.RANK] + 2 * blocks[:, packing.STATE]).max()),
        "part": max(4 * THREADS, int(blocks[:, packing.INNER].max())), "skip_count": skip,
        "skips": int(net.config.unet), "centre_skip": 1, "embedding": int(packed.ends[0]),
        "last_norm": int(packed.ends[1]), "head": int(packed.ends[2]),
    }  # fmt: skip


def _even(size: int) -> int:
    return -(-int(size) // 4) * 4


def shared_bytes(clips: int, sizes: dict[str, int]) -> int:
    """Shared memory of a block of threads."""
    widest, levels = sizes["widest"], sizes["levels_count"]
    numbers = 2 * widest + 2 * sizes["inner"] + sizes["low"] + 3 * levels + sizes["part"] + sizes["skip_count"] * widest
    tables = sizes["block_count"] * packing.COLUMNS + sizes["stage_count"] * packing.STAGE_COLUMNS
    return 4 * (clips * numbers + tables) + 16


def _clips(count: int, device: torch.device, sizes: dict[str, int]) -> int:
    """Clips of a block of threads: as few as half the multiprocessors can take, within shared memory."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    fitting = [n for n in CLIPS if shared_bytes(n, sizes) <= SHARED_LIMIT] or [1]
    enough = [n for n in fitting if math.ceil(count / n) <= processors // 2]
    return enough[0] if enough else fitting[-1]
