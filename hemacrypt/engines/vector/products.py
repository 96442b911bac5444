"""Matrix products modulo a prime: integer weights times residues, summed in 64 bits and reduced once.

A weight is a small signed integer, the same modulo every prime, so a row whose absolute weights add up to at most 2^32
can be summed without a single reduction on the way. LLVM does not keep sixteen accumulators in registers when it
vectorises a plain loop, so the inner loop is written in its own vector language, which it lowers to AVX-512, AVX2 or
NEON alike. Sixteen residues are one vector; the even and the odd ones are multiplied apart, for each product fills the
room of two residues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hemacrypt.batch_schedule import ROWS
from hemacrypt.engines.vector.modular import below, kernel, shoup_product

# Residues of one vector.
LANES: Final = 16
# Residues of each input that are worked on at a time: the inputs of a chunk then stay in the second-level cache.
BLOCK: Final = 256

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_NARROW, _WIDE = ir.VectorType(_I32, LANES), ir.VectorType(_I64, LANES // 2)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Repeat a number in all places of a vector."""
    count = LANES if value.type == _I32 else LANES // 2
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _wide(number: int) -> ir.Constant:
    return ir.Constant(_WIDE, [number] * (LANES // 2))


def _signed_low(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Extend the low half of every place; the multiplier reads no more than that, so it costs nothing."""
    return builder.ashr(builder.shl(value, _wide(32)), _wide(32))


def _unsigned_low(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.and_(value, _wide(0xFFFFFFFF))


def _below(builder: ir.IRBuilder, value: ir.Value, bound: ir.Value) -> ir.Value:
    """As `modular.below`."""
    less = builder.sub(value, bound)
    return builder.select(builder.icmp_unsigned("<", value, less), value, less)


def _reduced(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value, prime: ir.Value, inverse: ir.Value) -> ir.Value:
    """As `modular.montgomery`, on two vectors of sums that become one vector of residues below twice the prime."""
    wide_prime = _splat(builder, builder.zext(prime, _I64))
    lows = builder.or_(_unsigned_low(builder, even), builder.shl(odd, _wide(32)))
    factors = builder.bitcast(builder.mul(builder.bitcast(lows, _NARROW), _splat(builder, inverse)), _WIDE)
    halves = []
    for total, factor in ((even, _unsigned_low(builder, factors)), (odd, builder.lshr(factors, _wide(32)))):
        # The low halves are equal, so nothing is borrowed from the high half, which lies above -q.
        difference = builder.sub(total, builder.mul(factor, wide_prime))
        halves.append(builder.add(difference, builder.shl(wide_prime, _wide(32))))
    both = builder.or_(builder.lshr(halves[0], _wide(32)), builder.and_(halves[1], _wide(0xFFFFFFFF << 32)))
    return _below(builder, builder.bitcast(both, _NARROW), _splat(builder, builder.shl(prime, ir.Constant(_I32, 1))))


def _rows_kernel(rows: int) -> Callable[..., None]:
    """Make the inner loop for a number of rows.

    The function takes: values (uint32), the place of their first vector, columns (int32), weights (int32, ``rows`` for
    each column), the number of the first column and weight, how many columns, prime, its inverse modulo 2^32, out
    (uint32), places of the rows in it (int64), masks of the rows (uint32), the number of the first row, and the place
    within a row. It replaces each row ``y`` by ``(y & mask) + sum / 2^32`` modulo the prime.
    """

    @intrinsic
    def accumulate(
        typing: Any,
        values: Any,
        vector: Any,
        columns: Any,
        weights: Any,
        first: Any,
        weight: Any,
        terms: Any,
        prime: Any,
        inverse: Any,
        out: Any,
        places: Any,
        masks: Any,
        row: Any,
        within: Any,
    ) -> Any:
        signature = types.void(
            values,
            types.intp,
            columns,
            weights,
            types.intp,
            types.intp,
            types.intp,
            types.uint32,
            types.uint32,
            out,
            places,
            masks,
            types.intp,
            types.intp,
        )

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            def pointer(number: int) -> ir.Value:
                array = context.make_array(signature.args[number])(context, builder, arguments[number])
                return array.data

            def vector_at(data: ir.Value, place: ir.Value) -> ir.Value:
                return builder.bitcast(builder.gep(data, [place]), _NARROW.as_pointer())

            x, column, factor, y = pointer(0), pointer(2), pointer(3), pointer(9)
            place, mask = pointer(10), pointer(11)
            _, vector, _, _, first, weight, terms, prime, inverse, _, _, _, row, within = arguments
            # Sums begin at q * 2^32, which is nothing modulo q and keeps them from becoming negative.
            start = _splat(builder, builder.shl(builder.zext(prime, _I64), ir.Constant(_I64, 32)))
            before = builder.block
            loop, done = builder.append_basic_block("terms"), builder.append_basic_block("reduce")
            zero, one = ir.Constant(_I64, 0), ir.Constant(_I64, 1)
            builder.cbranch(builder.icmp_signed(">", terms, zero), loop, done)
            builder.position_at_end(loop)
            term = builder.phi(_I64)
            term.add_incoming(zero, before)
            sums = [builder.phi(_WIDE) for _ in range(2 * rows)]
            for total in sums:
                total.add_incoming(start, before)
            number = builder.sext(builder.load(builder.gep(column, [builder.add(first, term)])), _I64)
            at = builder.add(vector, builder.mul(number, ir.Constant(_I64, LANES)))
            both = builder.bitcast(builder.load(vector_at(x, at), align=4), _WIDE)
            even, odd = _signed_low(builder, both), builder.ashr(both, _wide(32))
            begin = builder.add(weight, builder.mul(term, ir.Constant(_I64, rows)))
            after = []
            for number in range(rows):
                scalar = builder.load(builder.gep(factor, [builder.add(begin, ir.Constant(_I64, number))]))
                spread = _signed_low(builder, builder.bitcast(_splat(builder, scalar), _WIDE))
                after.append(builder.add(sums[2 * number], builder.mul(even, spread)))
                after.append(builder.add(sums[2 * number + 1], builder.mul(odd, spread)))
            following = builder.add(term, one)
            term.add_incoming(following, loop)
            for total, result in zip(sums, after, strict=True):
                total.add_incoming(result, loop)
            builder.cbranch(builder.icmp_signed("<", following, terms), loop, done)
            builder.position_at_end(done)
            totals = [builder.phi(_WIDE) for _ in range(2 * rows)]
            for total, result in zip(totals, after, strict=True):
                total.add_incoming(start, before)
                total.add_incoming(result, loop)
            for number in range(rows):
                this = builder.add(row, ir.Constant(_I64, number))
                target = vector_at(y, builder.add(builder.load(builder.gep(place, [this])), within))
                kept = _splat(builder, builder.load(builder.gep(mask, [this])))
                old = builder.and_(builder.load(target, align=4), kept)
                new = _reduced(builder, totals[2 * number], totals[2 * number + 1], prime, inverse)
                spread = _splat(builder, prime)
                new = _below(builder, builder.add(_below(builder, new, spread), old), spread)
                builder.store(new, target, align=4)
            return context.get_dummy_value()

        return signature, generate

    return accumulate  # type: ignore[no-any-return]


_eight, _four, _two, _one = (_rows_kernel(rows) for rows in ROWS)


@kernel
def multiply(
    values: Any,
    out: Any,
    polynomial: Any,
    row: Any,
    first: Any,
    last: Any,
    tables: Any,
    groups: Any,
    columns: Any,
    weights: Any,
    places: Any,
    masks: Any,
) -> None:
    """Add a matrix product, divided by 2^32, to open sums; one polynomial, one prime, a range of residues.

    Parameters
    ----------
    values:
        Inputs, shape (inputs, polynomials, k, N).
    out:
        Open sums, shape (sums, polynomials, k, N).
    polynomial, row:
        Which polynomial and which prime.
    first, last:
        Range of residues, multiples of `BLOCK`.
    groups:
        Rows with the same columns stand together: first column, columns, first weight, first row, rows; one of `ROWS`
        each; shape (groups, 5).
    columns:
        Numbers of inputs, int32.
    weights:
        int32, in each group column by column.
    places:
        Where the sum of each row begins in ``out``, counted in residues.
    masks:
        0 where a row begins a new sum, else all ones.
    """
    prime, inverse = tables[0][row], tables[7][row]
    count, length = values.shape[0], values.shape[3]
    flat, start_of = out.reshape(-1), (polynomial * values.shape[2] + row) * length
    near = np.empty(count * BLOCK, np.uint32)
    for start in range(first, last, BLOCK):
        for number in range(count):
            source = values[number, polynomial, row, start : start + BLOCK]
            for vector in range(BLOCK // LANES):
                target = near[(vector * count + number) * LANES :]
                for n in range(LANES):
                    target[n] = source[vector * LANES + n]
        for group in range(groups.shape[0]):
            column, terms, weight, place, rows = groups[group]
            for vector in range(BLOCK // LANES):
                at, within = vector * count * LANES, start_of + start + vector * LANES
                if rows == ROWS[0]:
                    _eight(near, at, columns, weights, column, weight, terms, prime, inverse, flat, places, masks, place, within)
                elif rows == ROWS[1]:
                    _four(near, at, columns, weights, column, weight, terms, prime, inverse, flat, places, masks, place, within)
                elif rows == ROWS[2]:
                    _two(near, at, columns, weights, column, weight, terms, prime, inverse, flat, places, masks, place, within)
                else:
                    _one(near, at, columns, weights, column, weight, terms, prime, inverse, flat, places, masks, place, within)


@kernel
def close(sums: Any, bias: Any, out: Any, tables: Any) -> None:
    """Make a value of a sum: multiply it by 2^32 and add a constant.

    Parameters
    ----------
    sums:
        What `multiply` left, shape (polynomials, k, N).
    bias:
        The constant modulo each prime, shape (k,): the same in every place, for it is a constant polynomial.
    out:
        Written; shape (polynomials, k, N).
    """
    primes, lift, lift_shoup = tables[0], tables[8], tables[9]
    for c in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            prime, up, up_shoup = primes[i], lift[i], lift_shoup[i]
            constant = bias[i] if c == 0 else np.uint32(0)
            source, target = sums[c, i], out[c, i]
            for n in range(source.shape[0]):
                value = below(shoup_product(source[n], up, up_shoup, prime), prime)
                target[n] = below(np.uint32(value + constant), prime)
