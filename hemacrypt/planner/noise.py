"""How large the error of a decrypted value will be: standard deviations, slot by slot, in the network's own units.

Every operation adds an independent error with a known variance. Coefficients of a polynomial with variance v become
slots with (complex) variance N v, of which the real part — the part that is read — has half. In units of 1 / scale:

=====================  =============================================================================================
encoding               rounding of N coefficients, N / 12: real slots make them symmetric, so all of it is real
fresh, symmetric       SEAL's errors, variance 10.5 each: N * 10.5 / 2
rescale                rounding of both polynomials, the second one times a ternary secret: N (1 + 2N/3) / 24
key switch             one error polynomial per digit, times the digit, over the special prime (see `key_switch`)
=====================  =============================================================================================

An error e of x becomes 2 x e under a square and M e under an affine map M. The figures were checked against SEAL.
Compare Costache et al., "On the precision loss in approximate homomorphic encryption", 2022, for the same approach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hemacrypt.network import Array
from hemacrypt.plan import JOIN_FACTOR, Layout, LinearStep, Parameters, SquareStep, Term

# SEAL's error: centred binomial of 21 + 21 bits, standard deviation 3.24 ("noise_standard_deviation" 3.2 rounded up).
_ERROR_VARIANCE = 10.5


def deviations_of_bound(layout: Layout) -> float:
    """Return how many standard deviations an error exceeds less than five times in 10^9.

    A rounding error times the secret is a product of two Gaussians in a slot: its real part follows a Laplace
    distribution, whose tail is exp(-sqrt(2) k). The mean over many copies is Gaussian again, where six suffice; between
    the two the factor was checked with Chernoff's bound.
    """
    return float(6 * (1 + 1.4 / np.sqrt(layout.copies)))


class NoiseModel:
    """Error variances of the primitive operations at given parameters; all per slot and for scale 1."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        degree = parameters.degree
        self.encoding = degree / 12
        self.fresh = degree * _ERROR_VARIANCE / 2
        self.rescale = parameters.rescale_variance

    @cached_property
    def _digit_shape(self) -> Array:
        """Mean square of a digit at each slot's root of unity, for digits uniform in [0, 1), shape (slots,).

        SEAL takes digits in [0, q), not (-q/2, q/2): their mean of q/2 adds up to (q/2) * 2 / (1 - zeta) in the slot of
        root zeta, which is large in the few slots whose root lies near 1.
        """
        degree = self.parameters.degree
        mean: Array = 1 / np.abs(1 - np.exp(1j * np.pi * self.parameters.slot_exponents / degree)) ** 2
        return degree / 12 + mean

    def key_switch(self, level: int) -> Array:
        """Return the variance that a rotation or relinearisation adds at a level, shape (slots,)."""
        ratios = sum((prime / self.parameters.special_prime) ** 2 for prime in self.parameters.data_primes[: level + 1])
        return self.parameters.degree * _ERROR_VARIANCE / 2 * ratios * self._digit_shape + self.rescale


@dataclass(frozen=True, eq=False)
class Transfer:
    """What an affine map does to error variances, whatever its scales will be; before its rescale.

    Attributes
    ----------
    carried:
        Of an input variance of 1 in every slot, shape (outputs, slots).
    copied:
        Of the rotated copies, at input scale 1.
    encoded:
        Of the rounding of the diagonals, at weight scale 1.
    turned:
        Of giant steps and turns, at a product of scales of 1.
    """

    carried: Array
    copied: Array
    encoded: Array
    turned: Array

    @classmethod
    def of(cls, model: NoiseModel, step: LinearStep, peak: Array) -> Transfer:
        """Measure a map; ``peak`` as in `linear_error`."""
        nothing, inputs = np.zeros_like(peak[0]), (step.inputs, len(peak[0]))
        switch, encoding = model.key_switch(step.level), _encoding(model, step)
        units = (
            _Units(step, np.ones(inputs), nothing, 0.0, nothing),
            _Units(step, np.zeros(inputs), switch, 0.0, nothing),
        )
        rounding = _Units(step, np.zeros(inputs), nothing, encoding, nothing)
        return cls(
            units[0].total(peak), units[1].total(peak), rounding.total(peak),
            _Units(step, np.zeros(inputs), nothing, 0.0, switch).total(peak),
        )  # fmt: skip

    def variance(self, step: LinearStep, typical: float) -> Array:
        """Return the error variance after the map for an input variance of about ``typical`` in every slot."""
        product_scale = step.input_scale * step.weight_scale
        return (
            typical * self.carried
            + self.copied / step.input_scale**2
            + self.encoded / step.weight_scale**2
            + self.turned / product_scale**2
        )


def _encoding(model: NoiseModel, step: LinearStep) -> float:
    # Complex diagonals are not symmetric: their rounding has half its variance in the real part, half in the other.
    return model.encoding / (2 if step.diagonals.imag.any() else 1)


