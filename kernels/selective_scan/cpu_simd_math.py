"""Elementwise functions of ``Lanes`` that have no operator; most take scalars too: one formula serves both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

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
