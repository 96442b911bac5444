"""How much noise budget an exact evaluation has left: variances per coefficient, step by step.

The phase of a BFV ciphertext is ``q/t m + v``, exactly; it decrypts while ``|v| < q / 2t`` in every coefficient, and
the *budget* is how many bits |v| is below that (SEAL's ``invariant_noise_budget``). With N coefficients, a ternary
secret (variance 2/3) and plaintext polynomials of coefficients that are uniform modulo t, as those of integers in
slots are:

==============  =====================================================================================================
fresh           SEAL's error, variance 10.5, and the rounding of q/t m
key switch      one error polynomial for each digit in [0, q_i), over the special prime, and a rounding
rounding        of both polynomials, the second times the secret: (1 + 2N/3) / 12
product         with an encoded diagonal: v times c t^2 / 12, c its coefficients that are not zero: N, or 2 p where
                both rows repeat after p slots
square          2 t r v, where r is the phase over q, of variance (1 + 2N/3) / 12 as well: v times
                4 t^2 N (1 + 2N/3) / 12; and the roundings of SEAL's base conversions (Bajard, Eynard, Hasan and Zucca,
                "A full RNS variant of FV like somewhat homomorphic encryption schemes", 2016) of three polynomials
switch          v over q_l, and a rounding
==============  =====================================================================================================

Rotate-and-sum adds a polynomial to its own images under a group of automorphisms: of its coefficients some vanish and
the others add up with equal signs. So besides the mean variance the largest is followed. A product with a dense
polynomial levels it; one whose coefficients that are not zero stand N / c apart sees every (N / c)-th only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hemacrypt.plan.bfv_plan import BfvLinear, BfvSquare, BfvStep, Integers
from hemacrypt.plan.plan import Parameters

# SEAL's error: centred binomial of 21 + 21 bits.
_ERROR_VARIANCE: Final = 10.5
# No coefficient of a Gaussian polynomial exceeds so many standard deviations: of 10^7 ciphertexts less than one has
# such a coefficient (8192 coefficients, 2.6e-12 each).
DEVIATIONS: Final = 7.0


@dataclass(frozen=True)
class Noise:
    """Variance of the noise of one ciphertext's coefficients: their mean, and the largest."""

    mean: float
    peak: float

    def __add__(self, variance: float) -> Noise:
        return Noise(self.mean + variance, self.peak + variance)

    def times(self, norm: float, sparsity: float = 1.0) -> Noise:
        """Return the noise after a product with a polynomial.

        Parameters
        ----------
        norm:
            Sum of the squares of its coefficients.
        sparsity:
            All coefficients over those that are not zero, which stand so far apart.
        """
        return Noise(self.mean * norm, min(self.peak, self.mean * sparsity) * norm)


class BfvNoiseModel:
    """Noise of the primitive operations at given parameters and for one plaintext modulus."""

    def __init__(self, parameters: Parameters, plain_modulus: int) -> None:
        self.parameters, self.plain_modulus = parameters, plain_modulus
        degree = parameters.degree
        self.rounding = (1 + 2 * degree / 3) / 12
        self.fresh = Noise(_ERROR_VARIANCE, _ERROR_VARIANCE) + 1 / 12

    def key_switch(self, level: int) -> float:
        """Return the variance that a rotation or relinearisation adds."""
        ratios = sum((prime / self.parameters.special_prime) ** 2 for prime in self.parameters.data_primes[: level + 1])
        return self.parameters.degree * _ERROR_VARIANCE / 3 * ratios + self.rounding

    def product(self, noise: Noise, coefficients: int) -> Noise:
        """Return the noise after a product with integers in slots, so many of whose coefficients are not zero."""
        # Squares of numbers uniform modulo t have mean t^2 / 12 and variance t^4 / 180, and none exceeds t^2 / 4.
        norm = min(coefficients / 4, coefficients / 12 + DEVIATIONS * math.sqrt(coefficients / 180))
        return noise.times(norm * self.plain_modulus**2, self.parameters.degree / coefficients)

    def budget(self, noise: Noise, level: int) -> float:
        """Return the bits of noise budget that are left at a level; decryption is right while they are positive."""
        largest = math.log2(DEVIATIONS) + math.log2(noise.peak) / 2
        return self.parameters.bits_at(level) - math.log2(self.plain_modulus) - 1 - largest

    def switched(self, noise: Noise, level: int, target: int) -> Noise:
        """Return the noise after modulus switches from one level to another."""
        for prime in self.parameters.data_primes[level:target:-1]:
            noise = Noise(noise.mean / prime**2, noise.peak / prime**2) + self.rounding
        return noise

    def linear(self, step: BfvLinear, inputs: Sequence[Noise]) -> list[Noise]:
        """Return the noise after an affine map, before its modulus switches; one for each output."""
        switch, coefficients = self.key_switch(step.level), 2 * period_of(step.diagonals)
        copies = list(inputs)
        for copy in step.copies[step.inputs :]:
            copies.append(copies[copy.parent] + switch)
        outputs: list[Noise] = []
        for giants in step.giants:
            total = Noise(0.0, 0.0)
            for number, terms in reversed(list(enumerate(giants))):
                if number < len(giants) - 1:
                    total = total + switch
                for term in terms:
                    product = self.product(copies[term.copy], coefficients)
                    total = Noise(total.mean + product.mean, total.peak + product.peak)
            for group in step.turns:
                summands = len(group) + 1
                total = Noise(total.mean * summands, total.peak * summands**2) + switch * len(group)
            outputs.append(total)
        return outputs

    def square(self, step: BfvSquare, inputs: Sequence[Noise]) -> list[Noise]:
        """Return the noise after squares and relinearisation, before the modulus switches."""
        degree, primes = self.parameters.degree, step.level + 1
        factor = 4 * self.plain_modulus**2 * degree * self.rounding
        # Each of three polynomials is rounded down, and off by up to the number of primes more by the base conversion;
        # the second one meets the secret, the third one its square.
        secret = 2 * degree / 3
        conversion = (primes + 1) ** 2 / 3 * (1 + secret + secret**2)
        return [noise.times(factor) + conversion + self.key_switch(step.level) for noise in inputs]

    def step(self, step: BfvStep, inputs: Sequence[Noise]) -> list[Noise]:
        """Return the noise after a step, before its modulus switches."""
        return self.linear(step, inputs) if isinstance(step, BfvLinear) else self.square(step, inputs)

    def budgets(self, steps: Sequence[BfvStep], inputs: int) -> list[float]:
        """Return the budget after every step, that of the worst ciphertext."""
        noises, found = [self.fresh] * inputs, []
        for step in steps:
            noises = [self.switched(noise, step.level, step.next_level) for noise in self.step(step, noises)]
            if isinstance(step, BfvLinear):
                noises = [noise + 1 / 4 for noise in noises]  # the bias is rounded
            found.append(min(self.budget(noise, step.next_level) for noise in noises))
        return found


def period_of(diagonals: Integers) -> int:
    """Return after how many slots the rows of all diagonals repeat: a power of two; shape (diagonals, 2, slots)."""
    period = int(diagonals.shape[-1])
    while period > 1:
        half = period // 2
        # One diagonal answers most questions; all of them may be many megabytes.
        if not all(np.array_equal(some[..., :half], some[..., half:period]) for some in (diagonals[:1], diagonals)):
            break
        period = half
    return period
