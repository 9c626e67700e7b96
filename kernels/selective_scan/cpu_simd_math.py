"""Elementwise functions of ``Lanes`` that have no operator; most take scalars too: one formula serves both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from kernels.selective_scan.cpu_simd import WIDTH, Lanes, intrinsic, pack, result_of, splat, vectors_of


def each(function: Callable[[Any, Any], Any], context: Any, builder: Any, value: Any, kind: Any) -> Any:
    """``function(builder, x)`` of a scalar, or of each vector of lanes."""
    if not isinstance(kind, Lanes):
        return function(builder, value)
    return pack(builder, [function(builder, v) for v in vectors_of(context, builder, value, kind, kind)])


def call(builder: Any, name: str, *operands: Any) -> Any:
    """LLVM's intrinsic function ``name`` of numbers or of vectors, all of one type."""
    kind = operands[0].type
    vector = isinstance(kind, ir.VectorType)
    suffix = (f"v{WIDTH}" if vector else "") + (kind.element if vector else kind).intrinsic_name
    function = ir.FunctionType(kind, [kind] * len(operands))
    return builder.call(builder.module.declare_intrinsic(f"{name}.{suffix}", (), function), operands)


@intrinsic
def clamp(typingctx: Any, value: Any, low: Any, high: Any) -> Any:
    """``value`` between two scalars of its kind; NaN stays NaN. Takes scalars too."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def one(builder: Any, v: Any) -> Any:
            for sign, bound in (("<", args[1]), (">", args[2])):
                limit = bound if v.type == bound.type else splat(builder, bound)
                v = builder.select(builder.fcmp_ordered(sign, v, limit), limit, v)
            return v

        return each(one, context, builder, args[0], value)

    return value(value, low, high), lower


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` of lanes and scalars, rounded once whatever the compiler does."""
    out = result_of((a, b, c))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [vectors_of(context, builder, v, kind, out) for v, kind in zip(args, sig.args, strict=True)]
        return pack(builder, [call(builder, "llvm.fma", *v) for v in zip(*values, strict=True)])

    return out(a, b, c), lower


@intrinsic
def exponent(typingctx: Any, value: Any) -> Any:
    """The float32 whose bits are those of the float32 ``value``, shifted left into the exponent. Takes scalars too."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def one(builder: Any, v: Any) -> Any:
            word = ir.IntType(32)
            if isinstance(v.type, ir.VectorType):
                word = ir.VectorType(word, WIDTH)
                shift = ir.Constant(word, [23] * WIDTH)
            else:
                shift = ir.Constant(word, 23)
            return builder.bitcast(builder.shl(builder.bitcast(v, word), shift), v.type)

        return each(one, context, builder, args[0], value)

    return value(value), lower


@functools.cache
def has_avx512() -> bool:
    """Whether numba compiles for AVX-512, for which ``sixteenth``, ``scaled`` and ``without_denormals`` exist."""
    context: Any = cpu_target.target_context
    _, _, features = context.codegen().magic_tuple()
    return "+avx512f," in f"{features},"


@intrinsic
def sixteenth(typingctx: Any, value: Any) -> Any:
    """``2^(j / 16)`` where j is the number in the four lowest bits of the float32 ``value``. AVX-512 only."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words, floats = (ir.VectorType(kind, WIDTH) for kind in (ir.IntType(32), ir.FloatType()))
        name = "llvm.x86.avx512.permvar.sf.512"  # takes the four lowest bits of each index
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(floats, [floats, words]))
        table = ir.Constant(floats, [2 ** (j / WIDTH) for j in range(WIDTH)])

        def one(builder: Any, v: Any) -> Any:
            return builder.call(function, [table, builder.bitcast(v, words)])

        return each(one, context, builder, args[0], value)

    return value(value), lower


