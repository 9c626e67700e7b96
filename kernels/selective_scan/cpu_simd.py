"""SIMD values for numba: a few vectors of 16 lanes that stay in registers, with operators, loads and stores.

LLVM vectorises a numba loop only where it can prove that arrays don't overlap, with the registers' half width on many
processors, and it keeps nothing in registers from one step of an outer loop to the next. ``Lanes`` says it outright:
a value of S vectors of 16 lanes (an AVX-512 register each in float32; LLVM splits it in two for AVX2, in four for
NEON or SSE), S independent chains of a recurrence, so that one can wait while others go on.

S vectors of a value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import lower_builtin, models, register_model

WIDTH = 16  # lanes of a vector
FLAGS = ("contract",)  # multiply-adds may be fused; nothing else may change


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function whose LLVM code is written by hand; literal arguments keep their value in their type."""
    return numba_intrinsic(prefer_literal=True)(function)


class Lanes(types.Type):
    """The numba type of ``count`` vectors of 16 numbers of type ``kind``."""

    def __init__(self, kind: types.Float, count: int) -> None:
        self.kind, self.count = kind, count
        super().__init__(f"Lanes({kind}, {count})")


def _vector(kind: types.Float) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if kind == types.float32 else ir.DoubleType(), WIDTH)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    """An LLVM array of vectors."""

    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.ArrayType(_vector(kind.kind), kind.count))


