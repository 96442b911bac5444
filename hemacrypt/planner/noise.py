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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from hemacrypt.model.network import Array, ComplexArray, Linear
from hemacrypt.plan.plan import JOIN_FACTOR, Layout, LinearStep, Parameters, SquareStep, Term

# SEAL's error: centred binomial of 21 + 21 bits, standard deviation 3.24 ("noise_standard_deviation" 3.2 rounded up).
_ERROR_VARIANCE = 10.5
# Spectral norms are computed for so many logits and matrices; beyond that cheaper bounds serve.
_LOGITS_APART, _ROWS_OF_A_MATRIX, _LARGEST_MATRIX = 4, 1024, 1 << 23


def deviations_of_bound(layout: Layout) -> float:
    """Return how many standard deviations an error exceeds less than five times in 10^9.

    A rounding error times the secret is a product of two Gaussians in a slot: its real part follows a Laplace
    distribution, whose tail is exp(-sqrt(2) k). The mean over many copies is Gaussian again, where six suffice; between
    the two the factor was checked with Chernoff's bound.
    """
    return float(6 * (1 + 1.4 / np.sqrt(layout.copies)))


def rounded_up(value: float) -> float:
    """Round up to three digits, so that machines whose exponentials differ in the last bit make the same plan."""
    digits = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / digits) * digits:.3e}")


class NoiseModel:
    """Error variances of the primitive operations at given parameters; all per slot and for scale 1.

    Parameters
    ----------
    parameters:
        Degree and modulus chain.
    centred:
        Whether key switches take their digits around zero, as our kernels do, or in [0, q), as SEAL does.
    """

    def __init__(self, parameters: Parameters, centred: bool = False) -> None:
        self.parameters = parameters
        self.centred = centred
        degree = parameters.degree
        self.encoding = degree / 12
        self.fresh = degree * _ERROR_VARIANCE / 2
        self.rescale = parameters.rescale_variance

    @cached_property
    def _digit_shape(self) -> Array:
        """Mean square of a digit at each slot's root of unity, for digits uniform in an interval of 1, shape (slots,).

        SEAL takes digits in [0, q), not (-q/2, q/2): their mean of q/2 adds up to (q/2) * 2 / (1 - zeta) in the slot of
        root zeta, which is large in the few slots whose root lies near 1.
        """
        degree = self.parameters.degree
        if self.centred:
            return np.full(self.parameters.slots, degree / 12)
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
    def of(cls, model: NoiseModel, step: LinearStep, peak: ComplexArray) -> Transfer:
        """Measure a map; ``peak`` as in `linear_error`."""
        nothing, inputs = np.zeros(peak.shape[1]), (step.inputs, peak.shape[1])
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


def linear_error(model: NoiseModel, step: LinearStep, variance: Array, peak: ComplexArray) -> Array:
    """Return the error variance after an affine map, before its rescale, shape (outputs, slots).

    Parameters
    ----------
    model, step:
        Parameters and the map.
    variance:
        Error variance of the input, shape (inputs, slots).
    peak:
        Largest values of the input, shape (inputs, slots): real and imaginary parts.
    """
    switch = model.key_switch(step.level)
    encoding = _encoding(model, step) / step.weight_scale**2
    product_scale = step.input_scale * step.weight_scale
    units = _Units(step, variance, switch / step.input_scale**2, encoding, switch / product_scale**2)
    return units.total(peak)


@dataclass(frozen=True, eq=False)
class _Units:
    """Variances that meet in one affine map: of its input, its copies, its encoded diagonals, its turns."""

    step: LinearStep
    variance: Array
    copying: Array
    encoding: float
    turning: Array

    def total(self, peak: ComplexArray) -> Array:
        """Return the variance of the outputs, shape (outputs, slots)."""
        step = self.step
        variances, squares = list(self.variance), list(np.abs(peak) ** 2)
        for copy in step.copies[step.inputs :]:
            variances.append(np.roll(variances[copy.parent], -copy.step) + self.copying)
            squares.append(np.roll(squares[copy.parent], -copy.step))
        sums = [self._inner_sums(giants, variances, squares) for giants in step.giants]
        return np.stack([self._turned(total) for total in sums])

    def _inner_sums(
        self, giants: Sequence[Sequence[Term]], variances: Sequence[Array], squares: Sequence[Array]
    ) -> Array:
        total = np.zeros_like(variances[0])
        for number, giant in reversed(list(enumerate(giants))):
            if number < len(giants) - 1:
                total = np.roll(total, -self.step.giant_step) + self.turning
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
            total = len(group) * self.turning + np.sum(doubled, axis=0)
        return total


