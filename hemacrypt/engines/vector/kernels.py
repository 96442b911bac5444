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

from hemacrypt.engines.vector.modular import below, companion, kernel, montgomery, share, shoup_product
from hemacrypt.engines.vector.ntt import forward, inverse

# Products of residues below 2^30 that fit 63 bits, the most that one Montgomery reduction takes.
_MOST_PRODUCTS = 8
# Residues that are worked on at a time: sums of 64 bits then stay in the first-level cache.
_BLOCK = 1024


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
    primes = tables[0]
    level, special = polynomial.shape[0], primes.shape[0] - 1
    count = polynomial.shape[1]
    digit = np.empty(count, np.uint32)
    for j in range(level):
        digit[:] = polynomial[j]
        to_coefficients(digit, j, tables)
        for i in range(level + 1):
            row = special if i == level else i
            target = digits[j, i]
            if row == j:
                target[:] = polynomial[j]
                continue
            # Primes differ by less than a factor of two, so one subtraction reduces; the transform takes even more.
            target[:] = digit
            to_values(target, row, tables)


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
def drop_last(values: Any, last: Any, out: Any, tables: Any, quotients: Any, quotients_shoup: Any) -> None:
    """Divide by the last prime and round, as SEAL does; values are changed.

    Parameters
    ----------
    values:
        Polynomial over the primes that stay and, as the last row, the one that goes; shape (k + 1, N).
    last:
        Number of the prime that goes.
    out:
        Written; shape (k, N).
    quotients, quotients_shoup:
        1 / last prime modulo every prime, shape (primes,).
    """
    primes = tables[0]
    level, count = out.shape[0], out.shape[1]
    gone, prime_gone = values[level], primes[last]
    to_coefficients(gone, last, tables)
    half = np.uint32(prime_gone >> np.uint32(1))
    for n in range(count):
        gone[n] = below(np.uint32(gone[n] + half), prime_gone)
    rest = np.empty(count, np.uint32)
    for i in range(level):
        prime = primes[i]
        fix = np.uint32(prime - below(half, prime))
        for n in range(count):
            rest[n] = below(gone[n], prime) + fix
        to_values(rest, i, tables)
        factor, shoup = quotients[i], quotients_shoup[i]
        source, target = values[i], out[i]
        for n in range(count):
            target[n] = below(shoup_product(np.uint32(source[n] + prime - rest[n]), factor, shoup, prime), prime)


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
def add_plain(left: Any, plain: Any, primes: Any) -> None:
    """Add a plaintext of shape (k, N) to a ciphertext of shape (2, k, N), in place."""
    for i in range(left.shape[1]):
        prime, x, y = primes[i], left[0, i], plain[i]
        for n in range(x.shape[0]):
            x[n] = below(np.uint32(x[n] + y[n]), prime)


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
def square(ciphertext: Any, out: Any, tables: Any) -> None:
    """Square a ciphertext of shape (2, k, N) into three polynomials, shape (3, k, N)."""
    primes, inverses, lift, lift_shoup = tables[0], tables[7], tables[8], tables[9]
    for i in range(ciphertext.shape[1]):
        prime, prime_inverse, up, up_shoup = primes[i], inverses[i], lift[i], lift_shoup[i]
        a, b = ciphertext[0, i], ciphertext[1, i]
        x, y, z = out[0, i], out[1, i], out[2, i]
        for n in range(a.shape[0]):
            # Both factors vary, so Montgomery's division by 2^32 is made good beforehand, in one of them.
            u = np.uint64(below(shoup_product(a[n], up, up_shoup, prime), prime))
            v = np.uint64(below(shoup_product(b[n], up, up_shoup, prime), prime))
            x[n] = montgomery(u * np.uint64(a[n]), prime, prime_inverse)
            y[n] = montgomery(np.uint64(2) * u * np.uint64(b[n]), prime, prime_inverse)
            z[n] = montgomery(v * np.uint64(b[n]), prime, prime_inverse)


