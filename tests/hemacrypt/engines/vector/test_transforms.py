"""The transform, the generator of seeds, and the arithmetic below them."""

from __future__ import annotations

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.engines.vector.kernels import blake2xb
from hemacrypt.engines.vector.kernels.modular import below, montgomery, shoup_of, shoup_product
from hemacrypt.engines.vector.kernels.ntt import bit_reversed, forward, inverse, make_tables
from hemacrypt.engines.vector.primitives import expand
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from tests.hemacrypt.engines.vector.conftest import Beside

_PRIME = 1073643521
_SMALL = 786433  # 1 modulo 2^18, and small enough that rounding would show elsewhere


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(value=st.integers(0, 2**32 - 1), factor=st.integers(0, _PRIME - 1))
def test_shoup_products_are_right_and_below_twice_the_prime(value: int, factor: int) -> None:
    companion = shoup_of(np.array([factor], dtype=np.uint64), _PRIME)[0]
    product = int(shoup_product(np.uint32(value), np.uint32(factor), companion, np.uint32(_PRIME)))
    assert product % _PRIME == value * factor % _PRIME
    assert product < 2 * _PRIME


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(total=st.integers(0, 2**63 - 1))
def test_montgomery_divides_by_two_to_the_32(total: int) -> None:
    inverse_word = np.uint32(pow(_PRIME, -1, 1 << 32))
    reduced = int(montgomery(np.uint64(total), np.uint32(_PRIME), inverse_word))
    assert reduced == total * pow(1 << 32, -1, _PRIME) % _PRIME


def test_the_largest_sum_of_products_still_reduces() -> None:
    total = 8 * (_PRIME - 1) ** 2
    assert total < 2**63
    reduced = int(montgomery(np.uint64(total), np.uint32(_PRIME), np.uint32(pow(_PRIME, -1, 1 << 32))))
    assert reduced == total * pow(1 << 32, -1, _PRIME) % _PRIME


def test_below_subtracts_once_or_not_at_all() -> None:
    for value, expected in ((0, 0), (6, 6), (7, 0), (13, 6)):
        assert int(below(np.uint32(value), np.uint32(7))) == expected


@pytest.mark.parametrize("degree", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("prime", [_PRIME, _SMALL])
def test_the_transform_evaluates_at_odd_powers_and_returns(degree: int, prime: int) -> None:
    tables = make_tables(prime, degree)
    rng = np.random.default_rng(degree)
    coefficients = rng.integers(0, prime, degree).astype(np.uint32)
    values = coefficients.copy()
    forward(values, tables.roots, tables.roots_shoup, np.uint32(prime))
    root = int(tables.roots[bit_reversed(degree)[1]])
    assert pow(root, degree, prime) == prime - 1
    for place in rng.integers(0, degree, 5):
        point = pow(root, 2 * int(bit_reversed(degree)[place]) + 1, prime)
        expected = 0
        for coefficient in reversed(coefficients.tolist()):
            expected = (expected * point + coefficient) % prime
        assert int(values[place]) == expected
    inverse(
        values,
        tables.inverse_roots,
        tables.inverse_roots_shoup,
        np.uint32(prime),
        tables.scale[0],
        tables.scale_shoup[0],
    )
    assert np.array_equal(values, coefficients)


def test_the_transform_takes_entries_up_to_four_times_the_prime() -> None:
    tables = make_tables(_PRIME, 1024)
    rng = np.random.default_rng(0)
    small = rng.integers(0, _PRIME, 1024)
    large = (small + rng.integers(0, 4, 1024) * _PRIME).clip(max=4 * _PRIME - 1)
    reduced, lazy = (large % _PRIME).astype(np.uint32), large.astype(np.uint32)
    for values in (reduced, lazy):
        forward(values, tables.roots, tables.roots_shoup, np.uint32(_PRIME))
    assert np.array_equal(reduced, lazy)


def test_seeds_expand_to_seals_polynomials(beside: Beside) -> None:
    generator = seal.KeyGenerator(beside.context)
    encryptor = seal.Encryptor(beside.context, generator.secret_key())
    plain = seal.Plaintext()
    seal.CKKSEncoder(beside.context).encode([1.0, 2.0], 2.0**30, plain)
    level = beside.parameters.top_level
    for _ in range(3):
        seeded = sealio.dump(encryptor.encrypt_symmetric(plain))
        read = sealformat.read_ciphertext(seeded, beside.parameters, level, 2.0**30)
        assert read.seed is not None
        minor = sealio.seal_minor_version()
        checked = sealformat.check_ciphertext(seeded, beside.parameters, level, 2.0**30, minor)
        loaded = sealio.load(seal.Ciphertext(), beside.context, checked)
        assert np.array_equal(expand(beside.evaluator.ring, read), beside.from_seal(loaded))


def test_uneven_words_are_drawn_again_from_what_follows() -> None:
    seed = bytes(range(64))
    words = blake2xb.generate(seed, 1024).reshape(2, 512)
    plenty = blake2xb.generate(seed, 2048)
    limits = np.array([words[0, 5], np.uint64(2**64 - 1)], dtype=np.uint64)
    uneven = words >= limits[:, None]
    expected, used = words.copy(), words.size
    for row, column in np.argwhere(uneven):
        while expected[row, column] >= limits[row]:
            expected[row, column] = plenty[used] if used < plenty.size else blake2xb.generate(seed, used + 1)[-1]
            used += 1
    drawn = words.copy()
    blake2xb._draw_again(seed, drawn, uneven, limits)
    assert uneven.any()
    assert np.array_equal(drawn, expected)
    assert (drawn < limits[:, None]).all()
