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

from functools import cached_property

import numpy as np

from hemacrypt.network import Array
from hemacrypt.plan import Layout, LinearStep, Parameters, SquareStep

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


def linear_error(model: NoiseModel, step: LinearStep, variance: Array, peak: Array) -> Array:
    """Return the error variance after an affine map, before its rescale, shape (slots,).

    Parameters
    ----------
    model, step:
        Parameters and the map.
    variance:
        Error variance of the input, shape (slots,).
    peak:
        Largest absolute value of the input, shape (slots,).
    """
    switch = model.key_switch(step.level)
    encoding = model.encoding / step.weight_scale**2
    variances, peaks = [variance], [peak**2]
    for baby in step.babies[1:]:
        variances.append(np.roll(variances[baby.parent], -baby.step) + switch / step.input_scale**2)
        peaks.append(np.roll(peaks[baby.parent], -baby.step))
    product_scale = step.input_scale * step.weight_scale
    total = np.zeros_like(variance)
    for number, giant in reversed(list(enumerate(step.giants))):
        if number < len(step.giants) - 1:
            total = np.roll(total, -step.giant_step) + switch / product_scale**2
        for term in giant:
            weights = step.diagonals[term.diagonal] ** 2
            total = total + weights * variances[term.baby] + encoding * (peaks[term.baby] + variances[term.baby])
    for rotation in step.sums:
        total = total + np.roll(total, -rotation) + switch / product_scale**2
    return total


def square_error(model: NoiseModel, step: SquareStep, variance: Array, peak: Array) -> Array:
    """Return the error variance after square, relinearisation and rescale, shape (slots,); see `linear_error`."""
    squared = 4 * peak**2 * variance + 3 * variance**2
    relinearised = squared + model.key_switch(step.level) / step.input_scale**4
    return relinearised + model.rescale / step.output_scale**2


def rescale_error(model: NoiseModel, step: LinearStep) -> float:
    """Return the variance that the rescale of an affine map and its encoded bias add."""
    return (model.rescale + model.encoding) / step.output_scale**2


def logit_deviation(before_rescale: Array, rescaling: float, layout: Layout) -> Array:
    """Return the standard deviation of each logit that is read as the mean over its copies, shape (logits,).

    Copies share the errors from before the rotate-and-sums (they are sums of the same terms), so only the rounding of
    the last rescale averages out.
    """
    shared = before_rescale.reshape(layout.copies, layout.period).max(axis=0)[layout.positions]
    deviation: Array = np.sqrt(shared + rescaling / layout.copies)
    return deviation
