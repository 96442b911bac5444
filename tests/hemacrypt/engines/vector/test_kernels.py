"""Every kernel gives what plain integer arithmetic gives, on random and on extreme residues, in any number of parts."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.plan import Parameters
from hemacrypt.planner.chain import primes_below

Words = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]

_DATA_PRIMES = 6
_DEGREES = [4096, 8192, 16384]
_KINDS = ["random", "largest", "zero"]
# The most terms that one sum gets here; more than one Montgomery reduction takes.
_TERMS = 19


@cache
def ring(degree: int) -> Ring:
    """Six data primes and a special one at any degree: kernels do not ask whether that is secure."""
    special, *data = [prime for prime, _ in zip(primes_below(1 << 30, degree), range(_DATA_PRIMES + 1), strict=False)]
    return Ring(cast(Parameters, SimpleNamespace(degree=degree, data_primes=tuple(data), special_prime=special)))


class Case:
    """Residues to work on, and the reference for them."""

    def __init__(self, degree: int, level: int, kind: str) -> None:
        self.ring, self.degree, self.level, self.kind = ring(degree), degree, level, kind
        self.rng = np.random.default_rng([degree, level, len(kind)])
        self.tables = self.ring.tables
        primes = self.ring.primes
        self.data = primes[:level].astype(np.uint64)
        self.over = np.append(primes[:level], primes[-1]).astype(np.uint64)  # the primes of a polynomial over QP
        self.all = primes.astype(np.uint64)

    def residues(self, primes: Wide, *shape: int) -> Words:
        """Make polynomials over these primes, shape (*shape, primes, N)."""
        limits = primes[:, None]
        full = (*shape, len(primes), self.degree)
        if self.kind == "largest":
            return np.broadcast_to(limits - np.uint64(1), full).astype(np.uint32, order="C")
        if self.kind == "zero":
            return np.zeros(full, dtype=np.uint32)
        return self.rng.integers(0, limits, full, dtype=np.uint64).astype(np.uint32)

    def rows(self, extended: bool) -> list[int]:
        """Return the numbers of the primes of a polynomial's rows."""
        return [*range(self.level), len(self.all) - 1] if extended else list(range(self.level))

    def coefficients(self, values: Words, rows: list[int]) -> Words:
        """Transform polynomials back, shape (…, rows, N)."""
        out = values.copy()
        for polynomial in out.reshape(-1, len(rows), self.degree):
            for row, line in zip(rows, polynomial, strict=True):
                kernels.to_coefficients(line, row, self.tables)
        return out

    def values(self, coefficients: Words, rows: list[int]) -> Words:
        """Transform polynomials, shape (…, rows, N)."""
        out = coefficients.copy()
        for polynomial in out.reshape(-1, len(rows), self.degree):
            for row, line in zip(rows, polynomial, strict=True):
                kernels.to_values(line, row, self.tables)
        return out


def in_parts(function: Any, arguments: tuple[Any, ...], out: Words, parts: int) -> Words:
    """Call a kernel part by part, last first, over an output full of nonsense; return the output."""
    out[...] = 0xDEADBEEF
    for number in reversed(range(parts)):
        function(*arguments, number, parts)
    return out


