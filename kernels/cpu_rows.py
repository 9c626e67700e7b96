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
from numba.extending import overload
from torch import Tensor

from kernels.selective_scan.cpu_arguments import FUSED
from kernels.selective_scan.cpu_arguments import SOURCES as BELOW
from kernels.selective_scan.cpu_simd import WIDTH, Lanes, intrinsic, pack, pointer, splat
from kernels.selective_scan.cpu_simd_math import has_avx512

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


@intrinsic
def _typed(typingctx: Any, address: Any, kind: Any) -> Any:
    """The pointer to numbers of a kind, given by an example of them, at an address in memory."""
    out = types.CPointer(kind)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(out))

    return out(types.intp, kind), lower


def _mask(builder: Any, count: Any) -> Any:
    """Which lanes come before ``count``."""
    lanes = ir.Constant(ir.VectorType(count.type, WIDTH), list(range(WIDTH)))
    return builder.icmp_signed("<", lanes, splat(builder, count))


def _masked(builder: Any, name: str, vector: Any, arguments: list[Any], out: Any) -> Any:
    """A call of LLVM's masked load or store."""
    short = f"v{WIDTH}{'i16' if vector.element == _HALF else vector.element.intrinsic_name}"
    function = ir.FunctionType(out, [a.type for a in arguments])
    return builder.call(builder.module.declare_intrinsic(f"llvm.masked.{name}.{short}.p0", (), function), arguments)


@intrinsic
def read_some(typingctx: Any, memory: Any, index: Any, count: Any) -> Any:
    """``read`` of the first ``count`` numbers of a vector, and zeros; nothing behind them is touched."""
    narrow, kind, element = _kinds(memory)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = _vector(element)
        align = ir.IntType(32)(memory.dtype.bitwidth // 8)
        zeros = ir.Constant(vector, [0] * WIDTH)
        address = _address(builder, args[0], args[1], vector)
        found = _masked(builder, "load", vector, [address, align, _mask(builder, args[2]), zeros], vector)
        if narrow:
            found = _widened(builder, found, _vector(_WORD), _vector(ir.FloatType()))
        return pack(builder, [found])

    return Lanes(kind, 1)(memory, types.intp, types.intp), lower


@njit(**FUSED)
def move_row(old, start: int, new, to: int, width: int) -> None:
    """Copies ``width`` numbers from element ``start`` of a pointer to element ``to`` of another, in its dtype.

    The last vector of a row that is no whole number of them starts early enough: some numbers are copied twice, which
    takes a fraction of the time of copying the last ones alone.
    """
    if width < WIDTH:
        for d in range(width):
            write_one(new, to + d, read_one(old, start + d))
    else:
        for d in range(0, width - WIDTH + 1, WIDTH):
            write(new, to + d, read(old, start + d))
        if width % WIDTH > 0:
            write(new, to + width - WIDTH, read(old, start + width - WIDTH))


@njit(**FUSED)
def read_row(source: np.ndarray, start: int, target: np.ndarray, to: int, width: int) -> None:
    """``move_row`` from one flat array to another."""
    move_row(pointer(source), start, pointer(target), to, width)


def to_scratch(old: Any, start: int, new: Any, to: int, width: int) -> None:
    """``move_row`` to float32 that has room for whole vectors: zeros fill the last one, or leave it as it was."""


@overload(to_scratch, inline="always")
def _to_scratch(old, start, new, to, width):
    def masked(old, start, new, to, width):
        whole = width // WIDTH * WIDTH
        for d in range(0, whole, WIDTH):
            write(new, to + d, read(old, start + d))
        if whole < width:  # a whole vector is written: one that is read before it is complete would be waited for
            write(new, to + whole, read_some(old, start + whole, width - whole))

    def without_masks(old, start, new, to, width):
        move_row(old, start, new, to, width)

    return masked if has_avx512() else without_masks


@njit(**FUSED)
def fetch(address: int, narrow: int, start: int, target, to: int, width: int) -> None:
    """``to_scratch`` from element ``start`` at an address in memory of float32, or if ``narrow`` isn't 0 of bfloat16.

    Kernels that take addresses are compiled once for all dtypes, and called in a fraction of the time that it takes to
    hand over arrays.
    """
    if narrow:
        to_scratch(_typed(address, np.uint16(0)), start, target, to, width)
    else:
        to_scratch(_typed(address, np.float32(0)), start, target, to, width)


@njit(**FUSED)
def put(source, start: int, address: int, narrow: int, to: int, width: int) -> None:
    """The way back of ``fetch``."""
    if narrow:
        move_row(source, start, _typed(address, np.uint16(0)), to, width)
    else:
        move_row(source, start, _typed(address, np.float32(0)), to, width)


@njit(**FUSED)
def floats(address: int):
    """The pointer to float32 at an address in memory."""
    return _typed(address, np.float32(0))


def flat(t: Tensor) -> np.ndarray:
    """The memory from a tensor's first element to its last, floats or bfloat16 as uint16, without copying it."""
    span = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    t = t.detach().as_strided((span,), (1,))
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()
