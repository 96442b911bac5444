"""Vectors of sixteen residues as values in kernels, for loops that LLVM does not vectorise by itself.

LLVM leaves a loop scalar when it works on many rows at once, for it cannot prove that none overlap, and it knows no
good code for transforms within sixteen neighbours. Kernels therefore say what they mean: `Lanes` is sixteen 32-bit
words, `Wide` eight 64-bit ones, both of them LLVM's own portable vectors, from which it makes AVX-512, AVX2 or NEON.
Sixteen products of 64 bits are two `Wide`, those of the even and those of the odd lanes, for that is how processors
multiply. Lanes are counted as memory counts them on a little-endian machine.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

from hemacrypt.engines.vector.kernels.modular import intrinsic, kernel

# Residues in a vector.
LANES = 16

_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_WORDS, _LONGS = ir.VectorType(_WORD, LANES), ir.VectorType(_LONG, LANES // 2)


class _Vector(types.Type):  # type: ignore[misc]
    """Numba's name for one of LLVM's vector types."""

    def __init__(self, name: str, words: ir.VectorType) -> None:
        super().__init__(name=name)
        self.words = words


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is one LLVM value, so it lives in a register."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.words)


Lanes = _Vector("lanes", _WORDS)
Wide = _Vector("wide", _LONGS)


class _Elementwise(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        """Give the type of an operation on two vectors of one kind."""
        if len(args) == 2 and args[0] == args[1] and isinstance(args[0], _Vector):
            return signature(args[0], *args)
        return None


def _define(symbol: Callable[..., Any], instruction: str) -> None:
    """Make an operator work on two vectors, lane by lane, modulo a power of two."""
    infer_global(symbol)(type(f"_{instruction}", (_Elementwise,), {}))

    @lower_builtin(symbol, _Vector, _Vector)  # type: ignore[untyped-decorator]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return getattr(builder, instruction)(*arguments)


_define(operator.add, "add")
_define(operator.sub, "sub")
_define(operator.mul, "mul")


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _broadcast(builder: Any, word: Any, kind: ir.VectorType) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), word, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _splat(ir.VectorType(_WORD, kind.count), 0))


def _choose(builder: Any, left: Any, right: Any, order: Sequence[int]) -> Any:
    """Pick lanes out of two vectors, those of the second counted on from those of the first."""
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_WORD, len(order)), list(order)))


def _address(context: Any, builder: Any, kind: Any, array_type: Any, array: Any, place: Any) -> Any:
    """Return where ``array[place]`` and what follows it lie, as a pointer to this kind of value."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())


