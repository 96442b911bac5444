"""Matrix products modulo a prime: integer weights times residues, summed in 64 bits and reduced once.

A weight is a small signed integer, the same modulo every prime, so a row whose absolute weights add up to at most 2^32
can be summed without a single reduction on the way. LLVM does not keep the sums of several rows in registers when it
vectorises plain loops, so the innermost loop is written in its own vector language; see `lanes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types

from hemacrypt.engines.vector.kernels.modular import below, intrinsic, kernel, shoup_product
from hemacrypt.engines.vector.kernels.simd import LANES, Wide, load, reduced, spread, spread_wide, store, under

# Residues of each input that are worked on at a time: those of a chunk then stay in the second-level cache.
BLOCK: Final = 256

_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_WORDS, _LONGS = ir.VectorType(_WORD, LANES), ir.VectorType(_LONG, LANES // 2)


def _sums(rows: int) -> Callable[..., Any]:
    """Make the intrinsic that sums up some rows at sixteen residues, with two sums for each: even and odd lanes."""

    @intrinsic
    def sum_rows(
        typingctx: Any,
        values: Any,
        place: Any,
        columns: Any,
        first: Any,
        terms: Any,
        weights: Any,
        weight: Any,
        start: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, columns, weights = (
                context.make_array(signature.args[number])(context, builder, arguments[number]).data
                for number in (0, 2, 5)
            )
            _, place, _, first, terms, _, weight, start = arguments
            half = ir.Constant(_LONGS, [32] * (LANES // 2))
            before = builder.block
            loop, done = builder.append_basic_block("terms"), builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            term = builder.phi(_LONG)
            sums = [builder.phi(_LONGS) for _ in range(2 * rows)]
            for total in sums:
                total.add_incoming(start, before)
            column = builder.sext(builder.load(builder.gep(columns, [builder.add(first, term)])), _LONG)
            at = builder.add(place, builder.mul(column, ir.Constant(_LONG, LANES)))
            words = builder.load(builder.bitcast(builder.gep(values, [at]), _WORDS.as_pointer()), align=4)
            both = builder.bitcast(words, _LONGS)
            # Numbers extended from their low half are what the multiplier takes anyway, so that costs nothing.
            even, odd = builder.ashr(builder.shl(both, half), half), builder.ashr(both, half)
            at = builder.add(weight, builder.mul(term, ir.Constant(_LONG, rows)))
            after = []
            for row in range(rows):
                factor = builder.load(builder.gep(weights, [builder.add(at, ir.Constant(_LONG, row))]))
                one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), factor, ir.Constant(_WORD, 0))
                all_lanes = builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))
                factors = builder.ashr(builder.shl(builder.bitcast(all_lanes, _LONGS), half), half)
                after += [builder.add(sums[2 * row], builder.mul(even, factors))]
                after += [builder.add(sums[2 * row + 1], builder.mul(odd, factors))]
            following = builder.add(term, ir.Constant(_LONG, 1))
            term.add_incoming(ir.Constant(_LONG, 0), before)
            term.add_incoming(following, loop)
            for total, result in zip(sums, after, strict=True):
                total.add_incoming(result, loop)
            builder.cbranch(builder.icmp_signed("<", following, terms), loop, done)
            builder.position_at_end(done)
            return context.make_tuple(builder, signature.return_type, after)

        number = types.intp
        both = types.UniTuple(Wide, 2 * rows)
        return both(values, number, columns, number, number, weights, number, Wide), generate

    return sum_rows


_sum_8, _sum_4, _sum_2, _sum_1 = (_sums(rows) for rows in (8, 4, 2, 1))


@kernel
def _add_sums(sums: Any, prime: Any, inverse: Any, out: Any, places: Any, kept: Any, row: Any, within: Any) -> None:
    """Reduce the sums of some rows, and add them to what is there of the rows already."""
    modulus, factor = spread(prime), spread(inverse)
    for number in range(len(sums) // 2):
        at = places[row + number] + within
        before = load(out, at) * spread(kept[row + number])
        found = reduced((sums[2 * number], sums[2 * number + 1]), modulus, factor)
        store(out, at, under(found + before, modulus))


@kernel
def multiply(
    values: Any,
    out: Any,
    polynomial: Any,
    row: Any,
    first: Any,
    last: Any,
    groups: Any,
    columns: Any,
    weights: Any,
    places: Any,
    kept: Any,
    tables: Any,
) -> None:
    """Add a matrix product, divided by 2^32, to open sums; for one polynomial, one prime, a range of residues.

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
    groups, columns, weights:
        As in `hemacrypt.plan.schedule.Chunk`; no group is without columns.
    places:
        Where the sum of each row begins in ``out``, counted in residues.
    kept:
        uint32: 0 where a row begins its sum, else 1.
    """
    prime, inverse = tables[0][row], tables[7][row]
    # Nothing modulo q, and enough to keep sums of signed products from becoming negative.
    start = spread_wide(np.uint64(prime) << np.uint64(32))
    count, length = values.shape[0], values.shape[3]
    flat, offset = out.reshape(-1), (polynomial * values.shape[2] + row) * length
    near = np.empty(count * BLOCK, np.uint32)
    for residue in range(first, last, BLOCK):
        for number in range(count):
            source = values[number, polynomial, row]
            for vector in range(BLOCK // LANES):
                store(near, (vector * count + number) * LANES, load(source, residue + vector * LANES))
        for group in range(groups.shape[0]):
            c, terms, w, r, rows = groups[group]
            for vector in range(BLOCK // LANES):
                x, n = vector * count * LANES, offset + residue + vector * LANES
                if rows == 8:
                    sums_8 = _sum_8(near, x, columns, c, terms, weights, w, start)
                    _add_sums(sums_8, prime, inverse, flat, places, kept, r, n)
                elif rows == 4:
                    sums_4 = _sum_4(near, x, columns, c, terms, weights, w, start)
                    _add_sums(sums_4, prime, inverse, flat, places, kept, r, n)
                elif rows == 2:
                    sums_2 = _sum_2(near, x, columns, c, terms, weights, w, start)
                    _add_sums(sums_2, prime, inverse, flat, places, kept, r, n)
                else:
                    sums_1 = _sum_1(near, x, columns, c, terms, weights, w, start)
                    _add_sums(sums_1, prime, inverse, flat, places, kept, r, n)


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
