"""Conversions between bases and the square under BFV, against Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hemacrypt.engines.vector.kernels.bfv_multiply import convert
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.engines.vector.scaling import Scaling, auxiliary_primes
from hemacrypt.plan.plan import Parameters
from tests.hemacrypt.handmade import chain, primes_of

CASES = [(1024, 1, 17), (4096, 2, 17), (8192, 6, 20), (16384, 13, 40)]


def residues(values: list[int], primes: tuple[int, ...]) -> np.ndarray:
    return np.array([[value % prime for value in values] for prime in primes], dtype=np.uint32)[None]


def drawn(rng: np.random.Generator, bound: int, count: int) -> list[int]:
    """Draw integers up to a bound in absolute value, both ends and zero among them."""
    size = bound.bit_length() // 8 + 9
    values = [int.from_bytes(rng.bytes(size), "little") % (2 * bound + 1) - bound for _ in range(count - 5)]
    return [*values, bound, -bound, 0, 1, -1]


def converted(source: np.ndarray, conversion: tuple[object, ...], own: np.ndarray, rows: int, parts: int) -> np.ndarray:
    out = own.copy() if own.size else np.empty((1, rows, source.shape[2]), np.uint32)
    for part in range(parts):
        convert(source, conversion, out, out, part, parts)
    return out


def small_chain(degree: int, count: int) -> Parameters:
    if degree == 1024:
        special, prime = primes_of(4096, 30, 2)
        return Parameters(4096, (prime,), special)
    return chain(degree, count)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("degree", "count", "bits"), CASES)
def test_numbers_keep_their_value_in_another_base_and_back(degree: int, count: int, bits: int, parts: int) -> None:
    parameters = small_chain(degree, count)
    (modulus,) = primes_of(parameters.degree, bits, 1)
    scaling, q = Scaling.of(Ring(parameters), modulus), math.prod(parameters.data_primes)
    others = auxiliary_primes(parameters, modulus)
    # A fraction that lies within 2^-20 of one half may round either way; no valid number of B does.
    values = drawn(np.random.default_rng(count), q // 2 - (q >> 20), parameters.degree)
    nothing = np.empty((1, 0, 0), np.uint32)
    there = converted(residues(values, parameters.data_primes), scaling.extend, nothing, len(others), parts)
    np.testing.assert_array_equal(there, residues(values, others))
    wide = drawn(np.random.default_rng(count + 1), modulus * parameters.degree * q // 2, parameters.degree)
    back = converted(residues(wide, others), scaling.shrink, nothing, count, parts)
    np.testing.assert_array_equal(back, residues(wide, parameters.data_primes))


@pytest.mark.parametrize(("degree", "count", "bits"), CASES)
def test_a_product_is_scaled_and_rounded(degree: int, count: int, bits: int) -> None:
    parameters = small_chain(degree, count)
    (modulus,) = primes_of(parameters.degree, bits, 1)
    scaling, q = Scaling.of(Ring(parameters), modulus), math.prod(parameters.data_primes)
    others = auxiliary_primes(parameters, modulus)
    values = drawn(np.random.default_rng(count), parameters.degree * q * q // 2, parameters.degree)
    found = converted(residues(values, parameters.data_primes), scaling.scale, residues(values, others), len(others), 1)
    expected = [(2 * modulus * value + q) // (2 * q) for value in values]
    np.testing.assert_array_equal(found, residues(expected, others))


def test_auxiliary_primes_are_new_and_large_enough() -> None:
    parameters = chain(8192, 6)
    found = auxiliary_primes(parameters, 1032193)
    assert not set(found) & set(parameters.data_primes)
    needed = 2 * 1032193 * 8192 * math.prod(parameters.data_primes) // 2
    assert 2 * needed <= math.prod(found)
    assert math.prod(found[:-1]) < 4 * needed
