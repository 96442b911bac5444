"""Squares under BFV: the tensor product of a ciphertext with itself, times t / q, rounded, in 32-bit residues.

The product is taken over the integers, so it needs more primes than q has: a ciphertext is brought to an auxiliary base
B as well, multiplied in both, scaled, and brought back. All three moves are conversions of a number x from one base to
another that find the multiple of the base's product that is too much by a sum of fractions (Halevi, Polyakov, Shoup,
"An improved RNS variant of the BFV homomorphic encryption scheme", 2019, §2.2), here in fixed point: with
y_i = [x (M / m_i)^-1] modulo m_i, x is the sum of y_i M / m_i less v M, v being the sum of y_i / m_i rounded. The
fractions have 28 bits; when they err, x is taken just beyond M / 2 in absolute value, which changes a ciphertext's
representative, or rounds a quotient up instead of down, and never what is encrypted.

Rounding needs no floating-point numbers either: t x / q rounded is (t x - [t x]_q) / q, so the remainder is what is
converted, and everything is exact. The result equals that of SEAL (BEHZ) but for a rounding error in the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hemacrypt.engines.vector.kernels import lower, raise_all, square, to_coefficients, to_values
from hemacrypt.engines.vector.modular import below, kernel, montgomery, share, shoup_product
from hemacrypt.engines.vector.ring import Ring, tables_of
from hemacrypt.engines.vector.team import meet
from hemacrypt.engines.vector.turns import relinearise_lowered
from hemacrypt.plan.plan import PRIME_LIMIT, Parameters, is_prime

# Bits of a fraction in fixed point: sums of 64 of them, the most primes there can be, fit 64 bits.
_FRACTION = 58
# Products that are added to a sum below 8 q² before that is reduced again.
_AT_ONCE = 7
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Scaling:
    """What squares modulo one plaintext modulus need at one level.

    Attributes
    ----------
    tables:
        Of the auxiliary base, as kernels take them; see `hemacrypt.engines.vector.ring.tables_of`.
    extend, scale, shrink:
        Conversions, as `convert` takes them: from q to B, from q and B to B times t / q, from B to q.
    """

    tables: tuple[Any, ...]
    extend: tuple[Any, ...]
    scale: tuple[Any, ...]
    shrink: tuple[Any, ...]

    @classmethod
    def of(cls, ring: Ring, plain_modulus: int) -> Scaling:
        """Choose the auxiliary base and compute all constants.

        Parameters
        ----------
        ring:
            The level's ring.
        plain_modulus:
            The plaintext modulus t.
        """
        data, others = ring.parameters.data_primes, auxiliary_primes(ring.parameters, plain_modulus)
        modulus, other = math.prod(data), math.prod(others)
        extend = _conversion(
            data,
            others,
            factors=[pow(modulus // prime, -1, prime) for prime in data],
            weights=[modulus // prime for prime in data],
            wrap=-modulus,
        )
        shrink = _conversion(
            others,
            data,
            factors=[pow(other // prime, -1, prime) for prime in others],
            weights=[other // prime for prime in others],
            wrap=-other,
        )
        # (t x - r) / q with r the sum of y_i q / q_i less v q.
        inverse = pow(modulus, -1, other)
        scale = _conversion(
            data,
            others,
            factors=[plain_modulus * pow(modulus // prime, -1, prime) for prime in data],
            weights=[-pow(prime, -1, other) for prime in data],
            wrap=1,
            own=plain_modulus * inverse,
        )
        return cls(tables_of(others, ring.parameters.degree), extend, scale, shrink)


def auxiliary_primes(parameters: Parameters, plain_modulus: int) -> tuple[int, ...]:
    """Return primes that are not in the chain and whose product holds every scaled product, four times over.

    A coefficient of the product is a sum of 2 N products of two numbers up to q / 2; scaled by t / q that is at most
    t N q / 2 in absolute value.
    There are hundreds of primes to choose from, and a secure chain takes a few dozen.
    """
    step = 2 * parameters.degree
    needed = 4 * plain_modulus * parameters.degree * math.prod(parameters.data_primes)
    found: list[int] = []
    candidate = PRIME_LIMIT - PRIME_LIMIT % step + 1
    while math.prod(found) < needed:
        candidate -= step
        if candidate not in parameters.data_primes and is_prime(candidate):
            found.append(candidate)
    return tuple(found)


def _conversion(
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    factors: Sequence[int],
    weights: Sequence[int],
    wrap: int,
    own: int | None = None,
) -> tuple[Any, ...]:
    """Return the constants of `convert`: the result is own * x' + the sum of y_i weights[i] + v * wrap."""

    def words(values: Sequence[int] | Sequence[Sequence[int]]) -> Any:
        return np.array(values, dtype=np.uint32)

    def in_montgomery_form(value: int) -> list[int]:
        return [(value << 32) % prime for prime in targets]

    reduced = [factor % prime for factor, prime in zip(factors, sources, strict=True)]
    return (
        words(sources),
        words(reduced),
        words([(factor << 32) // prime for factor, prime in zip(reduced, sources, strict=True)]),
        np.array([(1 << _FRACTION) // prime for prime in sources], dtype=np.uint64),
        words(targets),
        words([pow(prime, -1, 1 << 32) for prime in targets]),
        words([in_montgomery_form(weight) for weight in weights]),
        words(in_montgomery_form(wrap)),
        words([] if own is None else in_montgomery_form(own)),
    )


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
        whole[:] = np.uint64(1 << (_FRACTION - 1))
        for i in range(rows):
            x, y = source[c, i, low:high], digits[i]
            prime, factor, shoup, fraction = primes[i], factors[i], companions[i], fractions[i]
            for n in range(_BLOCK):
                y[n] = below(shoup_product(x[n], factor, shoup, prime), prime)
                whole[n] += np.uint64(y[n]) * fraction
        for n in range(_BLOCK):
            whole[n] >>= np.uint64(_FRACTION)
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
