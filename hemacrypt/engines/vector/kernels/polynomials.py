"""What key switching, rescaling and linear maps are made of, on whole polynomials in NTT form.

Shapes: a *polynomial* over k primes is (k, N) uint32; a ciphertext is (2, k, N). The last row of every table belongs
to the special prime. All results equal SEAL's residue for residue, for they follow its rounding.

A polynomial *over QP* has k rows for q_0 … q_{k-1} and one more for the special prime, (k + 1, N).

Kernels that end in ``part, parts`` do one share of the work: threads may call them at the same time with parts
0 … parts - 1, and what they write does not depend on the number of parts. Shares need no barrier inside a kernel, only
between two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels.modular import below, companion, kernel, montgomery, share, shoup_product
from hemacrypt.engines.vector.kernels.ntt import forward, forward_into, inverse, inverse_into
from hemacrypt.engines.vector.kernels.simd import (
    LANES,
    load,
    more,
    nothing,
    rearranged,
    reduced,
    spread,
    spread_wide,
    store,
    times,
    under,
    under_both,
)

# Products of residues below 2^30 that fit 63 bits, the most that one Montgomery reduction takes.
_MOST_PRODUCTS = 8
# Residues that are worked on at a time: sums of 64 bits then stay in the first-level cache.
_BLOCK = 1024
# Residues by which rows of digits are longer than N: rows that are powers of two apart would share cache sets, and the
# same residue of all digits is read together.
PADDING = 64
# Residues of a row that are rotated, multiplied and added up before the next ones' turn comes: what belongs to them
# stays in a near cache.
SEGMENT = 1024
# Residues whose sums are held in registers.
TILE = 64


def arranged(keys: npt.NDArray[np.uint32], orders: npt.NDArray[np.int32]) -> npt.NDArray[np.uint32]:
    """Lay out keys that are used together, so that a sum of rotations reads them from memory in order.

    Memory is read several times as fast in order as in pieces. An automorphism moves aligned segments of residues as a
    whole, so the segments of a key can stand in the order in which the result is made.

    Parameters
    ----------
    keys:
        In Montgomery form, moved against their rotations: entry n of a key meets entry n of the digits; shape
        (keys, k, 2, k + 1, N).
    orders:
        Automorphism of each key: entry n of the result is entry order[n] of the product; shape (keys, N).

    Returns
    -------
    Words
        Shape (k + 1, N / 1024, keys, 16, k, 2, 64).
    """
    count, digits, _, rows, degree = keys.shape
    per = SEGMENT // TILE
    out = np.empty((rows, degree // SEGMENT, count, per, digits, 2, TILE), dtype=np.uint32)
    for number, order in enumerate(orders):
        segments = keys[number].reshape(digits, 2, rows, degree // SEGMENT, per, TILE)
        out[:, :, number] = np.moveaxis(segments[:, :, :, order[::SEGMENT] // SEGMENT], (2, 3, 4), (0, 1, 2))
    return out


@kernel
def to_coefficients(values: Any, row: Any, tables: Any) -> None:
    """Transform one polynomial back, in place. Shape (N,); ``row`` is the number of its prime."""
    primes, _, _, roots, shoup, scale, scale_shoup = tables[:7]
    inverse(values, roots[row], shoup[row], primes[row], scale[row], scale_shoup[row])


@kernel
def to_values(values: Any, row: Any, tables: Any) -> None:
    """Transform one polynomial, in place. Shape (N,); entries may be below 4q."""
    primes, roots, shoup = tables[:3]
    forward(values, roots[row], shoup[row], primes[row])


@kernel
def decompose(polynomial: Any, digits: Any, tables: Any) -> None:
    """Split a polynomial into digits, one per prime, and bring each to every prime.

    Parameters
    ----------
    polynomial:
        Shape (k, N).
    digits:
        Written; shape (k, k + 1, N), the last row for the special prime.
    """
    coefficients = np.empty_like(polynomial)
    lower(polynomial, coefficients, tables, False, 0, 1)
    lift(polynomial, coefficients, digits, tables, False, 0, 1)


@kernel
def inner_product(digits: Any, key: Any, total: Any, tables: Any) -> None:
    """Multiply digits by a key and add up: the heart of a key switch.

    Parameters
    ----------
    digits:
        Shape (k, k + 1, N).
    key:
        In Montgomery form; shape (data primes, 2, data primes + 1, N).
    total:
        Written; shape (2, k + 1, N).
    """
    primes, inverses = tables[0], tables[7]
    level, count = digits.shape[0], digits.shape[2]
    special = primes.shape[0] - 1
    sums = np.empty((2, _BLOCK), np.uint64)
    for i in range(level + 1):
        row = special if i == level else i
        prime, prime_inverse = primes[row], inverses[row]
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            for first in range(0, level, _MOST_PRODUCTS):
                sums[:] = 0
                for j in range(first, min(first + _MOST_PRODUCTS, level)):
                    d, s0, s1 = digits[j, i, start:stop], sums[0], sums[1]
                    k0, k1 = key[j, 0, row, start:stop], key[j, 1, row, start:stop]
                    for n in range(stop - start):
                        value = np.uint64(d[n])
                        s0[n] += value * np.uint64(k0[n])
                        s1[n] += value * np.uint64(k1[n])
                for c in range(2):
                    out, s = total[c, i, start:stop], sums[c]
                    if first == 0:
                        for n in range(stop - start):
                            out[n] = montgomery(s[n], prime, prime_inverse)
                    else:
                        for n in range(stop - start):
                            out[n] = below(np.uint32(out[n] + montgomery(s[n], prime, prime_inverse)), prime)


@kernel
def drop_last(values: Any, last: Any, out: Any, tables: Any) -> None:
    """Divide by the last prime and round, as SEAL does; values are changed.

    Parameters
    ----------
    values:
        Polynomial over the primes that stay and, as the last row, the one that goes; shape (k + 1, N).
    last:
        Number of the prime that goes.
    out:
        Written; shape (k, N).
    """
    gone, rest = values[out.shape[0]], np.empty(out.shape[1], np.uint32)
    to_coefficients(gone, last, tables)
    _add_half(gone, tables[0][last])
    for i in range(out.shape[0]):
        _divide_row(values[i], gone, last, i, rest, out[i], tables)


@kernel
def permute(source: Any, order: Any, out: Any) -> None:
    """Apply an automorphism in NTT form: ``out[i] = source[order[i]]`` for every row; shapes (rows, N)."""
    for row in range(source.shape[0]):
        for n in range(order.shape[0]):
            out[row, n] = source[row, order[n]]


@kernel
def add(left: Any, right: Any, out: Any, primes: Any) -> None:
    """Add ciphertexts, shape (2, k, N)."""
    for c in range(left.shape[0]):
        for i in range(left.shape[1]):
            prime, x, y, z = primes[i], left[c, i], right[c, i], out[c, i]
            for n in range(x.shape[0]):
                z[n] = below(np.uint32(x[n] + y[n]), prime)


@kernel
def multiply_sum(ciphertexts: Any, which: Any, plains: Any, numbers: Any, out: Any, tables: Any) -> None:
    """Multiply ciphertexts by plaintexts and add up.

    Parameters
    ----------
    ciphertexts:
        Shape (count, 2, k, N).
    which, numbers:
        Ciphertext and plaintext of each product, shape (products,).
    plains:
        In Montgomery form; shape (count, k, N).
    out:
        Written; shape (2, k, N).
    """
    primes, inverses = tables[0], tables[7]
    level, count = out.shape[1], out.shape[2]
    sums = np.empty((2, _BLOCK), np.uint64)
    for i in range(level):
        prime, prime_inverse = primes[i], inverses[i]
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            o0, o1 = out[0, i, start:stop], out[1, i, start:stop]
            s0, s1 = sums[0], sums[1]
            for first in range(0, which.shape[0], _MOST_PRODUCTS):
                sums[:] = 0
                for t in range(first, min(first + _MOST_PRODUCTS, which.shape[0])):
                    w = plains[numbers[t], i, start:stop]
                    x0 = ciphertexts[which[t], 0, i, start:stop]
                    x1 = ciphertexts[which[t], 1, i, start:stop]
                    for n in range(stop - start):
                        weight = np.uint64(w[n])
                        s0[n] += np.uint64(x0[n]) * weight
                        s1[n] += np.uint64(x1[n]) * weight
                if first == 0:
                    for n in range(stop - start):
                        o0[n] = montgomery(s0[n], prime, prime_inverse)
                        o1[n] = montgomery(s1[n], prime, prime_inverse)
                else:
                    for n in range(stop - start):
                        o0[n] = below(np.uint32(o0[n] + montgomery(s0[n], prime, prime_inverse)), prime)
                        o1[n] = below(np.uint32(o1[n] + montgomery(s1[n], prime, prime_inverse)), prime)


@kernel
def square(ciphertext: Any, out: Any, tables: Any, part: Any, parts: Any) -> None:
    """Square a ciphertext of shape (2, k, N) into three polynomials, shape (3, k, N)."""
    start, stop = share(ciphertext.shape[1], part, parts)
    for i in range(start, stop):
        prime = tables[0][i]
        q, inverse, w, s = (
            spread(prime),
            spread(tables[7][i]),
            spread(tables[8][i]),
            spread_wide(np.uint64(tables[9][i])),
        )
        left, right = ciphertext[0, i], ciphertext[1, i]
        x, y, z = out[0, i], out[1, i], out[2, i]
        for n in range(0, left.shape[0], LANES):
            # Both factors vary, so Montgomery's division by 2^32 is made good beforehand, in one of them.
            a, b = load(left, n), load(right, n)
            u, v = under(times(a, w, s, q), q), under(times(b, w, s, q), q)
            store(x, n, reduced(more(nothing(), u, a), q, inverse))
            store(y, n, reduced(more(nothing(), u, b + b), q, inverse))
            store(z, n, reduced(more(nothing(), v, b), q, inverse))


@kernel
def lower(polynomial: Any, coefficients: Any, tables: Any, centred: Any, part: Any, parts: Any) -> None:
    """Transform every row of a polynomial back: the first half of a decomposition.

    Parameters
    ----------
    polynomial:
        Shape (k, N).
    coefficients:
        Written; shape (k, N).
    centred:
        Whether digits shall lie around zero: then what is written is half a prime too large, modulo it, and `lift`
        takes that away again. In [0, q), as SEAL has them, they have a mean, which makes the noise of a key switch
        large in the few slots whose root lies near 1.
    """
    primes, _, _, roots, shoup, scale, scale_shoup = tables[:7]
    start, stop = share(polynomial.shape[0], part, parts)
    for j in range(start, stop):
        inverse_into(polynomial[j], coefficients[j], roots[j], shoup[j], primes[j], scale[j], scale_shoup[j])
        if centred:
            _raise_by_half(coefficients[j], primes[j])


@kernel
def raise_all(coefficients: Any, tables: Any, part: Any, parts: Any) -> None:
    """Make coefficients half a prime too large, as `lift_all` takes them; shape (k, N)."""
    start, stop = share(coefficients.shape[0], part, parts)
    for j in range(start, stop):
        _raise_by_half(coefficients[j], tables[0][j])


@kernel
def _raise_by_half(coefficients: Any, prime: Any) -> None:
    """Add half a prime to all coefficients, modulo it."""
    q, half = spread(prime), spread(np.uint32(prime >> np.uint32(1)))
    for n in range(0, coefficients.shape[0], LANES):
        store(coefficients, n, under(load(coefficients, n) + half, q))


@kernel
def lift(polynomial: Any, coefficients: Any, digits: Any, tables: Any, centred: Any, part: Any, parts: Any) -> None:
    """Bring every digit to every prime: the second half of a decomposition, after `lower`.

    Parameters
    ----------
    polynomial, coefficients:
        What `lower` took and wrote; shape (k, N).
    digits:
        Written; shape (k, k + 1, N), the last row for the special prime. Rows may be longer than N (`PADDING`).
    centred:
        As in `lower`.
    """
    primes, roots, shoup = tables[:3]
    level, special, count = polynomial.shape[0], primes.shape[0] - 1, polynomial.shape[1]
    # Row j of digit j is a copy, so the transforms are what is shared out; prime by prime, for the roots' sake.
    start, stop = share(level * level, part, parts)
    for unit in range(start, stop):
        i, j = level, unit % level
        if unit < level * (level - 1):
            i, j = unit // (level - 1), unit % (level - 1)
            j += j >= i
        row = special if i == level else i
        target = digits[j, i, :count]
        if centred:
            _forward_centred(coefficients[j], target, roots[row], shoup[row], primes[row], primes[j])
        else:
            # Primes differ by less than a factor of two, so the digit is below 4q, as the transform wants it.
            forward_into(coefficients[j], target, roots[row], shoup[row], primes[row], None)
    start, stop = share(level, part, parts)
    for j in range(start, stop):
        digits[j, j, :count] = polynomial[j]


@kernel
def _forward_centred(source: Any, target: Any, roots: Any, shoup: Any, prime: Any, digit_prime: Any) -> None:
    """Transform a digit that is half its own prime too large."""
    # Twice the prime less half of the other: no less than zero, and with the digit below 4q.
    offset = spread(np.uint32(2 * prime - (digit_prime >> np.uint32(1))))
    forward_into(source, target, roots, shoup, prime, offset)


@kernel
def lower_over_qp(polynomial: Any, coefficients: Any, tables: Any, part: Any, parts: Any) -> None:
    """Transform every row of a polynomial over QP back; shapes (k + 1, N). Then comes `scale_down`."""
    primes, _, _, roots, shoup, scale, scale_shoup = tables[:7]
    rows = polynomial.shape[0]
    start, stop = share(rows, part, parts)
    for i in range(start, stop):
        row = primes.shape[0] - 1 if i == rows - 1 else i
        inverse_into(polynomial[i], coefficients[i], roots[row], shoup[row], primes[row], scale[row], scale_shoup[row])


@kernel
def scale_down(over: Any, coefficients: Any, tables: Any, part: Any, parts: Any) -> None:
    """Divide coefficients over QP by the special prime and round, as SEAL does; then comes `lift_all`.

    What is written is half a prime too large: see `lower`.

    Parameters
    ----------
    over:
        What `lower_over_qp` wrote, shape (k + 1, N).
    coefficients:
        Written; shape (k, N).
    """
    level, last = coefficients.shape[0], tables[0].shape[0] - 1
    half = np.uint32(tables[0][last] >> np.uint32(1))
    special, middle, gone = spread(tables[0][last]), spread(half), over[level]
    start, stop = share(level, part, parts)
    for i in range(start, stop):
        prime = tables[0][i]
        q, fix, source, target = spread(prime), spread(np.uint32(prime - below(half, prime))), over[i], coefficients[i]
        for n in range(0, target.shape[0], LANES):
            # What the special prime leaves over, rounded.
            store(target, n, under(under(under(load(gone, n) + middle, special), q) + fix, q))
        _quotient(source, target, tables[10][last, i], tables[11][last, i], prime, target)
        _raise_by_half(target, prime)


@kernel
def lift_all(coefficients: Any, digits: Any, tables: Any, part: Any, parts: Any) -> None:
    """Bring every digit to every prime, its own one included; shapes (k, N) and (k, k + 1, N or more).

    The coefficients are half a prime too large, as `scale_down` and `raise_all` leave them.
    """
    primes, roots, shoup = tables[:3]
    level, special, count = coefficients.shape[0], primes.shape[0] - 1, coefficients.shape[1]
    start, stop = share(level * (level + 1), part, parts)
    for unit in range(start, stop):
        i, j = unit // level, unit % level
        row = special if i == level else i
        _forward_centred(coefficients[j], digits[j, i, :count], roots[row], shoup[row], primes[row], primes[j])


@kernel
def _switched(
    digits: Any, at: Any, step: Any, keys: Any, place: Any, level: Any, q: Any, bound: Any, inverse: Any
) -> Any:
    """Multiply a tile of all digits by both components of a key and add up, reduced: four vectors for each component.

    Parameters
    ----------
    digits, at, step:
        The digits, flat; where the tile is in the first digit, and how far it is to the next.
    keys, place:
        The keys, flat, and where the tile is.
    level:
        Number of digits.
    q, bound, inverse:
        The prime, 8 q² (wide), the inverse of the prime modulo 2^32, the same in all lanes.
    """
    a, b, c, d = nothing(), nothing(), nothing(), nothing()
    e, f, g, h = nothing(), nothing(), nothing(), nothing()
    for j in range(level):
        if j > 0 and j % _MOST_PRODUCTS == 0:
            # Sixteen squares of q fit 64 bits, but only half of that may be left in the end.
            a, b, c, d = under_both(a, bound), under_both(b, bound), under_both(c, bound), under_both(d, bound)
            e, f, g, h = under_both(e, bound), under_both(f, bound), under_both(g, bound), under_both(h, bound)
        w, x, y, z = load(digits, at), load(digits, at + 16), load(digits, at + 32), load(digits, at + 48)
        a, b = more(a, w, load(keys, place)), more(b, x, load(keys, place + 16))
        c, d = more(c, y, load(keys, place + 32)), more(d, z, load(keys, place + 48))
        e, f = more(e, w, load(keys, place + TILE)), more(f, x, load(keys, place + TILE + 16))
        g, h = more(g, y, load(keys, place + TILE + 32)), more(h, z, load(keys, place + TILE + 48))
        place, at = place + 2 * TILE, at + step
    if level > _MOST_PRODUCTS:
        a, b, c, d = under_both(a, bound), under_both(b, bound), under_both(c, bound), under_both(d, bound)
        e, f, g, h = under_both(e, bound), under_both(f, bound), under_both(g, bound), under_both(h, bound)
    return (
        (reduced(a, q, inverse), reduced(b, q, inverse), reduced(c, q, inverse), reduced(d, q, inverse)),
        (reduced(e, q, inverse), reduced(f, q, inverse), reduced(g, q, inverse), reduced(h, q, inverse)),
    )


@kernel
def _put(out: Any, x: Any, y: Any, lanes: Any, a: Any, b: Any, first: Any, q: Any, adding: Any) -> None:
    """Rearrange sixteen residues of both components and write them at x and y, or add them to what is there."""
    a, b = rearranged(under(a + first, q), lanes), rearranged(b, lanes)
    if adding is not None:
        a, b = under(load(out, x) + a, q), under(load(out, y) + b, q)
    store(out, x, a)
    store(out, y, b)


@kernel
def _rotate_segment(
    digits: Any,
    first: Any,
    keys: Any,
    place: Any,
    goals: Any,
    order: Any,
    i: Any,
    goal: Any,
    out: Any,
    at: Any,
    hop: Any,
    other: Any,
    tables: Any,
    adding: Any,
) -> None:
    """Make one segment of a rotation, row i, residues from ``goal`` on.

    Parameters
    ----------
    digits, first:
        As in `rotate_add`.
    keys, place:
        Arranged keys, flat, and where the segment's tiles of this key begin.
    goals, order:
        Where each block of sixteen residues goes, and the automorphism; shapes (N / 16,) and (N,).
    out, at, hop, other:
        The result, flat; where the first tile goes, how far it is to the next tile, and to the other component.
    adding:
        None, or anything else to add to what is there.
    """
    level, width = digits.shape[0], digits.shape[2]
    flat, step, f = digits.reshape(-1), (level + 1) * width, first[i]
    row = tables[0].shape[0] - 1 if i == level else i
    prime = tables[0][row]
    q, bound, inverse = spread(prime), _bound(prime), spread(tables[7][row])
    source = order[goal] // SEGMENT * SEGMENT
    for n in range(source, source + SEGMENT, TILE):
        one, two = _switched(flat, i * width + n, step, keys, place, level, q, bound, inverse)
        place += 2 * level * TILE
        # A tile, too, moves as a whole.
        m = n // LANES
        tile = goals[m] // TILE * TILE
        x = at + (tile - goal) // TILE * hop - tile
        y = x + other
        to = goals[m]
        _put(out, x + to, y + to, load(order, to), one[0], two[0], load(f, n), q, adding)
        to = goals[m + 1]
        _put(out, x + to, y + to, load(order, to), one[1], two[1], load(f, n + 16), q, adding)
        to = goals[m + 2]
        _put(out, x + to, y + to, load(order, to), one[2], two[2], load(f, n + 32), q, adding)
        to = goals[m + 3]
        _put(out, x + to, y + to, load(order, to), one[3], two[3], load(f, n + 48), q, adding)


@kernel
def _bound(prime: Any) -> Any:
    """Return 8 q², wide: sums of products are kept below it, and below 2^63."""
    return spread_wide(np.uint64(_MOST_PRODUCTS) * np.uint64(prime) * np.uint64(prime))


@kernel
def _goals(orders: Any) -> Any:
    """Tell for each rotation where each block of sixteen residues goes; shape (rotations, N / 16).

    The order of the transform is bit-reversed, so neighbours differ in the high bits of their exponents, and an
    automorphism, which multiplies exponents, keeps aligned blocks of any power of two together.
    """
    blocks = orders.shape[1] // LANES
    goals = np.empty((orders.shape[0], blocks), np.int32)
    for r in range(orders.shape[0]):
        order = orders[r]
        for block in range(blocks):
            goals[r, order[block * LANES] // LANES] = block * LANES
    return goals


@kernel
def rotate_and_sum(
    digits: Any,
    copies: Any,
    keys: Any,
    orders: Any,
    starts: Any,
    opened: Any,
    parents: Any,
    targets: Any,
    ready: Any,
    diagonals: Any,
    bounds: Any,
    terms: Any,
    out: Any,
    tables: Any,
    part: Any,
    parts: Any,
) -> None:
    """Rotate ciphertexts over QP in many ways, multiply by diagonals and add up; rotated copies never leave the cache.

    It takes one segment of a row at a time: rotates what belongs there, every key serving all its ciphertexts one after
    another, and multiplies while it is at hand.

    Parameters
    ----------
    digits:
        Decompositions of second polynomials, shape (decompositions, k, k + 1, N); rows may be longer (`PADDING`).
    copies:
        Ciphertexts over QP that there are already, shape (ready, 2, k + 1, N).
    keys, orders:
        Keys in the order of use, `arranged`, and their automorphisms, shape (keys, N).
    starts:
        Key number t makes the copies starts[t] … starts[t + 1] - 1; shape (keys + 1,).
    opened, parents, targets:
        For each of these the decomposition, the one of ``copies`` that it is a rotation of, and its number; shape
        (rotations,).
    ready:
        Number of each of ``copies``.
    diagonals:
        In Montgomery form, in order of use, shape (k + 1, N / 64, diagonals, 64).
    bounds, terms:
        Sum number g multiplies the copies terms[bounds[g]] … terms[bounds[g + 1] - 1] by the diagonals of that number.
    out:
        Written; shape (sums, 2, k + 1, N). A sum without terms is zero.
    """
    rows, count = out.shape[2], out.shape[3]
    goals, segments = _goals(orders), count // SEGMENT
    each = 2 * (rows - 1) * SEGMENT
    copied = ready.shape[0] + targets.shape[0]
    # Tile by tile both components of all copies, side by side.
    near = np.empty(copied * 2 * SEGMENT, np.uint32)
    hop = copied * 2 * TILE
    flat_keys, flat = keys.reshape(-1), diagonals.reshape(-1)
    start, stop = share(rows * segments, part, parts)
    for unit in range(start, stop):
        i, goal = unit // segments, unit % segments * SEGMENT
        row = tables[0].shape[0] - 1 if i == rows - 1 else i
        for number in range(ready.shape[0]):
            for c in range(2):
                given, at = copies[number, c, i], (2 * ready[number] + c) * TILE
                for tile in range(goal, goal + SEGMENT, TILE):
                    for n in range(0, TILE, LANES):
                        store(near, at + n, load(given, tile + n))
                    at += hop
        for t in range(orders.shape[0]):
            place = (unit * orders.shape[0] + t) * each
            for r in range(starts[t], starts[t + 1]):
                first, at = copies[parents[r], 0], 2 * targets[r] * TILE
                _rotate_segment(
                    digits[opened[r]], first, flat_keys, place, goals[t], orders[t], i, goal,
                    near, at, hop, TILE, tables, None,
                )  # fmt: skip
        for tile in range(SEGMENT // TILE):
            at = (i * count + goal + tile * TILE) * diagonals.shape[2]
            for group in range(out.shape[0]):
                u, v = out[group, 0, i], out[group, 1, i]
                first, last = bounds[group], bounds[group + 1]
                _sum_tile(near, tile * hop, flat, at, first, last, terms, u, v, goal + tile * TILE, row, tables)


@kernel
def rotate_add(
    digits: Any, first: Any, keys: Any, orders: Any, base: Any, out: Any, tables: Any, part: Any, parts: Any
) -> None:
    """Add to a ciphertext over QP the sum of several rotations of another, from one decomposition.

    Parameters
    ----------
    digits:
        Decomposition of the ciphertext's second polynomial, shape (k, k + 1, N); rows may be longer (`PADDING`).
    first:
        The ciphertext's first polynomial over QP, that is times the special prime (`lift_first`); shape (k + 1, N).
    keys, orders:
        One key for each rotation, `arranged`, and their automorphisms, shape (rotations, N).
    base:
        What the rotations are added to, shape (2, k + 1, N).
    out:
        Written; shape (2, k + 1, N). May not overlap with ``base``.
    """
    goals, segments = _goals(orders), first.shape[1] // SEGMENT
    rows, count = out.shape[1], out.shape[2]
    each, flat_keys, flat = 2 * (rows - 1) * SEGMENT, keys.reshape(-1), out.reshape(-1)
    start, stop = share(rows * segments, part, parts)
    for unit in range(start, stop):
        i, goal = unit // segments, unit % segments * SEGMENT
        for c in range(2):
            out[c, i, goal : goal + SEGMENT] = base[c, i, goal : goal + SEGMENT]
        for t in range(orders.shape[0]):
            place = (unit * orders.shape[0] + t) * each
            _rotate_segment(
                digits, first, flat_keys, place, goals[t], orders[t], i, goal,
                flat, i * count + goal, TILE, rows * count, tables, True,
            )  # fmt: skip


@kernel
def _sum_tile(
    near: Any,
    low: Any,
    diagonals: Any,
    at: Any,
    first: Any,
    last: Any,
    terms: Any,
    u: Any,
    v: Any,
    goal: Any,
    row: Any,
    tables: Any,
) -> None:
    """Multiply one tile of copies by one of diagonals and add up, terms ``first`` … ``last`` - 1, into rows u and v."""
    prime = tables[0][row]
    q, bound, inverse = spread(prime), _bound(prime), spread(tables[7][row])
    a, b, c, d = nothing(), nothing(), nothing(), nothing()
    e, f, g, h = nothing(), nothing(), nothing(), nothing()
    for t in range(first, last):
        if (t - first) % _MOST_PRODUCTS == 0:
            a, b, c, d = under_both(a, bound), under_both(b, bound), under_both(c, bound), under_both(d, bound)
            e, f, g, h = under_both(e, bound), under_both(f, bound), under_both(g, bound), under_both(h, bound)
        place = at + t * TILE
        w, x = load(diagonals, place), load(diagonals, place + 16)
        y, z = load(diagonals, place + 32), load(diagonals, place + 48)
        place = terms[t] * 2 * TILE + low
        a, b = more(a, w, load(near, place)), more(b, x, load(near, place + 16))
        c, d = more(c, y, load(near, place + 32)), more(d, z, load(near, place + 48))
        place += TILE
        e, f = more(e, w, load(near, place)), more(f, x, load(near, place + 16))
        g, h = more(g, y, load(near, place + 32)), more(h, z, load(near, place + 48))
    a, b, c, d = under_both(a, bound), under_both(b, bound), under_both(c, bound), under_both(d, bound)
    e, f, g, h = under_both(e, bound), under_both(f, bound), under_both(g, bound), under_both(h, bound)
    store(u, goal, reduced(a, q, inverse))
    store(u, goal + 16, reduced(b, q, inverse))
    store(u, goal + 32, reduced(c, q, inverse))
    store(u, goal + 48, reduced(d, q, inverse))
    store(v, goal, reduced(e, q, inverse))
    store(v, goal + 16, reduced(f, q, inverse))
    store(v, goal + 32, reduced(g, q, inverse))
    store(v, goal + 48, reduced(h, q, inverse))


@kernel
def fold_special(values: Any, tables: Any, part: Any, parts: Any) -> None:
    """Prepare a division by the special prime; see `fold_row`."""
    fold_row(values, values.shape[1] - 1, tables[0].shape[0] - 1, tables, part, parts)


@kernel
def fold_row(values: Any, row: Any, number: Any, tables: Any, part: Any, parts: Any) -> None:
    """Prepare a division by prime number ``number``: bring its row to coefficients, ready to be rounded.

    Parameters
    ----------
    values:
        Polynomials over QP, shape (polynomials, k + 1, N); these rows are changed.
    row:
        Where the prime's residues are.
    """
    start, stop = share(values.shape[0], part, parts)
    for c in range(start, stop):
        to_coefficients(values[c, row], number, tables)
        _add_half(values[c, row], tables[0][number])


@kernel
def divide_rows(values: Any, row: Any, number: Any, tables: Any, part: Any, parts: Any) -> None:
    """Divide the rows before ``row`` by prime number ``number`` and round, as SEAL does, in place; after `fold_row`."""
    rest = np.empty(values.shape[2], np.uint32)
    start, stop = share(values.shape[0] * row, part, parts)
    for unit in range(start, stop):
        c, i = unit // row, unit % row
        _divide_row(values[c, i], values[c, row], number, i, rest, values[c, i], tables)


@kernel
def divide_special(values: Any, out: Any, tables: Any, part: Any, parts: Any) -> None:
    """Divide by the special prime and round, as SEAL does; after `fold_special`.

    Parameters
    ----------
    values:
        What `fold_special` changed; shape (polynomials, k + 1, N).
    out:
        Written; shape (polynomials, k, N).
    """
    level, special = out.shape[1], tables[0].shape[0] - 1
    rest = np.empty(out.shape[2], np.uint32)
    start, stop = share(out.shape[0] * level, part, parts)
    for unit in range(start, stop):
        c, i = unit // level, unit % level
        _divide_row(values[c, i], values[c, level], special, i, rest, out[c, i], tables)


@kernel
def _add_half(values: Any, prime: Any) -> None:
    """Add half the prime, so that rounding down afterwards rounds to the nearest. Shape (N,)."""
    half = np.uint32(prime >> np.uint32(1))
    for n in range(values.shape[0]):
        values[n] = below(np.uint32(values[n] + half), prime)


@kernel
def _divide_row(source: Any, gone: Any, last: Any, row: Any, rest: Any, out: Any, tables: Any) -> None:
    """Divide one row by the prime number ``last``, whose folded row is ``gone``; ``rest`` is scratch. Shapes (N,)."""
    prime, half = tables[0][row], np.uint32(tables[0][last] >> np.uint32(1))
    q, fix = spread(prime), spread(np.uint32(prime - below(half, prime)))
    for n in range(0, rest.shape[0], LANES):
        store(rest, n, under(load(gone, n), q) + fix)
    to_values(rest, row, tables)
    _quotient(source, rest, tables[10][last, row], tables[11][last, row], prime, out)


@kernel
def _quotient(source: Any, rest: Any, factor: Any, shoup: Any, prime: Any, out: Any) -> None:
    """Write ``(source - rest) * factor``, reduced; shapes (N,)."""
    q, w, s = spread(prime), spread(factor), spread_wide(np.uint64(shoup))
    for n in range(0, out.shape[0], LANES):
        store(out, n, under(times(load(source, n) + q - load(rest, n), w, s, q), q))


@kernel
def fold_both(values: Any, tables: Any, part: Any, parts: Any) -> None:
    """Prepare a division by the special prime P and the last data prime q together.

    With the last two rows brought to coefficients a modulo q and b modulo P, both moved by half of Pq, the remainder
    modulo Pq is ``a + q * t`` with ``t = (b - a) / q`` modulo P.

    Parameters
    ----------
    values:
        Polynomials over QP, shape (polynomials, k + 1, N); a and t replace the last two rows.
    """
    level, special = values.shape[1] - 1, tables[0].shape[0] - 1
    last = level - 1
    prime, other = tables[0][special], tables[0][last]
    half = (np.uint64(prime) * np.uint64(other)) >> np.uint64(1)
    half_prime, half_other = np.uint32(half % np.uint64(prime)), np.uint32(half % np.uint64(other))
    p, q, half_p, half_q = spread(prime), spread(other), spread(half_prime), spread(half_other)
    w, s = spread(tables[10][last, special]), spread_wide(np.uint64(tables[11][last, special]))
    start, stop = share(values.shape[0], part, parts)
    for c in range(start, stop):
        a, b = values[c, last], values[c, level]
        to_coefficients(a, last, tables)
        to_coefficients(b, special, tables)
        for n in range(0, a.shape[0], LANES):
            low = under(load(a, n) + half_q, q)
            high = under(load(b, n) + half_p, p)
            store(a, n, low)
            store(b, n, under(times(high + p - under(low, p), w, s, p), p))


@kernel
def divide_both(values: Any, out: Any, tables: Any, part: Any, parts: Any) -> None:
    """Divide by the special prime and the last data prime at once, rounding once; after `fold_both`.

    Parameters
    ----------
    values:
        What `fold_both` changed; shape (polynomials, k + 1, N).
    out:
        Written; shape (polynomials, k - 1, N).
    """
    primes, inverses, companions = tables[0], tables[10], tables[11]
    rows, special = out.shape[1], primes.shape[0] - 1
    last = rows
    half = (np.uint64(primes[special]) * np.uint64(primes[last])) >> np.uint64(1)
    rest = np.empty(out.shape[2], np.uint32)
    start, stop = share(out.shape[0] * rows, part, parts)
    for unit in range(start, stop):
        c, i = unit // rows, unit % rows
        prime = primes[i]
        fix = np.uint32(prime - np.uint32(half % np.uint64(prime)))
        step = np.uint32(primes[last] % prime)
        step_shoup = companion(step, prime)
        low, high = values[c, last], values[c, rows + 1]
        q, fixes, w, s = spread(prime), spread(fix), spread(step), spread_wide(np.uint64(step_shoup))
        for n in range(0, rest.shape[0], LANES):
            store(rest, n, under(load(low, n) + fixes, q) + times(load(high, n), w, s, q))
        to_values(rest, i, tables)
        factor = below(shoup_product(inverses[last, i], inverses[special, i], companions[special, i], prime), prime)
        shoup = companion(factor, prime)
        _quotient(values[c, i], rest, factor, shoup, prime, out[c, i])


@kernel
def square_join(re: Any, im: Any, out: Any, root: Any, tables: Any, part: Any, parts: Any) -> None:
    """Square two ciphertexts and join the results: re² + u * im².

    Parameters
    ----------
    re, im:
        Shape (2, k, N).
    out:
        Written; shape (3, k, N).
    root:
        The constant u in Montgomery form, shape (k, N).
    """
    primes, inverses, ups, ups_shoup = tables[0], tables[7], tables[8], tables[9]
    blocks = re.shape[2] // _BLOCK
    start, stop = share(re.shape[1] * blocks, part, parts)
    for unit in range(start, stop):
        i, low = unit // blocks, unit % blocks * _BLOCK
        q, inverse, w, s = spread(primes[i]), spread(inverses[i]), spread(ups[i]), spread_wide(np.uint64(ups_shoup[i]))
        re0, re1, im0, im1, u = re[0, i], re[1, i], im[0, i], im[1, i], root[i]
        x, y, z = out[0, i], out[1, i], out[2, i]
        for n in range(low, low + _BLOCK, LANES):
            # As in `square`, one factor of every product is lifted by 2^32 first; that of im takes u on the way.
            a, b, c, d, f = load(re0, n), load(re1, n), load(im0, n), load(im1, n), load(u, n)
            e, g = under(times(a, w, s, q), q), under(times(b, w, s, q), q)
            f = under(times(f, w, s, q), q)
            h, k = reduced(more(nothing(), c, f), q, inverse), reduced(more(nothing(), d, f), q, inverse)
            store(x, n, reduced(more(more(nothing(), e, a), h, c), q, inverse))
            store(y, n, reduced(more(more(nothing(), e, b + b), h, d + d), q, inverse))
            store(z, n, reduced(more(more(nothing(), g, b), k, d), q, inverse))


@kernel
def part_both(value: Any, conjugated: Any, re: Any, im: Any, tables: Any, part: Any, parts: Any) -> None:
    """Part a ciphertext from its conjugate: re = value + conjugated, im = value - conjugated; shapes (2, k, N)."""
    rows = value.shape[1]
    start, stop = share(2 * rows, part, parts)
    for unit in range(start, stop):
        c, i = unit // rows, unit % rows
        prime, v, w, x, y = tables[0][i], value[c, i], conjugated[c, i], re[c, i], im[c, i]
        for n in range(v.shape[0]):
            total, difference = np.uint32(v[n] + w[n]), np.uint32(v[n] - w[n])
            x[n] = below(total, prime)
            y[n] = min(difference, np.uint32(difference + prime))


@kernel
def lift_first(first: Any, out: Any, tables: Any, part: Any, parts: Any) -> None:
    """Multiply polynomials by the special prime, which brings them over QP.

    Parameters
    ----------
    first:
        Shape (polynomials, k, N).
    out:
        Written; shape (polynomials, k + 1, N); the special prime's rows are zero.
    """
    rows, special = out.shape[1], tables[0][tables[0].shape[0] - 1]
    start, stop = share(out.shape[0] * rows, part, parts)
    for unit in range(start, stop):
        c, i = unit // rows, unit % rows
        target = out[c, i]
        if i == rows - 1:
            target[:] = 0
            continue
        prime, source = tables[0][i], first[c, i]
        factor = np.uint32(special % prime)
        q, w, s = spread(prime), spread(factor), spread_wide(np.uint64(companion(factor, prime)))
        for n in range(0, source.shape[0], LANES):
            store(target, n, under(times(load(source, n), w, s, q), q))