@pytest.fixture(params=[(4096, 1), (4096, 3), (8192, 2), (8192, 4), (8192, 6), (16384, 5)], ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return cast(tuple[int, int], request.param)


@pytest.fixture(params=_KINDS)
def case(request: pytest.FixtureRequest, size: tuple[int, int]) -> Case:
    return Case(*size, request.param)


@pytest.fixture(params=[1, 2, 3])
def parts(request: pytest.FixtureRequest) -> int:
    return cast(int, request.param)


def unlifted(words: Words, primes: Wide) -> Wide:
    """Return residues of polynomials in Montgomery form, shape (…, primes, N)."""
    inverses = np.array([pow(1 << 32, -1, int(prime)) for prime in primes], dtype=np.uint64)[:, None]
    return words.astype(np.uint64) * inverses % primes[:, None]


@pytest.mark.parametrize("centred", [False, True])
def test_a_decomposition_in_two_halves(case: Case, parts: int, centred: bool) -> None:
    polynomial = case.residues(case.data)
    coefficients = np.empty_like(polynomial)

    def lower(*arguments: Any) -> None:
        kernels.lower(*arguments[:-2], centred, *arguments[-2:])

    def lift(*arguments: Any) -> None:
        kernels.lift(*arguments[:-2], centred, *arguments[-2:])

    in_parts(lower, (polynomial, coefficients, case.tables), coefficients, parts)
    plain = case.coefficients(polynomial, case.rows(False))
    halves = (case.data >> np.uint64(1))[:, None] if centred else 0
    assert np.array_equal(coefficients, (plain + halves) % case.data[:, None])
    digits = np.empty((case.level, case.level + 1, case.degree), dtype=np.uint32)
    in_parts(lift, (polynomial, coefficients, digits, case.tables), digits, parts)
    for j in range(case.level):
        wanted = in_range(plain[j], case.data[j], centred) % case.over.astype(np.int64)[:, None]
        assert np.array_equal(digits[j], case.values(wanted.astype(np.uint32), case.rows(True)))
        assert np.array_equal(digits[j, j], polynomial[j])
    if not centred:
        whole = np.empty_like(digits)
        kernels.decompose(polynomial, whole, case.tables)
        assert np.array_equal(whole, digits)


def in_range(coefficients: Words, prime: Any, centred: bool) -> npt.NDArray[np.int64]:
    """Return coefficients as digits: from 0 on, or around 0."""
    digits = coefficients.astype(np.int64)
    return np.where(digits > int(prime) // 2, digits - int(prime), digits) if centred else digits


class Rotations(Case):
    """What rotations from one decomposition take."""

    def __init__(self, case: Case, padding: int = 0) -> None:
        super().__init__(case.degree, case.level, case.kind)
        self.digits, self.first = self.residues(self.over, self.level), self.residues(self.over)
        # Rows may be longer than N; what lies behind them is nobody's.
        self.padded = np.pad(self.digits, ((0, 0), (0, 0), (0, padding)), constant_values=0xDEAD)
        count = 2 * self.degree
        elements = [3, pow(3, 8, count), pow(3, -5, count), count - 1]
        self.orders = np.stack([self.ring.automorphism(element) for element in elements])
        self.keys = self.residues(self.over, len(elements), self.level, 2)

    def arranged(self, which: list[int]) -> tuple[Words, npt.NDArray[np.int32]]:
        """Return keys and automorphisms as kernels take them."""
        orders = self.orders[which].reshape(-1, self.degree)
        return kernels.arranged(self.keys[which].reshape(-1, *self.keys.shape[1:]), orders), orders

    def wanted(self, number: int, digits: Words | None = None, first: Words | None = None) -> Words:
        """Return a rotation over QP, shape (2, k + 1, N)."""
        total = np.zeros((2, self.level + 1, self.degree), dtype=np.uint64)
        key = unlifted(self.keys[number], self.over)
        for digit, component in zip(self.digits if digits is None else digits, key, strict=True):
            total = (total + digit.astype(np.uint64) * component) % self.over[:, None]
        total[0] = (total[0] + (self.first if first is None else first)) % self.over[:, None]
        return total[..., self.orders[number]].astype(np.uint32)


@pytest.mark.parametrize("padding", [0, kernels.PADDING])
@pytest.mark.parametrize("which", [[], [2], [3, 0, 2, 1, 0]])
def test_rotations_that_are_added_up(case: Case, parts: int, which: list[int], padding: int) -> None:
    these = Rotations(case, padding)
    base = case.residues(case.over, 2)
    out = np.empty_like(base)
    wanted = base.astype(np.uint64)
    for number in which:
        wanted = (wanted + these.wanted(number)) % case.over[:, None]
    arguments = (these.padded, these.first, *these.arranged(which), base, out, case.tables)
    in_parts(kernels.rotate_add, arguments, out, parts)
    assert np.array_equal(out, wanted)


# Sums of one product, of more than one reduction takes, and of none.
_LENGTHS = [0, 1, 8, 0, 9, 16, _TERMS, 2]


@pytest.mark.parametrize("which", [[], [1], [3, 0, 2]])
def test_rotations_that_are_multiplied_and_summed_at_once(case: Case, parts: int, which: list[int]) -> None:
    these = Rotations(case, kernels.PADDING)
    copies = case.residues(case.over, 2, 2)
    digits = np.stack([these.padded, these.padded[::-1].copy()])
    # Each key rotates both ciphertexts but the last one, which rotates the second only.
    made = [(t, o) for t in range(len(which)) for o in (0, 1) if o == 1 or t < len(which) - 1]
    starts = np.cumsum([0, *(sum(t == u for u, _ in made) for t in range(len(which)))])
    opened = np.array([o for _, o in made], dtype=np.int64)
    places = 2 + len(made)
    ready, targets = np.array([places - 1, 0]), np.arange(1, places - 1)
    every = np.empty((places, *copies.shape[1:]), dtype=np.uint32)
    every[ready] = copies
    for target, (t, o) in zip(targets, made, strict=True):
        every[target] = these.wanted(which[t], digits[o, ..., : case.degree], copies[o, 0])
    bounds = np.cumsum([0, *_LENGTHS])
    terms = case.rng.integers(0, places, bounds[-1])
    diagonals = case.residues(case.over, int(bounds[-1]))
    laid = np.ascontiguousarray(np.moveaxis(diagonals.reshape(len(diagonals), case.level + 1, -1, kernels.TILE), 0, 2))
    out = np.empty((len(_LENGTHS), *copies.shape[1:]), dtype=np.uint32)
    arguments = (digits, copies, *these.arranged(which), starts, opened, opened.copy(), targets, ready)
    in_parts(kernels.rotate_and_sum, (*arguments, laid, bounds, terms, out, case.tables), out, parts)
    plain = unlifted(diagonals, case.over)
    for g, found in enumerate(out):
        total = np.zeros(copies.shape[1:], dtype=np.uint64)
        for t in range(bounds[g], bounds[g + 1]):
            total = (total + every[terms[t]].astype(np.uint64) * plain[t]) % case.over[:, None]
        assert np.array_equal(found, total)


def whole(coefficients: Words, primes: Wide, columns: slice) -> list[int]:
    """Put numbers together from their residues, some columns of shape (primes, N); least non-negative ones."""
    modulus = int(np.prod(primes.astype(object)))
    numbers = [0] * coefficients[0, columns].size
    for prime, row in zip(primes.tolist(), coefficients[:, columns].tolist(), strict=True):
        rest = modulus // prime
        unit = rest * pow(rest, -1, prime)
        numbers = [(number + residue * unit) % modulus for number, residue in zip(numbers, row, strict=True)]
    return numbers


_COLUMNS = slice(0, None, 61)


def test_division_by_the_special_prime(case: Case, parts: int) -> None:
    values = case.residues(case.over, 3)
    exact = [whole(c, case.over, _COLUMNS) for c in case.coefficients(values, case.rows(True))]
    out = np.empty((3, case.level, case.degree), dtype=np.uint32)
    for number in range(parts):
        kernels.fold_special(values, case.tables, number, parts)
    in_parts(kernels.divide_special, (values, out, case.tables), out, parts)
    special = int(case.over[-1])
    for numbers, found in zip(exact, case.coefficients(out, case.rows(False)), strict=True):
        for prime, row in zip(case.data.tolist(), found[:, _COLUMNS].tolist(), strict=True):
            assert row == [(number + special // 2) // special % prime for number in numbers]


def test_division_by_the_special_and_the_last_prime(size: tuple[int, int], parts: int) -> None:
    if size[1] == 1:
        pytest.skip("nothing is left")
    for kind in _KINDS:
        case = Case(*size, kind)
        values = case.residues(case.over, 2)
        exact = [whole(c, case.over, _COLUMNS) for c in case.coefficients(values, case.rows(True))]
        out = np.empty((2, case.level - 1, case.degree), dtype=np.uint32)
        for number in range(parts):
            kernels.fold_both(values, case.tables, number, parts)
        in_parts(kernels.divide_both, (values, out, case.tables), out, parts)
        divisor = int(case.over[-1]) * int(case.data[-1])
        for numbers, found in zip(exact, case.coefficients(out, case.rows(False)[:-1]), strict=True):
            for prime, row in zip(case.data.tolist(), found[:, _COLUMNS].tolist(), strict=False):
                assert row == [(number + divisor // 2) // divisor % prime for number in numbers]


def test_two_squares_joined(case: Case, parts: int) -> None:
    re, im, root = case.residues(case.data, 2), case.residues(case.data, 2), case.residues(case.data)
    out = np.empty((3, case.level, case.degree), dtype=np.uint32)
    in_parts(kernels.square_join, (re, im, out, root, case.tables), out, parts)
    primes, u = case.data[:, None], unlifted(root, case.data)
    (a, b), (c, d) = re.astype(np.uint64), im.astype(np.uint64)
    for found, left, right in zip(
        out, (a * a, 2 * (a * b % primes), b * b), (c * c, 2 * (c * d % primes), d * d), strict=True
    ):
        assert np.array_equal(found, (left + u * (right % primes) % primes) % primes)


def test_a_square(case: Case) -> None:
    value = case.residues(case.data, 2)
    out = np.empty((3, case.level, case.degree), dtype=np.uint32)
    kernels.square(value, out, case.tables, 0, 1)
    primes = case.data[:, None]
    a, b = value.astype(np.uint64)
    for found, wanted in zip(out, (a * a, 2 * (a * b % primes), b * b), strict=True):
        assert np.array_equal(found, wanted % primes)


def test_real_and_imaginary_parts(case: Case, parts: int) -> None:
    value, conjugated = case.residues(case.data, 2), case.residues(case.data, 2)
    both = np.empty((2, *value.shape), dtype=np.uint32)
    in_parts(kernels.part_both, (value, conjugated, both[0], both[1], case.tables), both, parts)
    primes = case.data[:, None]
    assert np.array_equal(both[0], (value.astype(np.uint64) + conjugated) % primes)
    assert np.array_equal(both[1], (value + primes - conjugated) % primes)


def test_times_the_special_prime(case: Case, parts: int) -> None:
    first = case.residues(case.data, 2)
    out = np.empty((2, case.level + 1, case.degree), dtype=np.uint32)
    in_parts(kernels.lift_first, (first, out, case.tables), out, parts)
    assert np.array_equal(out[:, :-1], first * case.over[-1] % case.data[:, None])
    assert not out[:, -1].any()


def test_a_decomposition_of_what_is_over_qp(case: Case, parts: int) -> None:
    polynomial = case.residues(case.over)
    over, coefficients = np.empty_like(polynomial), np.empty((case.level, case.degree), dtype=np.uint32)
    in_parts(kernels.lower_over_qp, (polynomial, over, case.tables), over, parts)
    in_parts(kernels.scale_down, (over, coefficients, case.tables), coefficients, parts)
    divided = np.empty((1, case.level, case.degree), dtype=np.uint32)
    folded = polynomial[None].copy()
    kernels.fold_special(folded, case.tables, 0, 1)
    kernels.divide_special(folded, divided, case.tables, 0, 1)
    plain = case.coefficients(divided[0], case.rows(False))
    assert np.array_equal(coefficients, (plain + (case.data >> np.uint64(1))[:, None]) % case.data[:, None])
    digits = np.empty((case.level, case.level + 1, case.degree), dtype=np.uint32)
    in_parts(kernels.lift_all, (coefficients, digits, case.tables), digits, parts)
    for j in range(case.level):
        wanted = in_range(plain[j], case.data[j], True) % case.over.astype(np.int64)[:, None]
        assert np.array_equal(digits[j], case.values(wanted.astype(np.uint32), case.rows(True)))