Part = Literal["real", "imaginary"]


def square_error(
    model: NoiseModel, step: SquareStep, variance: Array, peak: ComplexArray, part: Part = "real"
) -> Array:
    """Return the error variance after square, relinearisation and rescale, shape (outputs, slots).

    Where real ciphertexts are joined, either part may take the error of both: fresh errors are complex. Parting leaves
    exactly real and exactly imaginary ones, but for the key switch of the conjugation.

    Parameters
    ----------
    model, step:
        Parameters and the square.
    variance:
        Error variance of the input, shape (inputs, slots); of one part where ciphertexts are parted.
    peak:
        Largest values of the input, shape (inputs, slots): real and imaginary parts.
    part:
        Whose variance is given and wanted where ciphertexts are parted.
    """
    switch = model.key_switch(step.level)
    if step.kind == "parted":
        added = switch / (2 * step.input_scale) ** 2
        mine, other = (peak.real, peak.imag) if part == "real" else (peak.imag, peak.real)
        own, brought = (1.0, JOIN_FACTOR) if part == "real" else (JOIN_FACTOR, 1.0)
        squared = own**2 * _squared(mine, variance + added) + brought**2 * _squared(other, added)
    else:
        squared = _squared(peak.real, variance)
    if step.kind == "joined":
        real, others = squared[::2], squared[1::2]
        squared = real.copy()
        squared[: len(others)] += JOIN_FACTOR**2 * others
    product_scale = SquareStep.gain(step.kind) * step.input_scale**2
    return squared + switch / product_scale**2 + model.rescale / step.output_scale**2


def _squared(peak: Array, variance: Array) -> Array:
    """Return the error variance of a square."""
    squared: Array = 4 * peak**2 * variance + 3 * variance**2
    return squared


@dataclass(frozen=True, eq=False)
class Hidden:
    """The values that the last square squares: what they are made of, and how exactly.

    Attributes
    ----------
    layer:
        The affine map that writes them.
    entering:
        Error variance of each value that the map reads, shape (inputs,).
    own:
        Error variance that the map itself and what stands before the square add to each value, shape (outputs,).
    energy:
        Largest sum of their squares that is allowed.
    """

    layer: Linear
    entering: Array
    own: Array
    energy: float

    def amplified(self, last: Linear, logits: int) -> float:
        """Return the largest variance of a logit that the last square and the last map make of these errors.

        With values h and last weights v a logit is off by the sum of 2 v_i h_i e_i. The e_i share the errors that the
        map W reads, so an image may line them up: over all h of energy E the variance is at most E times the squared
        spectral norm of diag(2 v) W diag(sqrt(entering)), and E max_i (2 v_i)^2 own_i for what is independent.

        Parameters
        ----------
        last:
            The affine map behind the square.
        logits:
            How many of its outputs, from the first on, count.
        """
        rows, columns, values = last.entries()
        if logits <= _LOGITS_APART:
            gradients = np.zeros((logits, last.inputs))
            counted = rows < logits
            gradients[rows[counted], columns[counted]] = 2 * values[counted]
        else:
            # Many logits share one bound, that of their largest weights.
            gradients = np.zeros((1, last.inputs))
            np.maximum.at(gradients[0], columns[rows < logits], 2 * np.abs(values[rows < logits]))
        aligned = [self._aligned(gradient) + float((gradient**2 * self.own).max()) for gradient in gradients]
        return self.energy * max(aligned)

    def _aligned(self, gradient: Array) -> float:
        """Return the squared spectral norm of diag(gradient) W diag(sqrt(entering)), or a bound on it."""
        rows, columns, values = self.layer.entries()
        scaled = values * gradient[rows] * np.sqrt(self.entering)[columns]
        if self._small:
            matrix = np.zeros((self.layer.outputs, self.layer.inputs))
            matrix[rows, columns] = scaled
            return max(float(np.linalg.eigvalsh(matrix @ matrix.T)[-1]), 0.0)
        # Hoelder's inequality; the rows and columns of a convolution are much alike, so little is lost.
        absolute = np.abs(scaled)
        return float(np.bincount(rows, absolute).max() * np.bincount(columns, absolute).max())

    @property
    def _small(self) -> bool:
        return self.layer.outputs <= _ROWS_OF_A_MATRIX and self.layer.outputs * self.layer.inputs <= _LARGEST_MATRIX


def read_at(variance: Array, layout: Layout) -> Array:
    """Return the largest error variance of any copy of each value, shape (values,), in the values' own units."""
    worst: Array = _by_copy(variance, layout).max(axis=0) / np.where(layout.flags, layout.factor, 1.0) ** 2
    return worst


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
