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
from typing import NamedTuple

import numpy as np
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
    "logits",
    "levels",
    "offset",
    "uniform",
    "how",
    "likelihood",
)
INTEGERS = ("count", "length", "seen", "draw", "top_k", "embedding", "last_norm", "head")
COLUMN_NAMES = (
    "W_NORM", "W_IN", "W_CONV", "W_X", "W_DT", "W_A", "W_SKIP", "W_OUT", "S_CONV", "S_SSM", "POOL", "WIDE",
    "FIRST_DOWN", "FIRST_UP", "BLOCKS", "UP_BLOCKS", "W_DOWN", "W_UP", "S_WAITING", "S_CURRENT", "STAGE_COLUMNS",
)  # fmt: skip
LAYERS = {
    packing.MIXER: ("mamba", (packing.DIM, packing.INNER, packing.STATE, packing.WIDTH, packing.RANK)),
    packing.DIAGONAL: ("s4d", (packing.DIM, packing.INNER, packing.STATE)),
    packing.FEED_FORWARD: ("feed_forward", (packing.DIM, packing.INNER)),
}
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


def macros(sizes: Sizes, clips: int, half: bool) -> tuple[str, ...]:
    """What the kernel is compiled with for a net, and for so many clips of a block."""
    columns = tuple(f"{name} {getattr(packing, name)}" for name in COLUMN_NAMES)
    columns += (f"SHAPE {packing.COLUMNS}", f"COLUMNS {packing.COLUMNS + 1}")
    return (
        f"NS {clips}", f"THREADS {THREADS}", f"HALF {int(half)}", "INFINITY __int_as_float(0x7f800000)", *columns,
        *(f"{name.upper()} {value}" for name, value in sizes._asdict().items()),
    )  # fmt: skip


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
        sizes, blocks = sizes_of(packed, net)
        self._clips = clips or _clips(count, device, sizes)
        shared = shared_bytes(self._clips, sizes)
        if shared > SHARED_LIMIT:
            raise ValueError(f"net: its activations need {shared:,} bytes of shared memory, wanted <= {SHARED_LIMIT:,}")
        arrays = {"blocks": blocks, "stages": packed.stages, "weights": packed.weights}
        self._tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
        self._tensors["matrices"] = self._tensors["weights"].bfloat16() if half else self._tensors["weights"]
        spare = np.zeros((-count % self._clips, packed.state.shape[1]), np.float32)
        self._tensors["state"] = torch.from_numpy(np.concatenate([packed.state, spare])).to(device)
        self._tensors["logits"] = torch.zeros(count, net.levels, device=device)
        if logits is not None:
            self._tensors["logits"].copy_(logits)
        self._tensors["offset"] = torch.zeros(count, dtype=torch.int64, device=device)
        if classes is not None:
            self._tensors["offset"].copy_(classes * net.levels)
        self.log_likelihood = torch.zeros(count, dtype=torch.float64, device=device)
        self._tensors["likelihood"] = self.log_likelihood
        ends = dict(zip(("embedding", "last_norm", "head"), packed.ends.tolist(), strict=True))
        self._integers = {"seen": _seen(packed), **ends}
        self._kernel = nvrtc.kernel(source(), "advance", macros(sizes, self._clips, half), shared)

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
        given = {"count": count, "length": length, "draw": int(uniform is not None), "top_k": sampling.top_k}
        integers = [{**self._integers, **given}[n] for n in INTEGERS]
        self._kernel(-(-count // self._clips), THREADS, array("q", [*pointers, *integers]))
        self._integers["seen"] += length
        self._last = tensors  # until the launch is over


class Sizes(NamedTuple):
    """What the kernel knows of a net when it is compiled: macros, in upper case."""

    widest: int  # numbers of x
    inner_wide: int
    low_wide: int
    part_wide: int
    skips_kept: int
    levels: int
    width_out: int
    state_size: int
    block_count: int
    stage_count: int
    unet: int
    block_cases: str  # of the layers' shapes, which the last column of the table of blocks counts
    down_cases: str
    up_cases: str


def sizes_of(packed: Packed, net: SoundNet) -> tuple[Sizes, np.ndarray]:
    """The sizes of a net, and its table of blocks with a column for their shapes."""
    blocks, stages = packed.blocks, packed.stages
    wide, pool = stages[:, packing.WIDE], stages[:, packing.POOL]
    shapes, which = np.unique(blocks[:, : packing.W_NORM], axis=0, return_inverse=True)
    cases = []
    for i, shape in enumerate(shapes.tolist()):
        name, columns = LAYERS[shape[packing.KIND]]
        cases.append(f"case {i}: {name}<{', '.join(str(shape[c]) for c in columns)}>(n, row); break;")
    stage = range(len(stages) - 1)
    down = [f"case {d}: pool_down<{pool[d] * wide[d]}, {wide[d + 1]}>(n, stage[W_DOWN]); break;" for d in stage]
    up = [f"case {d}: pool_up<{wide[d + 1]}, {pool[d] * wide[d]}>(n, stage[W_UP]); break;" for d in stage]
    sizes = Sizes(
        widest=_even(wide.max()),
        inner_wide=_even(max(2 * blocks[:, packing.INNER].max(), (pool * wide).max())),
        low_wide=_even((blocks[:, packing.RANK] + 2 * blocks[:, packing.STATE]).max()),
        part_wide=max(4 * THREADS, int(blocks[:, packing.INNER].max())),
        skips_kept=int(stages[:, packing.BLOCKS].sum() + len(stages)) if net.config.unet else len(stages),
        levels=net.levels,
        width_out=int(wide[0]),
        state_size=packed.state.shape[1],
        block_count=len(blocks),
        stage_count=len(stages),
        unet=int(net.config.unet),
        block_cases=" ".join(cases),
        down_cases=" ".join(down),
        up_cases=" ".join(up),
    )
    return sizes, np.ascontiguousarray(np.column_stack([blocks, which.reshape(-1)]))


def _seen(packed: Packed) -> int:
    """Samples that a state has seen, as far as they matter: within a period of the poolings."""
    seen, stride = 0, 1
    for stage, phase in zip(packed.stages[:-1], packed.phase[0], strict=False):
        seen, stride = seen + stride * int(phase), stride * int(stage[packing.POOL])
    return seen


def _even(size: int) -> int:
    return -(-int(size) // 4) * 4


def shared_bytes(clips: int, sizes: Sizes) -> int:
    """Shared memory of a block of threads."""
    numbers = 2 * sizes.widest + 2 * sizes.inner_wide + sizes.low_wide + 3 * sizes.levels + sizes.part_wide
    tables = sizes.block_count * (packing.COLUMNS + 1) + sizes.stage_count * packing.STAGE_COLUMNS
    return 4 * (clips * (numbers + sizes.skips_kept * sizes.widest) + tables)


def _clips(count: int, device: torch.device, sizes: Sizes) -> int:
    """Clips of a block of threads: as few as half the multiprocessors can take, within shared memory."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    fitting = [n for n in CLIPS if shared_bytes(n, sizes) <= SHARED_LIMIT] or [1]
    enough = [n for n in fitting if math.ceil(count / n) <= processors // 2]
    return enough[0] if enough else fitting[-1]