@kernel
def lower(polynomial: Any, coefficients: Any, tables: Any, part: Any, parts: Any) -> None:
    """Transform every row of a polynomial back: the first half of a decomposition.

    Parameters
    ----------
    polynomial:
        Shape (k, N).
    coefficients:
        Written; shape (k, N).
    """
    start, stop = share(polynomial.shape[0], part, parts)
    for j in range(start, stop):
        coefficients[j, :] = polynomial[j]
        to_coefficients(coefficients[j], j, tables)


@kernel
def lift(polynomial: Any, coefficients: Any, digits: Any, tables: Any, part: Any, parts: Any) -> None:
    """Bring every digit to every prime: the second half of a decomposition, after `lower`.

    Parameters
    ----------
    polynomial, coefficients:
        What `lower` took and wrote; shape (k, N).
    digits:
        Written; shape (k, k + 1, N), the last row for the special prime.
    """
    level, special = polynomial.shape[0], tables[0].shape[0] - 1
    # Row j of digit j is a copy, so the transforms are what is shared out.
    start, stop = share(level * level, part, parts)
    for unit in range(start, stop):
        j, i = unit // level, unit % level
        i += i >= j
        target = digits[j, i]
        # Primes differ by less than a factor of two, so the digit is below 4q, as the transform wants it.
        target[:] = coefficients[j]
        to_values(target, special if i == level else i, tables)
    start, stop = share(level, part, parts)
    for j in range(start, stop):
        digits[j, j, :] = polynomial[j]


@kernel
def _dot(digits: Any, key: Any, c: Any, i: Any, row: Any, start: Any, stop: Any, out: Any, tables: Any) -> None:
    """Multiply residues start … stop of row i of all digits by a key's component c and add up, reduced, into out."""
    prime, prime_inverse = tables[0][row], tables[7][row]
    for n in range(start, stop):
        out[n - start] = 0
    for first in range(0, digits.shape[0], _MOST_PRODUCTS):
        last = min(first + _MOST_PRODUCTS, digits.shape[0])
        for n in range(start, stop):
            total = np.uint64(0)
            for j in range(first, last):
                total += np.uint64(digits[j, i, n]) * np.uint64(key[j, c, row, n])
            out[n - start] = below(np.uint32(out[n - start] + montgomery(total, prime, prime_inverse)), prime)


@kernel
def rotate_many(
    digits: Any, first: Any, keys: Any, which: Any, orders: Any, out: Any, tables: Any, part: Any, parts: Any
) -> None:
    """Rotate a ciphertext in several ways from one decomposition; the results stay over QP.

    Parameters
    ----------
    digits:
        Decomposition of the ciphertext's second polynomial, shape (k, k + 1, N).
    first:
        The ciphertext's first polynomial over QP, that is times the special prime (`lift_first`); shape (k + 1, N).
    keys:
        Galois keys in Montgomery form, moved against their rotations, shape (keys, K, 2, K + 1, N) with K at least k.
    which:
        Which key serves each rotation, shape (rotations,).
    orders:
        Automorphism of each key, shape (keys, N).
    out:
        Written; shape (rotations, 2, k + 1, N).
    """
    level, count, special = digits.shape[0], digits.shape[2], tables[0].shape[0] - 1
    total = np.empty(count, np.uint32)
    start, stop = share(which.shape[0] * 2 * (level + 1), part, parts)
    for unit in range(start, stop):
        r, c, i = unit // (2 * (level + 1)), unit // (level + 1) % 2, unit % (level + 1)
        row = special if i == level else i
        _dot(digits, keys[which[r]], c, i, row, 0, count, total, tables)
        prime, order, target = tables[0][row], orders[which[r]], out[r, c, i]
        if c == 0:
            for n in range(count):
                total[n] = below(np.uint32(total[n] + first[i, n]), prime)
        for n in range(count):
            target[n] = total[order[n]]


