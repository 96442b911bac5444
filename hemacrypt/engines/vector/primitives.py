"""Operations on ciphertexts: arrays in, arrays out, residue for residue what SEAL computes.

A ciphertext is (2, k, N) uint32 in NTT form over the primes q_0 … q_{k-1}. The one operation that differs from SEAL is
`rotate_hoisted`: several rotations share one decomposition, whose digits are those of the ciphertext before the
rotation, not after it. Its noise is the same, its residues are not (Halevi and Shoup, "Faster homomorphic linear
transformations in HElib", 2018, §3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels.blake2xb import uniform_residues
from hemacrypt.engines.vector.kernels.ntt import Words
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.seal.format import Residues


@dataclass(frozen=True, eq=False)
class RotationKey:
    """A Galois key, ready for rotations.

    Attributes
    ----------
    moved:
        The key in Montgomery form, its entries moved against the rotation, so that a sum of hoisted products need be
        moved only once; shape (data primes, 2, data primes + 1, N).
    order:
        The automorphism: result[i] = values[order[i]]; shape (N,).
    """

    moved: Words
    order: npt.NDArray[np.int32]


def expand(ring: Ring, residues: Residues) -> Words:
    """Return both polynomials of a checked ciphertext or key component, its seed expanded; shape (2, k, N)."""
    first = residues.polynomials.astype(np.uint32)
    if residues.seed is None:
        return first
    primes = ring.primes[: first.shape[1]]
    return np.stack([first[0], uniform_residues(residues.seed, primes, first.shape[2])])


def switching_key(ring: Ring, components: list[Residues]) -> Words:
    """Return a key-switching key in Montgomery form, shape (data primes, 2, data primes + 1, N)."""
    expanded = np.stack([expand(ring, component) for component in components])
    return ring.montgomery_form(expanded, np.arange(len(ring.primes)))


class Evaluator:
    """Computes in one ring.

    Parameters
    ----------
    ring:
        Tables of the modulus chain.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def rotation_key(self, components: list[Residues], element: int) -> RotationKey:
        """Return a Galois key for the automorphism X -> X^element."""
        key, order = switching_key(self.ring, components), self.ring.automorphism(element)
        moved = np.empty_like(key)
        moved[..., order] = key
        return RotationKey(moved, order)

    def add(self, left: Words, right: Words) -> Words:
        """Add two ciphertexts."""
        out = np.empty_like(left)
        kernels.add(left, right, out, self.ring.primes)
        return out

    def multiply_plain(self, value: Words, plain: Words) -> Words:
        """Multiply a ciphertext by a plaintext in Montgomery form, shape (k, N)."""
        out, first = np.empty_like(value), np.zeros(1, dtype=np.int64)
        kernels.multiply_sum(value[None], first, plain[None], first, out, self.ring.tables)
        return out

    def square(self, value: Words) -> Words:
        """Square a ciphertext; the result has three polynomials, shape (3, k, N)."""
        out = np.empty((3, *value.shape[1:]), dtype=np.uint32)
        kernels.square(value, out, self.ring.tables, 0, 1)
        return out

    def relinearise(self, value: Words, key: Words) -> Words:
        """Bring a ciphertext of three polynomials back to two."""
        return self.add(value[:2], self.switch(self.decompose(value[2]), key))

    def rotate(self, value: Words, key: RotationKey) -> Words:
        """Rotate (or conjugate) a ciphertext as SEAL does: move it, then switch keys."""
        moved = self._moved(value, key.order)
        out = self.switch(self.decompose(moved[1]), np.ascontiguousarray(key.moved[..., key.order]))
        kernels.add(out[:1], moved[:1], out[:1], self.ring.primes)
        return out

    def rotate_hoisted(self, value: Words, digits: Words, key: RotationKey) -> Words:
        """Rotate a ciphertext whose second polynomial was decomposed before; see the module's remark."""
        switched = self.switch(digits, key.moved)
        kernels.add(switched[:1], value[:1], switched[:1], self.ring.primes)
        return self._moved(switched, key.order)

    def rescale(self, value: Words) -> Words:
        """Divide a ciphertext by its last prime and round; the argument is used up."""
        return self._divided(value, value.shape[1] - 1)

    def decompose(self, polynomial: Words) -> Words:
        """Split a polynomial (k, N) into digits over all primes, shape (k, k + 1, N)."""
        primes, degree = polynomial.shape
        digits = np.empty((primes, primes + 1, degree), dtype=np.uint32)
        kernels.decompose(polynomial, digits, self.ring.tables)
        return digits

    def switch(self, digits: Words, key: Words) -> Words:
        """Multiply digits by a key and divide by the special prime: a key switch; shape (2, k, N)."""
        primes, degree = digits.shape[0], digits.shape[2]
        total = np.empty((2, primes + 1, degree), dtype=np.uint32)
        kernels.inner_product(digits, key, total, self.ring.tables)
        return self._divided(total, len(self.ring.primes) - 1)

    def _divided(self, values: Words, last: int) -> Words:
        out = np.empty((2, values.shape[1] - 1, values.shape[2]), dtype=np.uint32)
        for polynomial, target in zip(values, out, strict=True):
            self.ring.divide(polynomial, last, target)
        return out

    @staticmethod
    def _moved(value: Words, order: npt.NDArray[np.int32]) -> Words:
        out = np.empty_like(value)
        for polynomial, target in zip(value, out, strict=True):
            kernels.permute(polynomial, order, target)
        return out
