"""What an operation costs, to compare ways to evaluate a network: counted primitives, times what each was measured at.

The measurements are constants and not taken on the machine at hand, so that every machine makes the same plan of a
network. `benchmarks/kernels.py` measures them again; `benchmarks/engines.py` compares an evaluation with the sum of
its counted primitives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hemacrypt.plan.bfv_plan import BfvLinear, BfvStep
from hemacrypt.plan.plan import LinearStep, Parameters, Step


@dataclass(frozen=True)
class Counts:
    """How often primitives are carried out; a row is a polynomial modulo one prime.

    Attributes
    ----------
    transforms:
        Number theoretic transforms of a row.
    products:
        Rows that are multiplied and added up.
    passes:
        Other passes over a row: permutations, divisions, copies.
    rows_read:
        Rows of keys and diagonals that come from memory.
    """

    transforms: int = 0
    products: int = 0
    passes: int = 0
    rows_read: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.transforms + other.transforms,
            self.products + other.products,
            self.passes + other.passes,
            self.rows_read + other.rows_read,
        )

    def __mul__(self, times: int) -> Counts:
        return Counts(self.transforms * times, self.products * times, self.passes * times, self.rows_read * times)


@dataclass(frozen=True)
class Primitives:
    """Milliseconds of an engine's primitives at degree 8192, one core, operands in a near cache.

    Attributes
    ----------
    transform, product, pass_:
        One of each of `Counts`.
    row_read:
        Reading 32 kB from memory.
    """

    transform: float
    product: float
    pass_: float
    row_read: float

    def milliseconds(self, counts: Counts, degree: int) -> float:
        """Return what counted primitives take at a degree."""
        transform = self.transform * math.log2(degree) / 13
        rows = counts.products * self.product + counts.passes * self.pass_ + counts.rows_read * self.row_read
        return (counts.transforms * transform + rows) * degree / 8192


# Two cores of an AMD EPYC (Zen 4).
VECTOR: Final = Primitives(transform=0.0090, product=0.0010, pass_=0.0016, row_read=0.0007)
SEAL: Final = Primitives(transform=0.075, product=0.0275, pass_=0.02, row_read=0.0)


def decompose(level: int) -> Counts:
    """Count a decomposition: each digit comes from its own prime and meets every other one."""
    return Counts(transforms=(level + 1) * (level + 2))


def key(level: int) -> Counts:
    """Count the reading of one key."""
    return Counts(rows_read=2 * (level + 2) * (level + 1))


def rotate(level: int) -> Counts:
    """Count one rotation of a decomposed ciphertext that stays over QP, its key at hand."""
    rows = 2 * (level + 2)
    return Counts(products=rows * (level + 1), passes=2 * rows)


def product(level: int) -> Counts:
    """Count one product with a diagonal over QP."""
    return Counts(products=2 * (level + 2), rows_read=level + 2)


def fold(level: int) -> Counts:
    """Count the division of one polynomial by the special prime."""
    return Counts(transforms=level + 2, passes=2 * level + 3)


def turn(level: int, rotations: int) -> Counts:
    """Count the rotation of a sum over QP by several steps at once, their keys at hand."""
    return fold(level) + decompose(level) + rotate(level) * rotations


def finish(level: int) -> Counts:
    """Count the division of a ciphertext by the special prime and the last data prime at once."""
    return Counts(transforms=2 * (level + 2), passes=4 * (level + 1))


def square(level: int, squares: int, outputs: int, conjugations: int) -> Counts:
    """Count squaring ciphertexts, joining, relinearising and rescaling them."""
    tensor = Counts(products=3 * (level + 1), passes=2 * (level + 1))
    switch = decompose(level) + rotate(level) + Counts(passes=2 * (level + 1))
    keys = key(level) * (2 if conjugations else 1)
    return tensor * squares + (switch + fold(level) * 2) * conjugations + (switch + finish(level)) * outputs + keys


def count(step: Step) -> Counts:
    """Count the primitives of one step of a plan, as `vector` carries it out."""
    if not isinstance(step, LinearStep):
        return square(step.level, step.squares, step.outputs, len(step.rotations))
    return affine(step)


def affine(step: LinearStep | BfvLinear) -> Counts:
    """Count the primitives of an affine map; under BFV for one plaintext modulus."""
    level = step.level
    opened = {copy.parent for copy in step.copies[step.inputs :]}
    total = Counts(passes=2 * step.inputs * (level + 1))
    total += decompose(level) * len(opened)
    total += fold(level) * sum(parent >= step.inputs for parent in opened)
    total += rotate(level) * (len(step.copies) - step.inputs)
    total += product(level) * len(step.diagonals)
    # Copies with one step share its key, and so do all giant steps.
    total += key(level) * len({copy.step for copy in step.copies[step.inputs :]})
    giants = sum(len(giants) - 1 for giants in step.giants)
    total += turn(level, 1) * giants + key(level) * min(giants, 1)
    for group in step.turns:
        total += turn(level, len(group)) * step.outputs + key(level) * len(group)
    return total + finish(level) * step.outputs


def step_ms(parameters: Parameters, step: Step, primitives: Primitives = VECTOR) -> float:
    """Return the estimated milliseconds of one step of a plan."""
    return primitives.milliseconds(count(step), parameters.degree)


def plan_ms(parameters: Parameters, steps: Iterable[Step], primitives: Primitives = VECTOR) -> float:
    """Return the estimated milliseconds of a whole evaluation."""
    return sum(step_ms(parameters, step, primitives) for step in steps)


def exact_tensor(level: int) -> Counts:
    """Count one BFV square, not relinearised.

    Both polynomials go to an auxiliary base of l + 2 primes and one for Montgomery reduction; three products are
    transformed back in both bases, scaled by t, divided by q and come back to the chain (BEHZ).
    """
    primes, auxiliary = level + 1, level + 2
    transforms = 5 * (primes + auxiliary)
    conversions = 2 * primes * (auxiliary + 1) + 3 * 2 * primes * auxiliary
    return Counts(transforms, conversions + 3 * (primes + auxiliary), 10 * (primes + auxiliary))


def exact_square(level: int) -> Counts:
    """Count one BFV square, relinearised."""
    return exact_tensor(level) + decompose(level) + rotate(level) + fold(level) * 2 + key(level)


def exact_count(step: BfvStep) -> Counts:
    """Count the primitives of one step of an exact plan for one plaintext modulus."""
    dropped = max(step.level - step.next_level, 0)
    switches = Counts(transforms=dropped * 2 * (step.level + 1), passes=dropped * 4 * (step.level + 1)) * step.outputs
    if isinstance(step, BfvLinear):
        return affine(step) + switches
    return exact_square(step.level) * step.inputs + switches


def exact_step_ms(parameters: Parameters, step: BfvStep, moduli: int, primitives: Primitives = VECTOR) -> float:
    """Return the estimated milliseconds of one step of an exact plan, all plaintext moduli together."""
    return moduli * primitives.milliseconds(exact_count(step), parameters.degree)


def exact_ms(parameters: Parameters, steps: Iterable[BfvStep], moduli: int, primitives: Primitives = VECTOR) -> float:
    """Return the estimated milliseconds of a whole exact evaluation, all plaintext moduli together."""
    return sum(exact_step_ms(parameters, step, moduli, primitives) for step in steps)