@kernel
def rotate_add(
    digits: Any, first: Any, keys: Any, which: Any, orders: Any, base: Any, out: Any, tables: Any, part: Any, parts: Any
) -> None:
    """Add to a ciphertext over QP the sum of several rotations of another.

    Parameters
    ----------
    digits, first, keys, which, orders:
        As in `rotate_many`.
    base:
        What the rotations are added to, shape (2, k + 1, N).
    out:
        Written; shape (2, k + 1, N). May not overlap with ``base``.
    """
    level, count, special = digits.shape[0], digits.shape[2], tables[0].shape[0] - 1
    total = np.empty(count, np.uint32)
    start, stop = share(2 * (level + 1), part, parts)
    for unit in range(start, stop):
        c, i = unit // (level + 1), unit % (level + 1)
        row = special if i == level else i
        prime, target = tables[0][row], out[c, i]
        target[:] = base[c, i]
        for r in range(which.shape[0]):
            _dot(digits, keys[which[r]], c, i, row, 0, count, total, tables)
            order = orders[which[r]]
            if c == 0:
                for n in range(count):
                    total[n] = below(np.uint32(total[n] + first[i, n]), prime)
            for n in range(count):
                target[n] = below(np.uint32(target[n] + total[order[n]]), prime)


@kernel
def multiply_sums(
    copies: Any,
    diagonals: Any,
    starts: Any,
    which: Any,
    numbers: Any,
    out: Any,
    extended: Any,
    tables: Any,
    part: Any,
    parts: Any,
) -> None:
    """Multiply ciphertexts by plaintexts and add up, for many sums at once.

    Parameters
    ----------
    copies:
        Ciphertexts, shape (copies, 2, r, N).
    diagonals:
        Plaintexts in Montgomery form, shape (diagonals, r, N).
    starts:
        Sum number g has the terms starts[g] … starts[g + 1] - 1; shape (sums + 1,).
    which, numbers:
        Ciphertext and plaintext of each term, shape (terms,).
    out:
        Written; shape (sums, 2, r, N). A sum without terms is zero.
    extended:
        Whether the last row belongs to the special prime instead of q_{r-1}.
    """
    primes, inverses = tables[0], tables[7]
    rows, count = out.shape[2], out.shape[3]
    blocks = count // _BLOCK
    start, stop = share(rows * blocks, part, parts)
    sums = np.empty((2, _BLOCK), np.uint64)
    for unit in range(start, stop):
        i, low = unit // blocks, unit % blocks * _BLOCK
        high = low + _BLOCK
        row = primes.shape[0] - 1 if extended and i == rows - 1 else i
        prime, prime_inverse = primes[row], inverses[row]
        for g in range(out.shape[0]):
            o0, o1 = out[g, 0, i, low:high], out[g, 1, i, low:high]
            s0, s1 = sums[0], sums[1]
            o0[:] = 0
            o1[:] = 0
            for early in range(starts[g], starts[g + 1], _MOST_PRODUCTS):
                sums[:] = 0
                for t in range(early, min(early + _MOST_PRODUCTS, starts[g + 1])):
                    w = diagonals[numbers[t], i, low:high]
                    x0, x1 = copies[which[t], 0, i, low:high], copies[which[t], 1, i, low:high]
                    for n in range(_BLOCK):
                        weight = np.uint64(w[n])
                        s0[n] += np.uint64(x0[n]) * weight
                        s1[n] += np.uint64(x1[n]) * weight
                for n in range(_BLOCK):
                    o0[n] = below(np.uint32(o0[n] + montgomery(s0[n], prime, prime_inverse)), prime)
                    o1[n] = below(np.uint32(o1[n] + montgomery(s1[n], prime, prime_inverse)), prime)