@intrinsic
def scaled(typingctx: Any, value: Any, power: Any) -> Any:
    """``value 2^n`` of float32 lanes, n the largest integer up to ``power``. AVX-512 only."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats, mask, word = ir.VectorType(ir.FloatType(), WIDTH), ir.IntType(WIDTH), ir.IntType(32)
        kind = ir.FunctionType(floats, [floats, floats, floats, mask, word])
        function = builder.module.declare_intrinsic("llvm.x86.avx512.mask.scalef.ps.512", (), kind)
        pairs = zip(*(vectors_of(context, builder, v, value, value) for v in args), strict=True)
        rounding = word(4)  # as everywhere else
        return pack(builder, [builder.call(function, [v, p, v, mask(-1), rounding]) for v, p in pairs])

    return value(value, power), lower


@intrinsic
def without_denormals(typingctx: Any) -> Any:
    """Lets this thread take denormal numbers for zeros, and returns what ``with_denormals`` wants.

    An instruction that meets one takes a hundred times as long. Where there is no AVX-512 nothing happens.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word, place = _control(builder)
        if has_avx512():
            _call_with(builder, "llvm.x86.sse.stmxcsr", place)
            found = builder.load(place)
            builder.store(builder.or_(found, word(0x8040)), place)  # flush to zero, denormals are zeros
            _call_with(builder, "llvm.x86.sse.ldmxcsr", place)
            return found
        return word(0)

    return types.int32(), lower


@intrinsic
def with_denormals(typingctx: Any, before: Any) -> Any:
    """Undoes ``without_denormals``, which returned ``before``."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, place = _control(builder)
        if has_avx512():
            builder.store(args[0], place)
            _call_with(builder, "llvm.x86.sse.ldmxcsr", place)
        return context.get_dummy_value()

    return types.void(types.int32), lower


def _control(builder: Any) -> tuple[Any, Any]:
    """The type of the floating-point control word, and memory for it."""
    word = ir.IntType(32)
    with builder.goto_entry_block():
        return word, builder.alloca(word)


def _call_with(builder: Any, name: str, place: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(ir.VoidType(), [byte]))
    builder.call(function, [builder.bitcast(place, byte)])


@intrinsic
def add_products(typingctx: Any, start: Any, a: Any, b: Any) -> Any:
    """One vector: ``start`` plus the products of the vectors of ``a`` and ``b``, one after the other."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (found,) = vectors_of(context, builder, args[0], start, start)
        for v, w in zip(*(vectors_of(context, builder, v, k, a) for v, k in ((args[1], a), (args[2], b))), strict=True):
            found = call(builder, "llvm.fma", v, w, found)
        return pack(builder, [found])

    return start(start, a, b), lower


@intrinsic
def magnitude(typingctx: Any, value: Any) -> Any:
    """The absolute value. Takes scalars too."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def one(builder: Any, v: Any) -> Any:
            return call(builder, "llvm.fabs", v)

        return each(one, context, builder, args[0], value)

    return value(value), lower


@intrinsic
def choose(typingctx: Any, value: Any, bound: Any, above: Any, below: Any) -> Any:
    """``above`` where ``value`` is above ``bound``, else ``below``: lanes with a scalar bound, or scalars."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not isinstance(value, Lanes):
            return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])
        limit = splat(builder, args[1])
        kinds = ((args[0], value), (args[2], above), (args[3], below))
        vectors = [vectors_of(context, builder, v, kind, value) for v, kind in kinds]
        return pack(
            builder,
            [builder.select(builder.fcmp_ordered(">", v, limit), a, b) for v, a, b in zip(*vectors, strict=True)],
        )

    return value(value, bound, above, below), lower


def _each_libm(name: str) -> Callable[..., Any]:
    """A function of lanes that calls the C library lane by lane."""

    @intrinsic
    def function(typingctx: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def one(builder: Any, v: Any) -> Any:
                return call(builder, name, v)

            return each(one, context, builder, args[0], value)

        return value(value), lower

    return function


each_exp, each_log = _each_libm("llvm.exp"), _each_libm("llvm.log")
