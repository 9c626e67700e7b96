"""Products of our own on Hopper GPUs, in CUDA C++: tiles that come in boxes, shared by clusters of blocks.

A kernel here is one with a product in front and an epilogue that needs the sums in registers: ``norm/late_product.cu``.
What does not depend on the epilogue is in ``common.cuh``; what the host does is here.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvrtc

THREADS = 384  # of a block: a warp group that fetches, two that multiply
SHARED = 227 << 10  # bytes of shared memory that a block may have
TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
NONE, LINES = 0, 3  # CUtensorMapSwizzle: as in memory; 16 bytes of eight lines of 128 bytes changed about
PROMOTED = 2  # CUtensorMapL2promotion: whole lines of 128 bytes
CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
MAP = 16  # words of 8 bytes of a description


def takes(*tensors: Tensor) -> bool:
    """Whether a GPU has the kernels' instructions, and tensors on it lie as boxes want them."""
    x = tensors[0]
    if not x.is_cuda or torch.version.hip is not None or not nvrtc.available():
        return False
    if torch.cuda.get_device_capability(x.device)[0] != 9:  # later GPUs have no products of warp groups
        return False
    return all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)


def described(
    t: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzled: bool = True
) -> array[int]:
    """The description of a tensor in boxes (``CUtensorMap``), which a kernel takes at a multiple of 64 bytes.

    Args:
        t: A CUDA tensor, at a multiple of 16 bytes.
        sizes: Of up to five axes, the innermost first, whose numbers are next to each other.
        strides: Of the other axes, in bytes, multiples of 16 in any order.
        box: Sizes of a box, up to 256 each.
        swizzled: Whether boxes, of 128 bytes innermost, come as the tensor cores want them.

    Raises:
        RuntimeError: If the driver refuses it.
    """
    rank, room = len(sizes), (ctypes.c_byte * (8 * MAP + 64))()
    at = -(-ctypes.addressof(room) // 64) * 64
    status = nvrtc._driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), TYPES[t.dtype], rank, ctypes.c_void_p(t.data_ptr()),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * rank)(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)), 0, LINES if swizzled else NONE, PROMOTED, 0,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"CUDA driver: could not describe boxes {tuple(box)} of {tuple(sizes)} (status {status})")
    return array("q", ctypes.string_at(at, 8 * MAP))


def source(file: Path, outputs: int, maps: Sequence[str], pointers: Sequence[str], integers: Sequence[str]) -> str:
    """A kernel with what it needs: the struct of its arguments, the instruction for so many outputs, ``common.cuh``."""
    fields = [f"void* {n};" for n in pointers] + [f"long long {n};" for n in integers]
    given = f"struct alignas(64) Args {{ char {', '.join(f'{n}[128]' for n in maps)}; {' '.join(fields)} }};"
    common = (Path(__file__).parent / "common.cuh").read_text()
    return "\n".join([given, _instruction(outputs), common, file.read_text()])


def _instruction(outputs: int) -> str:
    """``acc (64, outputs) += x (64, 16) weight^T``; without ``more`` the sums begin with it."""
    count = outputs // 2
    places = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    kind = f"wgmma.mma_async.sync.aligned.m64n{outputs}k16.f32.bf16.bf16"
    return (
        f"__device__ __forceinline__ void multiply(float (&acc)[{count}], "
        "unsigned long long x, unsigned long long w, int more) {\n"
        f'    asm volatile("{{.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n'
        f'{kind} {{{places}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;}}"\n'
        f'        : {operands} : "l"(x), "l"(w), "r"(more));\n}}'
    )


def launch(kernel: nvrtc.Kernel, cluster: int, maps: Sequence[array[int]], fields: Sequence[Tensor | int]) -> None:
    """Launches as many clusters of so many blocks as there is room for; they share the work out themselves."""
    values = array("q")
    for described_ in maps:
        values += described_
    values.extend(v.data_ptr() if isinstance(v, Tensor) else v for v in fields)
    values.extend([0] * (-len(values) % 8))  # the struct ends at a multiple of its alignment
    kernel(_clusters(kernel, cluster) * cluster, THREADS, values)


@functools.cache
def _clusters(kernel: nvrtc.Kernel, blocks: int) -> int:
    """How many clusters a GPU has room for at once."""
    attribute = (ctypes.c_uint * 18)(CLUSTER, 0, blocks, 1, 1)
    config = nvrtc._Config((blocks, 1, 1), (THREADS, 1, 1), kernel.shared, None, ctypes.addressof(attribute), 1)
    found = ctypes.c_int()
    status = nvrtc._driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), kernel.function, ctypes.byref(config))
    if status or not found.value:
        raise RuntimeError(f"CUDA driver: no room for clusters of {blocks} blocks (status {status})")
    return found.value


def bits(value: float) -> int:
    """A float32's bits, for a whole number's field."""
    return struct.unpack("i", struct.pack("f", value))[0]
