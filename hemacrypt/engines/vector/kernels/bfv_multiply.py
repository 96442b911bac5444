"""Multiplication under BFV: base conversion and scaling by t / q, after Halevi, Polyakov and Shoup.

`hemacrypt.engines.vector.scaling` says how it works and computes the constants.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from hemacrypt.engines.vector.kernels.barrier import meet
from hemacrypt.engines.vector.kernels.key_switch import relinearise_lowered
from hemacrypt.engines.vector.kernels.modular import below, kernel, montgomery, share, shoup_product
from hemacrypt.engines.vector.kernels.polynomials import lower, raise_all, square, to_coefficients, to_values

# Bits of a fraction in fixed point: sums of 64 of them, the most primes there can be, fit 64 bits.
FRACTION_BITS: Final = 58
# Products that are added to a sum below 8 q² before that is reduced again.
_AT_ONCE = 7
_BLOCK = 1024


@kernel
def convert(source: Any, conversion: Any, own: Any, out: Any, part: Any, parts: Any) -> None:
    """Bring coefficients from one base to another; see the module's description.

    Parameters
    ----------
    source:
        Shape (polynomials, primes, N).
    conversion:
        What `_conversion` returned.
    own:
        What the same polynomials are in the other base already, where that counts; may be ``out``.
    out:
        Written; shape (polynomials, other primes, N).
    """
    primes, factors, companions, fractions, targets, inverses, weights, wraps, owns = conversion
    rows, blocks = source.shape[1], source.shape[2] // _BLOCK
    digits = np.empty((rows, _BLOCK), np.uint32)
    whole, sums = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    start, stop = share(source.shape[0] * blocks, part, parts)
    for unit in range(start, stop):
        c, low = unit // blocks, unit % blocks * _BLOCK
        high = low + _BLOCK
        whole[:] = np.uint64(1 << (FRACTION_BITS - 1))
        for i in range(rows):
            x, y = source[c, i, low:high], digits[i]
            prime, factor, shoup, fraction = primes[i], factors[i], companions[i], fractions[i]
            for n in range(_BLOCK):
                y[n] = below(shoup_product(x[n], factor, shoup, prime), prime)
                whole[n] += np.uint64(y[n]) * fraction
        for n in range(_BLOCK):
            whole[n] >>= np.uint64(FRACTION_BITS)
        for j in range(targets.shape[0]):
            prime, inverse, wrap = targets[j], inverses[j], np.uint64(wraps[j])
            bound = np.uint64(8) * np.uint64(prime) * np.uint64(prime)
            for n in range(_BLOCK):
                sums[n] = whole[n] * wrap
            if owns.shape[0] > 0:
                x, weight = own[c, j, low:high], np.uint64(owns[j])
                for n in range(_BLOCK):
                    sums[n] += np.uint64(x[n]) * weight
            for first in range(0, rows, _AT_ONCE):
                for i in range(first, min(first + _AT_ONCE, rows)):
                    y, weight = digits[i], np.uint64(weights[i, j])
                    for n in range(_BLOCK):
                        sums[n] += np.uint64(y[n]) * weight
                for n in range(_BLOCK):
                    sums[n] = min(sums[n], sums[n] - bound)
            z = out[c, j, low:high]
            for n in range(_BLOCK):
                z[n] = montgomery(sums[n], prime, inverse)


@kernel
def to_coefficients_all(values: Any, tables: Any, part: Any, parts: Any) -> None:
    """Transform polynomials back, in place, shape (polynomials, primes, N); the first primes of the tables."""
    rows = values.shape[1]
    start, stop = share(values.shape[0] * rows, part, parts)
    for unit in range(start, stop):
        to_coefficients(values[unit // rows, unit % rows], unit % rows, tables)


@kernel
def to_values_all(values: Any, tables: Any, part: Any, parts: Any) -> None:
    """Transform polynomials, in place, shape (polynomials, primes, N); the first primes of the tables."""
    rows = values.shape[1]
    start, stop = share(values.shape[0] * rows, part, parts)
    for unit in range(start, stop):
        to_values(values[unit // rows, unit % rows], unit % rows, tables)


@kernel
def scaled_square(
    value: Any, scaling: Any, room: Any, product: Any, tables: Any, words: Any, part: Any, parts: Any
) -> Any:
    """Square a BFV ciphertext, without relinearisation.

    Parameters
    ----------
    value:
        In NTT form, shape (2, k, N).
    scaling:
        Fields of `Scaling`.
    room:
        Working memory: the ciphertext as coefficients, in base B, and the product there; shapes (2, k, N), (2, b, N),
        (3, b, N).
    product:
        Written: coefficients, shape (3, k, N).
    words:
        The team's words; see `team.meet`.

    Returns
    -------
    Whether all parts came to every barrier.
    """
    other_tables, extend, scale, shrink = scaling
    coefficients, other, other_product = room
    lower(value[0], coefficients[0], tables, False, part, parts)
    lower(value[1], coefficients[1], tables, False, part, parts)
    square(value, product, tables, part, parts)
    if not meet(words, parts):
        return False
    convert(coefficients, extend, other, other, part, parts)
    to_coefficients_all(product, tables, part, parts)
    if not meet(words, parts):
        return False
    to_values_all(other, other_tables, part, parts)
    if not meet(words, parts):
        return False
    square(other, other_product, other_tables, part, parts)
    if not meet(words, parts):
        return False
    to_coefficients_all(other_product, other_tables, part, parts)
    if not meet(words, parts):
        return False
    convert(product, scale, other_product, other_product, part, parts)
    if not meet(words, parts):
        return False
    convert(other_product, shrink, product, product, part, parts)
    return meet(words, parts)


@kernel
def square_exact(
    value: Any, scaling: Any, key: Any, order: Any, room: Any, product: Any, out: Any, sides: Any, work: Any,
    tables: Any, words: Any, part: Any, parts: Any,
) -> Any:  # fmt: skip
    """Square a BFV ciphertext, relinearise it and switch it down; see `scaled_square`.

    Parameters
    ----------
    key, order:
        The relinearisation key and the order that changes nothing, as in `kernels.rotate_add`.
    product:
        Working memory, shape (3, k, N).
    out:
        Written: in NTT form, shape (2, primes that are left, N).
    sides, work:
        As in `turns.affine`.
    """
    if not scaled_square(value, scaling, room, product, tables, words, part, parts):
        return False
    to_values_all(product[:2], tables, part, parts)
    raise_all(product[2], tables, part, parts)
    if not meet(words, parts):
        return False
    return relinearise_lowered(product, key, order, out, sides, work, tables, words, part, parts)
