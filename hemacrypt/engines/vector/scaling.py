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

from hemacrypt.engines.vector.kernels.bfv_multiply import FRACTION_BITS
from hemacrypt.engines.vector.ring import Ring, tables_of
from hemacrypt.plan.plan import PRIME_LIMIT, Parameters, is_prime


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
        np.array([(1 << FRACTION_BITS) // prime for prime in sources], dtype=np.uint64),
        words(targets),
        words([pow(prime, -1, 1 << 32) for prime in targets]),
        words([in_montgomery_form(weight) for weight in weights]),
        words(in_montgomery_form(wrap)),
        words([] if own is None else in_montgomery_form(own)),
    )