def linear_error(model: NoiseModel, step: LinearStep, variance: Array, peak: Array) -> Array:
    """Return the error variance after an affine map, before its rescale, shape (outputs, slots).

    Parameters
    ----------
    model, step:
        Parameters and the map.
    variance:
        Error variance of the input, shape (inputs, slots).
    peak:
        Largest absolute value of the input, shape (inputs, slots).
    """
    switch = model.key_switch(step.level)
    encoding = _encoding(model, step) / step.weight_scale**2
    product_scale = step.input_scale * step.weight_scale
    units = _Units(step, variance, switch / step.input_scale**2, encoding, switch / product_scale**2)
    return units.total(peak)


def _switched(switch: Array, step: int) -> Array:
    """Return the larger variance of the two ways to rotate by ``step``, shape (slots,).

    SEAL rotates and decomposes the result, so that the few slots with far more noise are those whose roots lie near 1;
    whoever decomposes once for several rotations has it in the slots that these are rotated to.
    """
    larger: Array = np.maximum(switch, np.roll(switch, -step))
    return larger


@dataclass(frozen=True, eq=False)
class _Units:
    """Variances that meet in one affine map: of its input, its copies, its encoded diagonals, its turns."""

    step: LinearStep
    variance: Array
    copying: Array
    encoding: float
    turning: Array

    def total(self, peak: Array) -> Array:
        """Return the variance of the outputs, shape (outputs, slots)."""
        step = self.step
        variances, squares = list(self.variance), list(peak**2)
        for copy in step.copies[step.inputs :]:
            variances.append(np.roll(variances[copy.parent], -copy.step) + _switched(self.copying, copy.step))
            squares.append(np.roll(squares[copy.parent], -copy.step))
        sums = [self._inner_sums(giants, variances, squares) for giants in step.giants]
        return np.stack([self._turned(total) for total in sums])

    def _inner_sums(
        self, giants: Sequence[Sequence[Term]], variances: Sequence[Array], squares: Sequence[Array]
    ) -> Array:
        total = np.zeros_like(variances[0])
        for number, giant in reversed(list(enumerate(giants))):
            if number < len(giants) - 1:
                total = np.roll(total, -self.step.giant_step) + _switched(self.turning, self.step.giant_step)
            for term in giant:
                diagonal, variance = self.step.diagonals[term.diagonal], variances[term.copy]
                total += (diagonal.real**2 + diagonal.imag**2) * variance
                if self.encoding:
                    total += self.encoding * (squares[term.copy] + variance)
        return total

    def _turned(self, total: Array) -> Array:
        for group in self.step.turns:
            steps = [0, *(turn.step for turn in group)]
            # What is added to its own conjugate doubles its real part, the error with it.
            doubled = [steps.count(turned) ** 2 * np.roll(total, -turned) for turned in sorted(set(steps))]
            turning = np.sum([_switched(self.turning, turn.step) for turn in group], axis=0)
            total = turning + np.sum(doubled, axis=0)
        return total


def square_error(model: NoiseModel, step: SquareStep, variance: Array, peak: Array) -> Array:
    """Return the error variance after square, relinearisation and rescale, shape (outputs, slots); see `linear_error`.

    Where real and imaginary part are joined, either may take the error of both: fresh errors are complex.
    """
    switch = model.key_switch(step.level)
    if step.kind == "parted":
        variance = variance + switch / (2 * step.input_scale) ** 2
    squared = 4 * peak**2 * variance + 3 * variance**2
    if step.kind == "parted":
        squared = (1 + JOIN_FACTOR**2) * squared
    elif step.kind == "joined":
        real, other = squared[::2], squared[1::2]
        squared = real.copy()
        squared[: len(other)] += JOIN_FACTOR**2 * other
    product_scale = SquareStep.gain(step.kind) * step.input_scale**2
    return squared + switch / product_scale**2 + model.rescale / step.output_scale**2


def rescale_error(model: NoiseModel, step: LinearStep) -> float:
    """Return the variance that the rescale of an affine map and its encoded bias add."""
    return (model.rescale + model.encoding) / step.output_scale**2


def logit_deviation(before_rescale: Array, rescaling: float, layout: Layout) -> Array:
    """Return the standard deviation of each logit that is read as the mean over its copies, shape (logits,).

    Copies share the errors from before the rotate-and-sums (they are sums of the same terms), so only the rounding of
    the last rescale averages out. Of the rest, the mean over the copies deviates by no more than the mean of what they
    deviate by, however they depend on each other.
    """
    shared = np.sqrt(_by_copy(before_rescale, layout)).mean(axis=0)
    deviation: Array = np.sqrt(shared**2 + rescaling / layout.copies)
    return deviation


def copy_deviation(before_rescale: Array, layout: Layout) -> float:
    """Return the largest standard deviation of a single copy of a logit, the last rescale's rounding left out."""
    return float(np.sqrt(_by_copy(before_rescale, layout).max()))


def _by_copy(variance: Array, layout: Layout) -> Array:
    """Return the variance of every copy of every logit, shape (copies, logits)."""
    apart = variance.reshape(layout.ciphertexts, layout.copies, layout.period).transpose(1, 0, 2)
    return apart.reshape(layout.copies, -1)[:, layout.positions]
