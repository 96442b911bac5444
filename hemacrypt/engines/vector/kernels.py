"""What key switching, rescaling and linear maps are made of, on whole polynomials in NTT form.

Shapes: a *polynomial* over k primes is (k, N) uint32; a ciphertext is (2, k, N). The last row of every table belongs
to the special prime. All results equal SEAL's residue for residue, for they follow its rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hemacrypt.engines.vector.modular import below, kernel, montgomery, shoup_product
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