def _load(count: int, order: Sequence[int]) -> Callable[..., Any]:
    """Make the intrinsic that loads ``count`` words and spreads them over the lanes."""

    @intrinsic
    def load_words(typingctx: Any, array: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.VectorType(_WORD, count)
            address = _address(context, builder, kind, signature.args[0], arguments[0], arguments[1])
            words = builder.load(address, align=4)
            return words if count == LANES else _choose(builder, words, words, order)

        return Lanes(array, types.intp), generate

    return load_words


load = _load(LANES, range(LANES))
# Two, four, eight words, each for as many neighbouring lanes as it takes to fill sixteen.
load_2 = _load(2, [lane // 8 for lane in range(LANES)])
load_4 = _load(4, [lane // 4 for lane in range(LANES)])
load_8 = _load(8, [lane // 2 for lane in range(LANES)])


@intrinsic
def store(typingctx: Any, array: Any, place: Any, lanes: Any) -> Any:
    """Store sixteen words to ``array[place]`` and after; the array is one-dimensional and contiguous."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place, lanes = arguments
        builder.store(lanes, _address(context, builder, _WORDS, signature.args[0], array, place), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), generate


@intrinsic
def spread(typingctx: Any, word: Any) -> Any:
    """Put one uint32 into all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _broadcast(builder, arguments[0], _WORDS)

    return Lanes(types.uint32), generate


@intrinsic
def spread_wide(typingctx: Any, word: Any) -> Any:
    """Put one uint64 into all wide lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _broadcast(builder, arguments[0], _LONGS)

    return Wide(types.uint64), generate


@intrinsic
def least(typingctx: Any, left: Any, right: Any) -> Any:
    """Return the smaller of two vectors of one kind, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_unsigned("<", *arguments), *arguments)

    return left(left, left), generate


@intrinsic
def even(typingctx: Any, lanes: Any) -> Any:
    """Return the even lanes as the low halves of wide ones; the high halves are anything."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _LONGS)

    return Wide(Lanes), generate


@intrinsic
def odd(typingctx: Any, lanes: Any) -> Any:
    """Return the odd lanes as the low halves of wide ones."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(builder.bitcast(arguments[0], _LONGS), _splat(_LONGS, 32))

    return Wide(Lanes), generate


@intrinsic
def product(typingctx: Any, left: Any, right: Any) -> Any:
    """Multiply the low halves of wide lanes; the products have 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low = _splat(_LONGS, 0xFFFFFFFF)
        return builder.mul(*(builder.and_(argument, low) for argument in arguments))

    return Wide(Wide, Wide), generate


def _halves(high: int) -> Callable[..., Any]:
    """Make the intrinsic that joins the low or the high halves of even and odd lanes."""

    @intrinsic
    def join_halves(typingctx: Any, evens: Any, odds: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right = (builder.bitcast(argument, _WORDS) for argument in arguments)
            order = [LANES * (lane % 2) + lane // 2 * 2 + high for lane in range(LANES)]
            return _choose(builder, left, right, order)

        return Lanes(Wide, Wide), generate

    return join_halves


low_halves = _halves(0)
high_halves = _halves(1)


def _pick(order: Sequence[int]) -> Callable[..., Any]:
    """Make the intrinsic that picks sixteen lanes out of two vectors."""

    @intrinsic
    def pick_lanes(typingctx: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _choose(builder, arguments[0], arguments[1], order)

        return Lanes(Lanes, Lanes), generate

    return pick_lanes


def _runs(length: int, second: int) -> list[int]:
    """Take every other run of so many lanes, alternately from the left and the right vector."""
    return [
        LANES * (lane // length % 2) + lane // (2 * length) * 2 * length + second * length + lane % length
        for lane in range(LANES)
    ]


# Runs of eight, four … lanes: the first ones of left and right, alternately, and the second ones. Each pair of picks
# undoes itself.
first_8, second_8 = _pick(_runs(8, 0)), _pick(_runs(8, 1))
first_4, second_4 = _pick(_runs(4, 0)), _pick(_runs(4, 1))
first_2, second_2 = _pick(_runs(2, 0)), _pick(_runs(2, 1))
first_1, second_1 = _pick(_runs(1, 0)), _pick(_runs(1, 1))
# Lanes of left and right, alternately: from their lower halves, and from their upper ones; and back.
_MIXED = [LANES * (lane % 2) + lane // 2 for lane in range(2 * LANES)]
mixed_low, mixed_high = _pick(_MIXED[:LANES]), _pick([lane + 8 for lane in _MIXED[:LANES]])
evens, odds = _pick(range(0, 2 * LANES, 2)), _pick(range(1, 2 * LANES, 2))


@intrinsic
def rearranged(typingctx: Any, lanes: Any, order: Any) -> Any:
    """Return lane ``order[i] % 16`` in every lane i."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, order = arguments
        if "+avx512f" in context.codegen().magic_tuple()[2]:
            # LLVM's own language has no shuffle whose order is known at run time only.
            kind = ir.FunctionType(_WORDS, (_WORDS, _WORDS))
            name = "llvm.x86.avx512.permvar.si.512"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (lanes, order))
        memory = cgutils.alloca_once(builder, _WORDS)
        builder.store(lanes, memory)
        words, moved = builder.bitcast(memory, _WORD.as_pointer()), lanes
        order = builder.and_(order, _splat(_WORDS, LANES - 1))
        for lane in range(LANES):
            place = ir.Constant(_WORD, lane)
            word = builder.load(builder.gep(words, [builder.extract_element(order, place)]))
            moved = builder.insert_element(moved, word, place)
        return moved

    return Lanes(Lanes, Lanes), generate


@kernel
def under(value: Any, bound: Any) -> Any:
    """Subtract ``bound`` once where that leaves no negative number: `modular.below` for vectors of either kind."""
    return least(value, value - bound)


@kernel
def times(value: Any, factor: Any, shoup: Any, prime: Any) -> Any:
    """Return ``value * factor`` modulo the prime, below twice the prime: `modular.shoup_product` in all lanes.

    ``shoup`` is wide here and the same in all lanes, and so is ``factor``.
    """
    quotient = high_halves(product(even(value), shoup), product(odd(value), shoup))
    return value * factor - quotient * prime


@kernel
def times_each(value: Any, factor: Any, shoup: Any, prime: Any) -> Any:
    """Return ``value * factor`` modulo the prime, below twice the prime, with a factor of its own for every lane."""
    quotient = high_halves(product(even(value), even(shoup)), product(odd(value), odd(shoup)))
    return value * factor - quotient * prime


@kernel
def more(sums: Any, left: Any, right: Any) -> Any:
    """Add the products of two vectors to sums, which are a pair: those of the even and those of the odd lanes."""
    evens, odds = sums
    return evens + product(even(left), even(right)), odds + product(odd(left), odd(right))


@kernel
def nothing() -> Any:
    """Return sums of no products."""
    zero = spread_wide(np.uint64(0))
    return zero, zero


@kernel
def under_both(sums: Any, bound: Any) -> Any:
    """Bring sums below twice the bound under it."""
    return under(sums[0], bound), under(sums[1], bound)


@kernel
def reduced(sums: Any, prime: Any, inverse: Any) -> Any:
    """Return sums divided by 2^32 modulo the prime, below the prime: `modular.montgomery` in all lanes.

    Parameters
    ----------
    sums:
        Even and odd lanes, below 2^63.
    prime, inverse:
        The prime and its inverse modulo 2^32, the same in all lanes.
    """
    evens, odds = sums
    multiple = low_halves(evens, odds) * inverse
    taken = high_halves(product(even(multiple), even(prime)), product(odd(multiple), even(prime)))
    value = high_halves(evens, odds) + prime - taken
    return under(under(value, prime + prime), prime)