@kernel
def fold_special(values: Any, tables: Any, part: Any, parts: Any) -> None:
    """Prepare a division by the special prime: bring the last row to coefficients, ready to be rounded.

    Parameters
    ----------
    values:
        Polynomials over QP, shape (polynomials, k + 1, N); the last rows are changed.
    """
    special = tables[0].shape[0] - 1
    start, stop = share(values.shape[0], part, parts)
    for c in range(start, stop):
        gone = values[c, values.shape[1] - 1]
        to_coefficients(gone, special, tables)
        _add_half(gone, tables[0][special])


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
    fix = np.uint32(prime - below(half, prime))
    for n in range(out.shape[0]):
        rest[n] = below(gone[n], prime) + fix
    to_values(rest, row, tables)
    factor, shoup = tables[10][last, row], tables[11][last, row]
    for n in range(out.shape[0]):
        out[n] = below(shoup_product(np.uint32(source[n] + prime - rest[n]), factor, shoup, prime), prime)


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
    factor, shoup = tables[10][last, special], tables[11][last, special]
    start, stop = share(values.shape[0], part, parts)
    for c in range(start, stop):
        a, b = values[c, last], values[c, level]
        to_coefficients(a, last, tables)
        to_coefficients(b, special, tables)
        for n in range(a.shape[0]):
            low = below(np.uint32(a[n] + half_other), other)
            high = below(np.uint32(b[n] + half_prime), prime)
            a[n] = low
            difference = np.uint32(high + prime - below(low, prime))
            b[n] = below(shoup_product(difference, factor, shoup, prime), prime)


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
        for n in range(rest.shape[0]):
            product = shoup_product(high[n], step, step_shoup, prime)
            rest[n] = np.uint32(below(np.uint32(low[n] + fix), prime) + product)
        to_values(rest, i, tables)
        factor = below(shoup_product(inverses[last, i], inverses[special, i], companions[special, i], prime), prime)
        shoup = companion(factor, prime)
        source, target = values[c, i], out[c, i]
        for n in range(rest.shape[0]):
            target[n] = below(shoup_product(np.uint32(source[n] + prime - rest[n]), factor, shoup, prime), prime)


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
        high = low + _BLOCK
        prime, prime_inverse, up, up_shoup = primes[i], inverses[i], ups[i], ups_shoup[i]
        a, b, c, d = re[0, i, low:high], re[1, i, low:high], im[0, i, low:high], im[1, i, low:high]
        w, x, y, z = root[i, low:high], out[0, i, low:high], out[1, i, low:high], out[2, i, low:high]
        for n in range(_BLOCK):
            # As in `square`, one factor of every product is lifted by 2^32 first; that of im takes u on the way.
            e = np.uint64(below(shoup_product(a[n], up, up_shoup, prime), prime))
            f = np.uint64(below(shoup_product(b[n], up, up_shoup, prime), prime))
            g = montgomery(np.uint64(c[n]) * np.uint64(w[n]), prime, prime_inverse)
            h = montgomery(np.uint64(d[n]) * np.uint64(w[n]), prime, prime_inverse)
            g64 = np.uint64(below(shoup_product(g, up, up_shoup, prime), prime))
            h64 = np.uint64(below(shoup_product(h, up, up_shoup, prime), prime))
            x[n] = montgomery(e * np.uint64(a[n]) + g64 * np.uint64(c[n]), prime, prime_inverse)
            y[n] = montgomery(np.uint64(2) * (e * np.uint64(b[n]) + g64 * np.uint64(d[n])), prime, prime_inverse)
            z[n] = montgomery(f * np.uint64(b[n]) + h64 * np.uint64(d[n]), prime, prime_inverse)


@kernel
def part(value: Any, conjugated: Any, re: Any, im: Any, tables: Any, part: Any, parts: Any) -> None:
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
    """Multiply a polynomial by the special prime, which brings it over QP.

    Parameters
    ----------
    first:
        Shape (k, N).
    out:
        Written; shape (k + 1, N); the special prime's row is zero.
    """
    level, special = first.shape[0], tables[0][tables[0].shape[0] - 1]
    start, stop = share(level, part, parts)
    for i in range(start, stop):
        prime, source, target = tables[0][i], first[i], out[i]
        factor = np.uint32(special % prime)
        shoup = companion(factor, prime)
        for n in range(source.shape[0]):
            target[n] = below(shoup_product(source[n], factor, shoup, prime), prime)
    if part == parts - 1:
        out[level, :] = 0
