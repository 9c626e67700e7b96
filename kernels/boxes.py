"""Descriptions of tensors for bulk copies in boxes (``CUtensorMap``), for kernels in CUDA C++ on Hopper GPUs."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.nvrtc import _driver

WORDS = 16  # of 8 bytes, of a description
TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
NONE, LINES = 0, 3  # CUtensorMapSwizzle: as in memory; 16 bytes of eight lines of 128 bytes changed about
PROMOTED = 2  # CUtensorMapL2promotion: whole lines of 128 bytes


def described(
    t: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzled: bool = True
) -> array[int]:
    """The description of a tensor in boxes, 128 bytes that a kernel takes at a multiple of 64.

    Args:
        t: A CUDA tensor, at a multiple of 16 bytes.
        sizes: Of up to five axes, the innermost first, whose numbers are next to each other.
        strides: Of the other axes, in bytes, multiples of 16 in any order.
        box: Sizes of a box, up to 256 each.
        swizzled: Whether boxes, of 128 bytes innermost, come as the tensor cores want them.

    Raises:
        RuntimeError: If the driver refuses it.
    """
    rank, room = len(sizes), (ctypes.c_byte * (8 * WORDS + 64))()
    at = -(-ctypes.addressof(room) // 64) * 64
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), TYPES[t.dtype], rank, ctypes.c_void_p(t.data_ptr()),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * rank)(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)), 0, LINES if swizzled else NONE, PROMOTED, 0,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"CUDA driver: could not describe boxes {tuple(box)} of {tuple(sizes)} (status {status})")
    return array("q", ctypes.string_at(at, 8 * WORDS))
