"""Choosing the degree and the primes of the modulus chain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from hemacrypt.errors import PlanError
from hemacrypt.plan.plan import Parameters, is_prime
from hemacrypt.plan.security import LARGEST_MODULUS_BITS

# Bits that a prime may have: residues below 2^30 fit 32-bit lanes with two bits to spare for lazy reduction.
PRIME_BITS = 30
# Shorter primes leave scales that the rounding of a rescale swamps.
SHORTEST_PRIME_BITS = 20
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


def candidates(squares: int, widest: int, refused: list[str]) -> Iterator[Parameters]:
    """Yield parameters from the smallest degree on, with primes as long as its security allows, up to 30 bits.

    A chain has no fewer primes at a larger degree, and primes of the full length give the smallest errors, so the first
    degree that allows them is the last to be tried.

    Parameters
    ----------
    squares:
        Number of square activations.
    widest:
        Largest number of values between two layers; what one ciphertext does not hold lies in several.
    refused:
        Gets a sentence for every degree that is out of the question.

    Raises
    ------
    PlanError
        If no degree of the security table serves.
    """
    count = data_primes_needed(squares) + 1
    for degree, limit in LARGEST_MODULUS_BITS.items():
        if degree < SMALLEST_DEGREE:
            continue
        if limit < count * SHORTEST_PRIME_BITS:
            refused.append(
                f"degree {degree} was rejected: its {limit} bits leave {limit / count:.1f} bits for each of {count} "
                f"primes, fewer than {SHORTEST_PRIME_BITS}"
            )
            continue
        whole = limit >= count * PRIME_BITS
        if widest <= MOST_CIPHERTEXTS * degree // 2:
            try:
                parameters = choose_parameters(degree, squares)
            except PlanError as error:
                # Of short primes that are 1 modulo 2N there are few.
                refused.append(f"degree {degree} was rejected: {error}")
                continue
            yield parameters
        elif whole:
            raise PlanError(
                f"a layer of {widest} values needs over {MOST_CIPHERTEXTS} ciphertexts of {degree // 2} slots; "
                "use a smaller image or fewer channels"
            )
        if whole:
            return
    largest = max(LARGEST_MODULUS_BITS)
    raise PlanError(
        f"{squares} squares need {count * PRIME_BITS} modulus bits; degree {largest} allows "
        f"{LARGEST_MODULUS_BITS[largest]} bits: use fewer squares"
    )


def smallest_degree(squares: int, widest: int) -> int:
    """Return the smallest degree that allows primes of the full length; see `candidates`."""
    return list(candidates(squares, widest, []))[-1].degree


def choose_parameters(degree: int, squares: int) -> Parameters:
    """Take the largest primes that fit: the very largest is the special one, q_0 the next, and so on.

    The special prime is the largest because key-switching noise is proportional to q_i / P. All have about one length:
    a product of two scales must lose one of them with one prime, wherever it stands.

    Parameters
    ----------
    degree:
        Polynomial degree; its security limit is shared out, but no prime reaches 2^30.
    squares:
        Number of square activations.
    """
    count = data_primes_needed(squares)
    bits = min(float(PRIME_BITS), LARGEST_MODULUS_BITS[degree] / (count + 1))
    primes = primes_below(math.floor(2.0**bits), degree)
    chosen = tuple(islice(primes, count + 1))
    if len(chosen) <= count:
        raise PlanError(f"degree {degree} has no {count + 1} primes for {squares} squares; use fewer squares")
    return Parameters(degree, chosen[1:], chosen[0])
