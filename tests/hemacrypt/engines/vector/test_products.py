"""Matrix products over residues equal plain arithmetic, whatever the residues, weights and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.engines.vector.kernels import products
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.batch_plan import LARGEST_ROW
from hemacrypt.plan.schedule import ROWS, _group
from hemacrypt.planner.chain import choose_parameters

_FEW = settings(max_examples=15, deadline=None, derandomize=True, database=None)

Words = npt.NDArray[np.uint32]


@pytest.fixture(scope="module")
def ring() -> Ring:
    return Ring(choose_parameters(4096, 0))


@dataclass(frozen=True)
class Product:
    """A random sparse matrix and inputs for it."""

    matrix: npt.NDArray[np.int64]
    values: Words
    before: Words
    opens: npt.NDArray[np.bool_]

    @classmethod
    def random(cls, ring: Ring, seed: int, rows: int, inputs: int, kind: str) -> Product:
        rng = np.random.default_rng(seed)
        primes = ring.primes[:2, None].astype(np.int64)
        shape = (inputs, 2, 2, ring.parameters.degree)
        matrix = rng.integers(-(1 << 22), 1 << 22, (rows, inputs))
        values = rng.integers(0, primes, shape)
        if kind == "largest":
            # All that a row may weigh, all of one sign, and all residues as large as can be.
            matrix[:] = (LARGEST_ROW // inputs if inputs > 2 else (1 << 31) - 1) * rng.choice([-1, 1], (rows, 1))
            values = np.broadcast_to(primes - 1, shape)
        # At least one entry in each row, for rows without any are none.
        matrix[rng.random(matrix.shape) < 0.4] = 0
        matrix[np.arange(rows), rng.integers(0, inputs, rows)] += 1 if kind == "uniform" else 0
        matrix[~matrix.any(axis=1), 0] = -1
        before = rng.integers(0, primes, (rows, *shape[1:])).astype(np.uint32)
        return cls(matrix, values.astype(np.uint32), before, rng.random(rows) < 0.5)

    def computed(self, ring: Ring) -> Words:
        rows, columns = np.nonzero(self.matrix)
        groups, packed, weights, order = _group(rows, columns, self.matrix[rows, columns])
        out, degree = self.before.copy(), ring.parameters.degree
        places, kept = order * out[0].size, (~self.opens[order]).astype(np.uint32)
        for polynomial in range(2):
            for row in range(2):
                for first in (0, degree // 2):
                    products.multiply(
                        self.values,
                        out,
                        polynomial,
                        row,
                        first,
                        first + degree // 2,
                        groups,
                        packed,
                        weights,
                        places,
                        kept,
                        ring.tables,
                    )
        return out

    def expected(self, ring: Ring) -> Words:
        total = np.zeros(self.before.shape, dtype=np.uint64)
        for row, prime in enumerate(ring.primes[:2].tolist()):
            shrink = np.uint64(pow(1 << 32, -1, prime))
            for output, weights in enumerate(self.matrix):
                for number, weight in enumerate(weights.tolist()):
                    term = self.values[number, :, row].astype(np.uint64) * np.uint64(weight % prime) % np.uint64(prime)
                    total[output, :, row] += term
                total[output, :, row] = total[output, :, row] % np.uint64(prime) * shrink
                if not self.opens[output]:
                    total[output, :, row] += self.before[output, :, row]
                total[output, :, row] %= np.uint64(prime)
        return total.astype(np.uint32)


@_FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 19),
    inputs=st.integers(1, 9),
    kind=st.sampled_from(["uniform", "largest"]),
)
def test_products_equal_plain_arithmetic(ring: Ring, seed: int, rows: int, inputs: int, kind: str) -> None:
    product = Product.random(ring, seed, rows, inputs, kind)
    assert np.abs(product.matrix).sum(axis=1).max() <= LARGEST_ROW
    assert np.array_equal(product.computed(ring), product.expected(ring))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_full_rows_of_every_group_size_do_not_overflow(ring: Ring, rows: int, sign: int) -> None:
    product = Product.random(ring, rows, rows, 8, "largest")
    product.matrix[:] = sign * LARGEST_ROW // 8
    product.matrix[:, :2] += 1, -1
    assert np.array_equal(product.computed(ring), product.expected(ring))


def test_closing_multiplies_and_adds_the_constant_to_the_first_polynomial_only(ring: Ring) -> None:
    rng = np.random.default_rng(7)
    primes = ring.primes[:2, None].astype(np.uint64)
    sums = rng.integers(0, primes, (3, 2, ring.parameters.degree), dtype=np.uint64)
    sums[:, :, 0] = primes[:, 0] - np.uint64(1)
    bias = (ring.primes[:2] - 1).astype(np.uint32)
    out = np.empty(sums.shape, dtype=np.uint32)
    products.close(sums.astype(np.uint32), bias, out, ring.tables)
    expected = (sums << np.uint64(32)) % primes
    expected[0] = (expected[0] + bias.astype(np.uint64)[:, None]) % primes
    assert np.array_equal(out, expected)
