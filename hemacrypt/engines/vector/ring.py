"""The ring of one modulus chain: tables for its primes, and the moves between its forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels.modular import shoup_of
from hemacrypt.engines.vector.kernels.ntt import Words, bit_reversed, make_tables
from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array, ComplexArray
from hemacrypt.plan.plan import Parameters


def tables_of(primes: Sequence[int], degree: int) -> tuple[Any, ...]:
    """Return what the kernels take.

    That is: primes, roots, their Shoup companions, inverse roots, theirs, 1/N, its companion, inverses modulo 2^32,
    2^32 modulo each prime, its companion, and for every two primes the inverse of the first modulo the second (0 on the
    diagonal), its companion; the last two of shape (primes, primes).
    """
    each = [make_tables(prime, degree) for prime in primes]
    lift = [np.array([(1 << 32) % prime], dtype=np.uint64) for prime in primes]
    quotients = [_inverses_of(number, primes) for number in primes]
    return (
        np.array(primes, dtype=np.uint32),
        np.stack([table.roots for table in each]),
        np.stack([table.roots_shoup for table in each]),
        np.stack([table.inverse_roots for table in each]),
        np.stack([table.inverse_roots_shoup for table in each]),
        np.concatenate([table.scale for table in each]),
        np.concatenate([table.scale_shoup for table in each]),
        np.array([pow(prime, -1, 1 << 32) for prime in primes], dtype=np.uint32),
        np.concatenate(lift).astype(np.uint32),
        np.concatenate([shoup_of(up, prime) for up, prime in zip(lift, primes, strict=True)]),
        np.stack([values for values, _ in quotients]),
        np.stack([companions for _, companions in quotients]),
    )


def _inverses_of(number: int, primes: Sequence[int]) -> tuple[Words, Words]:
    """Return 1 / number modulo every other prime, and the Shoup companions."""
    words = np.array([pow(number, -1, prime) if number != prime else 0 for prime in primes], dtype=np.uint64)
    shoup = [shoup_of(words[i : i + 1], prime) for i, prime in enumerate(primes)]
    return words.astype(np.uint32), np.concatenate(shoup)


class Ring:
    """Tables for all primes of a modulus chain; the special prime stands last.

    Parameters
    ----------
    parameters:
        Degree and primes.

    Attributes
    ----------
    primes:
        uint32, shape (data primes + 1,).
    tables:
        What the kernels take; see `tables_of`.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        numbers = (*parameters.data_primes, parameters.special_prime)
        self.primes: Words = np.array(numbers, dtype=np.uint32)
        self.tables = tables_of(numbers, parameters.degree)
        self._order = bit_reversed(parameters.degree)

    def divide(self, values: Words, last: int, out: Words) -> None:
        """Divide a polynomial (k + 1, N) by its last prime, number ``last``, and round; ``values`` are changed."""
        kernels.drop_last(values, last, out, self.tables)

    def automorphism(self, element: int) -> npt.NDArray[np.int32]:
        """Return the order of values under X -> X^element in NTT form: result[i] = values[order[i]]; shape (N,)."""
        odd = 2 * self._order + 1  # the power of the root that stands at each place
        place = np.empty(2 * len(odd), dtype=np.int32)
        place[odd] = np.arange(len(odd), dtype=np.int32)
        return place[odd * element % (2 * len(odd))]

    def montgomery_form(self, values: npt.NDArray[np.unsignedinteger[Any]], rows: npt.NDArray[np.intp]) -> Words:
        """Multiply residues by 2^32; ``rows`` are the numbers of the primes of the second-last axis."""
        primes = self.primes[rows].astype(np.uint64)[:, None]
        return ((values.astype(np.uint64) << np.uint64(32)) % primes).astype(np.uint32)

    def rows(self, primes: int, *, extended: bool = False) -> npt.NDArray[np.intp]:
        """Return the numbers of the first primes, and with ``extended`` that of the special one."""
        first = np.arange(primes)
        return np.append(first, len(self.primes) - 1) if extended else first

    def encode(self, slots: Array | ComplexArray, scale: float, primes: int, *, extended: bool = False) -> Words:
        """Encode slots into NTT form over the first primes, shape (slots,) -> (primes, N).

        The polynomial takes the value ``slots[j] * scale`` at the root to the power 3^j, its conjugate at the inverse
        root (Cheon et al., "Homomorphic encryption for arithmetic of approximate numbers", 2017, §3.2).

        Parameters
        ----------
        slots:
            Real or complex, shape (slots,).
        scale:
            What they are multiplied by.
        primes:
            How many primes.
        extended:
            Whether a row for the special prime follows.

        Raises
        ------
        PlanError
            If a value does not fit 63 bits.
        """
        degree = self.parameters.degree
        values = np.zeros(degree, dtype=np.complex128)
        exponents = self.parameters.slot_exponents
        values[(exponents - 1) // 2] = slots
        values[(2 * degree - exponents - 1) // 2] = np.conj(slots)
        twist = np.exp(-1j * np.pi * np.arange(degree) / degree)
        rounded = np.rint((np.fft.fft(values) * twist).real * (scale / degree))
        if not np.abs(rounded).max() < 2.0**62:
            raise PlanError(f"values up to {np.abs(slots).max():.3g} at scale {scale:.3g} do not fit 63 bits")
        return self.transformed(rounded.astype(np.int64), self.rows(primes, extended=extended))

    def transformed(
        self, coefficients: npt.NDArray[np.int64] | npt.NDArray[np.object_], rows: npt.NDArray[np.intp]
    ) -> Words:
        """Bring a polynomial with integer coefficients into NTT form.

        Parameters
        ----------
        coefficients:
            Of either sign, Python integers where int64 is too small; shape (N,).
        rows:
            Numbers of the primes.

        Returns
        -------
        array, shape (rows, N)
        """
        transformed = np.empty((len(rows), len(coefficients)), dtype=np.uint32)
        for target, row in zip(transformed, rows, strict=True):
            target[:] = coefficients % int(self.primes[row])
            kernels.to_values(target, row, self.tables)
        return transformed
