"""Choosing the degree and the primes of the modulus chain."""

from __future__ import annotations

from collections.abc import Iterator

from hemacrypt.errors import PlanError
from hemacrypt.plan import PRIME_LIMIT, Parameters, is_prime
from hemacrypt.security import LARGEST_MODULUS_BITS

# Bits that a prime may have: residues below 2^30 fit 32-bit lanes with two bits to spare for lazy reduction.
PRIME_BITS = 30
# Smallest degree that is tried; below it no chain of two data primes and a special one is secure.
SMALLEST_DEGREE = 4096
# Values between two layers may lie over so many ciphertexts; beyond that keys and time are out of all reason.
MOST_CIPHERTEXTS = 64


def primes_below(limit: int, degree: int) -> Iterator[int]:
    """Yield primes below ``limit`` that are 1 modulo 2N, largest first, so that the NTT exists modulo each."""
    step = 2 * degree
    candidate = (limit - 2) // step * step + 1
    while candidate > step:
        if is_prime(candidate):
            yield candidate
        candidate -= step


def data_primes_needed(squares: int) -> int:
    """Count the data primes: every affine map and every square rescales once, and one prime holds the logits."""
    return (squares + 1) + squares + 1


def smallest_degree(squares: int, widest: int) -> int:
    """Return the smallest secure degree; what one ciphertext does not hold lies in several.

    Parameters
    ----------
    squares:
        Number of square activations.
    widest:
        Largest number of values between two layers.

    Raises
    ------
    PlanError
        If no degree of the security table serves.
    """
    bits = (data_primes_needed(squares) + 1) * PRIME_BITS
    for degree, limit in LARGEST_MODULUS_BITS.items():
        if degree >= SMALLEST_DEGREE and bits <= limit:
            if widest > MOST_CIPHERTEXTS * degree // 2:
                raise PlanError(
                    f"a layer of {widest} values needs over {MOST_CIPHERTEXTS} ciphertexts of {degree // 2} slots; "
                    "use a smaller image or fewer channels"
                )
            return degree
    largest = max(LARGEST_MODULUS_BITS)
    raise PlanError(
        f"{squares} squares need {bits} modulus bits; degree {largest} allows {LARGEST_MODULUS_BITS[largest]} bits: "
        "use fewer squares"
    )


def choose_parameters(degree: int, squares: int) -> Parameters:
    """Take the largest primes below 2^30: the very largest is the special one, q_0 the next, and so on.

    The special prime is the largest because key-switching noise is proportional to q_i / P.
    """
    primes = primes_below(PRIME_LIMIT, degree)
    special = next(primes)
    return Parameters(degree, tuple(next(primes) for _ in range(data_primes_needed(squares))), special)
