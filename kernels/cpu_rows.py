"""Rows of numbers between memory and SIMD lanes on the CPU, floats or bfloat16, for the numba kernels.

bfloat16 lies in arrays of uint16, which numba takes. It is widened where it is loaded and rounded where it is stored,
so that a kernel's input and output cross the memory once and in half the bytes, not as float32 copies beside them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from torch import Tensor

from kernels.selective_scan.cpu_arguments import FUSED
from kernels.selective_scan.cpu_arguments import SOURCES as BELOW
from kernels.selective_scan.cpu_simd import WIDTH, Lanes, intrinsic, pack, pointer

# Each kernel closes over this, so that an edit compiles it again: see ``kernels.selective_scan.cpu_arguments``.
SOURCES = hashlib.sha256(BELOW.encode() + Path(__file__).read_bytes()).hexdigest()
FLOATS = (torch.float32, torch.bfloat16)  # dtypes whose rows kernels read and write themselves
_HALF, _WORD = ir.IntType(16), ir.IntType(32)


def _vector(kind: Any) -> ir.VectorType:
    return ir.VectorType(kind, WIDTH)


def _kinds(memory: Any) -> tuple[bool, Any, Any]:
    """Of a pointer: whether it is to bfloat16, the numba type of its numbers in registers, LLVM's type in memory."""
    narrow = memory.dtype == types.uint16
    kind = types.float32 if narrow else memory.dtype
    return narrow, kind, _HALF if narrow else ir.FloatType() if kind == types.float32 else ir.DoubleType()


def _address(builder: Any, memory: Any, index: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(memory, [index]), kind.as_pointer())


def _widened(builder: Any, half: Any, words: Any, floats: Any) -> Any:
    """The float32 numbers whose upper halves are given."""
    sixteen = words(16) if isinstance(words, ir.IntType) else ir.Constant(words, [16] * WIDTH)
    return builder.bitcast(builder.shl(builder.zext(half, words), sixteen), floats)


def _rounded(builder: Any, value: Any, halves: Any, words: Any) -> Any:
    """The upper halves of float32 numbers, rounded to nearest, ties to even; NaN stays one."""

    def constant(kind: Any, number: int) -> Any:
        return kind(number) if isinstance(kind, ir.IntType) else ir.Constant(kind, [number] * WIDTH)

    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
    bits = builder.add(bits, builder.add(odd, constant(words, 0x7FFF)))
    upper = builder.trunc(builder.lshr(bits, constant(words, 16)), halves)
    return builder.select(builder.fcmp_unordered("uno", value, value), constant(halves, 0x7FC0), upper)


@intrinsic
def read(typingctx: Any, memory: Any, index: Any) -> Any:
    """One vector of lanes from element ``index`` of a pointer to floats, or to bfloat16 as uint16."""
    narrow, kind, element = _kinds(memory)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = builder.load(_address(builder, args[0], args[1], _vector(element)), align=memory.dtype.bitwidth // 8)
        if narrow:
            found = _widened(builder, found, _vector(_WORD), _vector(ir.FloatType()))
        return pack(builder, [found])

    return Lanes(kind, 1)(memory, types.intp), lower


@intrinsic
def write(typingctx: Any, memory: Any, index: Any, value: Any) -> Any:
    """Stores one vector of lanes where ``read`` finds it."""
    narrow, _, _ = _kinds(memory)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = builder.extract_value(args[2], 0)
        if narrow:
            vector = _rounded(builder, vector, _vector(_HALF), _vector(_WORD))
        builder.store(vector, _address(builder, args[0], args[1], vector.type), align=memory.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(memory, types.intp, value), lower


@intrinsic
def read_one(typingctx: Any, memory: Any, index: Any) -> Any:
    """``read`` of a single number."""
    narrow, kind, _ = _kinds(memory)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = builder.load(builder.gep(args[0], [args[1]]))
        return _widened(builder, found, _WORD, ir.FloatType()) if narrow else found

    return kind(memory, types.intp), lower


@intrinsic
def write_one(typingctx: Any, memory: Any, index: Any, value: Any) -> Any:
    """``write`` of a single number."""
    narrow, kind, _ = _kinds(memory)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = _rounded(builder, args[2], _HALF, _WORD) if narrow else args[2]
        builder.store(found, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(memory, types.intp, kind), lower


@njit(**FUSED)
def read_row(source: np.ndarray, start: int, target: np.ndarray, to: int, width: int) -> None:
    """Copies ``width`` numbers from ``start`` of one flat array to those from ``to`` of another, in its dtype."""
    old, new = pointer(source), pointer(target)
    whole = width // WIDTH * WIDTH
    for d in range(0, whole, WIDTH):
        write(new, to + d, read(old, start + d))
    for d in range(whole, width):
        write_one(new, to + d, read_one(old, start + d))


def flat(t: Tensor) -> np.ndarray:
    """The memory from a tensor's first element to its last, floats or bfloat16 as uint16, without copying it."""
    span = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    t = t.detach().as_strided((span,), (1,))
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()