def splat(builder: Any, scalar: Any) -> Any:
    """A vector whose lanes all hold ``scalar``."""
    vector = ir.VectorType(scalar.type, WIDTH)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def vectors_of(context: Any, builder: Any, value: Any, kind: Any, wanted: Lanes) -> list[Any]:
    """The vectors of a value, repeated to the wanted count: of lanes, or of a scalar that all lanes get."""
    if not isinstance(kind, Lanes):
        return [splat(builder, context.cast(builder, value, kind, wanted.kind))] * wanted.count
    vectors = [builder.extract_value(value, i) for i in range(kind.count)]
    return vectors * (wanted.count // kind.count)


def pack(builder: Any, vectors: list[Any]) -> Any:
    """The value made of ``vectors``."""
    value = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        value = builder.insert_value(value, vector, i)
    return value


def result_of(args: tuple[Any, ...]) -> Lanes:
    """The type of an operation between lanes and scalars: the kind of the lanes, the largest count."""
    lanes = [a for a in args if isinstance(a, Lanes)]
    return Lanes(lanes[0].kind, max(a.count for a in lanes))


def _operator(symbol: Any, name: str) -> None:
    """Gives ``Lanes`` the operator ``symbol``, which is the LLVM instruction ``name``; scalars go to all lanes."""

    class Template(AbstractTemplate):
        def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
            if any(isinstance(a, Lanes) for a in args) and all(isinstance(a, Lanes | types.Float) for a in args):
                return signature(result_of(args), *args)
            return None

    register: Any = infer_global
    register(symbol)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        out = sig.return_type
        pairs = zip(
            *(vectors_of(context, builder, v, t, out) for v, t in zip(args, sig.args, strict=True)), strict=True
        )
        return pack(builder, [getattr(builder, name)(*operands, flags=FLAGS) for operands in pairs])

    for kinds in ((Lanes,), (Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(symbol, *kinds)(lower)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")
_operator(operator.neg, "fneg")


@intrinsic
def pointer(typingctx: Any, array: Any) -> Any:
    """The memory of a contiguous array, for ``load``, ``spread`` and ``store``: without the array's reference count.

    The array must live on elsewhere. Where arrays are taken out of tuples in inner functions, numba's counting of
    references, an atomic operation each, would cost as much as a step of the scan.
    """
    out = types.CPointer(array.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return out(array), lower


def _address(context: Any, builder: Any, kind: Any, memory: Any, index: Any) -> Any:
    """The address of element ``index`` of a pointer, or of a contiguous array of any shape, taken flat."""
    if isinstance(kind, types.Array):
        memory = context.make_array(kind)(context, builder, memory).data
    return builder.gep(memory, [index])


def _count(like: Any) -> int:
    """The number of vectors that a literal, or lanes to be like, ask for."""
    return like.count if isinstance(like, Lanes) else like.literal_value


def _align(kind: Lanes) -> int:
    return kind.kind.bitwidth // 8


@intrinsic
def load(typingctx: Any, array: Any, index: Any, stride: Any, like: Any) -> Any:
    """Vectors of consecutive elements, the first from ``index``, each next one from ``stride`` elements later.

    ``like`` is their number, a literal, or other lanes with as many.
    """
    out = Lanes(array.dtype, _count(like))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors, at = [], args[1]
        for _ in range(out.count):
            pointer = _address(context, builder, sig.args[0], args[0], at)
            pointer = builder.bitcast(pointer, _vector(out.kind).as_pointer())
            vectors.append(builder.load(pointer, align=_align(out)))
            at = builder.add(at, args[2])
        return pack(builder, vectors)

    return out(array, types.intp, types.intp, like), lower


@intrinsic
def spread(typingctx: Any, array: Any, index: Any, like: Any) -> Any:
    """As many vectors as ``like`` has; vector i holds element ``index + i`` in all its lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors, at = [], args[1]
        for _ in range(like.count):
            vectors.append(splat(builder, builder.load(_address(context, builder, sig.args[0], args[0], at))))
            at = builder.add(at, ir.Constant(at.type, 1))
        return pack(builder, vectors)

    return like(array, types.intp, like), lower


@intrinsic
def replace(typingctx: Any, value: Any, scalar: Any) -> Any:
    """Lanes as ``value``, which all hold ``scalar``."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, vectors_of(context, builder, args[1], scalar, value))

    return value(value, scalar), lower


@intrinsic
def store(typingctx: Any, array: Any, index: Any, stride: Any, value: Any) -> Any:
    """Writes the vectors of ``value`` where ``load`` reads them."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = args[1]
        for i in range(value.count):
            pointer = _address(context, builder, sig.args[0], args[0], at)
            pointer = builder.bitcast(pointer, _vector(value.kind).as_pointer())
            builder.store(builder.extract_value(args[3], i), pointer, align=_align(value))
            at = builder.add(at, args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), lower


@intrinsic
def apart(typingctx: Any) -> Any:
    """Keeps its caller from being inlined: in a large kernel its values would lose their registers."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def prefetch(typingctx: Any, memory: Any, index: Any) -> Any:
    """Starts to bring the cache line of element ``index`` of a pointer; any index is safe."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), function)
        where = builder.bitcast(_address(context, builder, sig.args[0], args[0], args[1]), byte)
        builder.call(function, [where, word(0), word(3), word(1)])  # for reading, into all caches, data
        return context.get_dummy_value()

    return types.void(memory, types.intp), lower


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of the vectors of a value: one vector."""
    out = Lanes(value.kind, 1)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = vectors_of(context, builder, args[0], value, value)
        while len(vectors) > 1:
            half = [builder.fadd(a, b, flags=FLAGS) for a, b in zip(vectors[::2], vectors[1::2], strict=False)]
            vectors = half + vectors[len(half) * 2 :]
        return pack(builder, vectors)

    return out(value), lower


@intrinsic
def lane_sum(typingctx: Any, value: Any) -> Any:
    """The sum of the 16 lanes of one vector, in pairs: a number."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = builder.extract_value(args[0], 0)
        scalar = vector.type.element
        name = f"llvm.vector.reduce.fadd.v{WIDTH}{scalar.intrinsic_name}"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(scalar, [scalar, vector.type]))
        return builder.call(function, [ir.Constant(scalar, -0.0), vector], fastmath=("reassoc",))

    return value.kind(value), lower
