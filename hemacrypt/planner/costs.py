"""What an operation costs, to compare ways to evaluate a network; one core, milliseconds.

The figures of each engine are sums of what was measured at degree 8192 (benchmarks/kernels.py for `vector`): number
theoretic transforms, sums of products, and the bytes of keys and diagonals that stream from memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hemacrypt.plan import KeyGroup, LinearStep, Parameters, Step


@dataclass(frozen=True)
class Primitives:
    """Milliseconds of an engine's primitives at degree 8192.

    Attributes
    ----------
    transform:
        One number theoretic transform.
    product:
        Multiplying one polynomial row and adding up.
    pointwise:
        Any other pass over one row.
    """

    transform: float
    product: float
    pointwise: float


VECTOR: Final = Primitives(transform=0.0095, product=0.0020, pointwise=0.0016)
SEAL: Final = Primitives(transform=0.075, product=0.0275, pointwise=0.02)


@dataclass(frozen=True)
class Costs:
    """Costs at one degree.

    Parameters
    ----------
    degree:
        Polynomial degree N.
    primitives:
        Figures of the engine.
    """

    degree: int
    primitives: Primitives = VECTOR

    @property
    def _factor(self) -> float:
        return self.degree / 8192

    @property
    def _transform(self) -> float:
        return self.primitives.transform * self._factor * math.log2(self.degree) / 13

    def decompose(self, level: int) -> float:
        """Return the cost of decomposing a polynomial: each digit meets every other prime."""
        primes = level + 1
        return primes * (primes + 1) * self._transform

    def rotate(self, level: int) -> float:
        """Return the cost of one rotation of a decomposed ciphertext: its key streams from memory."""
        primes = level + 1
        rows = 2 * (primes + 1)
        return rows * (primes * self.primitives.product + 2 * self.primitives.pointwise) * self._factor

    def product(self, level: int) -> float:
        """Return the cost of one product with a diagonal, added up over the special prime as well."""
        return 2 * (level + 2) * self.primitives.product * self._factor

    def fold(self, level: int) -> float:
        """Return the cost of dividing one polynomial by the special prime."""
        return (level + 2) * (self._transform + self.primitives.pointwise * self._factor)

    def turn(self, level: int, rotations: int) -> float:
        """Return the cost of rotating a sum that is held over the special prime, by several steps at once."""
        return self.fold(level) + self.decompose(level) + rotations * self.rotate(level)

    def finish(self, level: int) -> float:
        """Return the cost of dividing a ciphertext by the special prime and rescaling it."""
        return 2 * ((level + 3) * self._transform + 2 * (level + 1) * self.primitives.pointwise * self._factor)

    def square(self, level: int, squares: int, outputs: int, conjugations: int) -> float:
        """Return the cost of squaring ciphertexts, joining, relinearising and rescaling them."""
        primes = level + 1
        tensor = 5 * primes * self.primitives.product * self._factor
        switch = self.decompose(level) + self.rotate(level) + 2 * self.fold(level)
        return squares * tensor + conjugations * switch + outputs * (switch + self.finish(level))


def one_key_bytes(degree: int, level: int) -> float:
    """Return what one seeded key for a level takes on the wire: 30 bits of each residue in 36, as SEAL packs them."""
    return 4.5 * (level + 1) * (level + 2) * degree


def key_bytes(parameters: Parameters, groups: Iterable[KeyGroup]) -> float:
    """Return what all keys of some groups take on the wire, about."""
    return sum(
        (len(group.elements) + group.relinearise) * one_key_bytes(parameters.degree, group.level) for group in groups
    )


def step_ms(parameters: Parameters, step: Step, primitives: Primitives = VECTOR) -> float:
    """Return the estimated milliseconds of one step of a plan."""
    costs, level = Costs(parameters.degree, primitives), step.level
    if isinstance(step, LinearStep):
        opened = {copy.parent for copy in step.copies[step.inputs :]}
        folded = sum(1 for parent in opened if parent >= step.inputs)
        turns = sum(costs.turn(level, len(group)) for group in step.turns)
        giants = sum(len(giants) - 1 for giants in step.giants) * costs.turn(level, 1)
        return (
            len(opened) * costs.decompose(level)
            + folded * costs.fold(level)
            + (len(step.copies) - step.inputs) * costs.rotate(level)
            + step.multiplications * costs.product(level)
            + giants
            + step.outputs * (turns + costs.finish(level))
        )
    return costs.square(level, step.squares, step.outputs, len(step.rotations))


def plan_ms(parameters: Parameters, steps: Iterable[Step], primitives: Primitives = VECTOR) -> float:
    """Return the estimated milliseconds of a whole evaluation."""
    return sum(step_ms(parameters, step, primitives) for step in steps)
