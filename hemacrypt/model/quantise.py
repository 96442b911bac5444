"""The network over integers: what BFV evaluates exactly, and what a decrypted answer must equal.

Inputs, weights and biases are multiplied by scales and rounded. A layer's outputs then stand for themselves times the
product of all scales before them, a square's for the square of that: S_1 = s_in s_1, S_2 = S_1^2 s_2, … The first
scales count most bits, because every square doubles them.

*Choice of scales.* With v_j the variance that a logit gets from rounding to a grid of 1 (times 1 / s_j^2 on a grid of
1 / s_j) and e_j = 2^(squares after it) the bits of a logit that one bit of s_j costs, sum(e_j log2 s_j) is smallest for
a given sum(v_j / s_j^2) = target^2 where each part of the variance is proportional to e_j (Lagrange). The v_j are
propagated as in `hemacrypt.planner.noise`.

*Rounding.* Inputs of a layer are images or squares: not negative, and neighbours are alike. So weights are rounded such
that the rounding errors of neighbours cancel: running sums are rounded and their differences taken, as sigma-delta
converters do (Inose, Yasuda and Murakami, "A telemetering system by code modulation", 1962). A weight is off by up to
1 instead of 1/2, but a sum of any run of weights by no more than 1. Of a convolution over images more is known: pixels
are alike the more, the closer they are. Weights are rounded one after another there, and what one is off by is passed
on to the others in proportion to how far they stand in for it (Babai's nearest plane; Frantar et al., "GPTQ", 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import NetworkError
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear

# int64 where every value fits, Python integers in an array of objects where not.
Exact = npt.NDArray[Any]

# Standard deviation of a typical logit by rounding weights that scales are chosen for, as a part of a typical logit. A
# model of independent errors and of values at a quarter of their peaks: up to three times as much was measured.
PRECISION: Final = 2.0**-7
# Peaks are extremes over all images; a value of an ordinary image is about a quarter of its peak.
_TYPICAL: Final = 1 / 4
# Steps that inputs have between zero and their largest absolute value: those of an 8-bit pixel.
INPUT_STEPS: Final = 255
# Pixels of an image: how far apart they must be to differ, and how far colours go together; and the largest kernel that
# is rounded with these in mind. Second moments of photographs are about so; nothing but the precision depends on it.
_PIXELS_ALIKE: Final = 3.0
_COLOURS_ALIKE: Final = 0.8
_LARGEST_KERNEL: Final = 1024
# Scales have so many significant bits, so that a last digit that differs between machines changes no plan.
_SCALE_BITS: Final = 5
# float64 adds integers without error below this.
_EXACT: Final = 1 << 53
# Largest absolute row sum of a layer's integer weights, and largest scale; some bits are left for the values.
_LARGEST_GAIN: Final = 1 << 46


@dataclass(frozen=True, eq=False)
class QuantisedNetwork:
    """A network over the integers; see `quantise` and `at_scales`.

    Attributes
    ----------
    original:
        The network that was quantised.
    input_scale:
        Value v of an image becomes the integer nearest to ``v * input_scale``.
    weight_scales:
        What each layer's weights were multiplied by.
    layers:
        The affine maps with integer weights (as float64) and no bias.
    biases:
        Constant part of each layer: Python integers, shape (outputs,).
    """

    original: CollapsedNetwork
    input_scale: float
    weight_scales: tuple[float, ...]
    layers: tuple[Linear, ...]
    biases: tuple[Exact, ...]

    @property
    def scales(self) -> tuple[float, ...]:
        """What the outputs of each affine map are multiplied by."""
        return output_scales(self.input_scale, self.weight_scales)

    @property
    def output_scale(self) -> float:
        """An integer logit n stands for ``n / output_scale``."""
        return self.scales[-1]

    @cached_property
    def network(self) -> CollapsedNetwork:
        """The integer weights without biases as a network: for planners, which look at what is not zero."""
        return CollapsedNetwork(self.original.input_shape, self.layers, self.original.input_range)

    def input_integers(self, x: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the integers that stand for images, shape (batch, inputs).

        Parameters
        ----------
        x:
            Preprocessed images, shape (batch, channels, height, width) or (batch, inputs).

        Raises
        ------
        NetworkError
            If a value lies outside the network's input range, where no bound holds.
        """
        scaled = np.rint(np.asarray(x, dtype=np.float64).reshape(-1, self.original.inputs) * self.input_scale)
        low, high = self.input_bounds
        if not ((scaled >= low) & (scaled <= high)).all():
            raise NetworkError(
                f"the images hold values outside {self.original.input_range}, the range that the bounds were made for; "
                "preprocess them as the bundle says"
            )
        return scaled.astype(np.int64)

    def trace(self, x: npt.ArrayLike) -> list[Exact]:
        """Return what every affine map writes, exactly; see `hemacrypt.model.network.CollapsedNetwork.trace`.

        Returns
        -------
        list of arrays
            One per affine map, shape (batch, outputs): int64 where that holds them, else Python integers.
        """
        value: Exact = self.input_integers(x)
        written: list[Exact] = []
        for number, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            value = _affine(layer, _squared(value) if number else value, bias)
            written.append(value)
        return written

    def integers(self, x: npt.ArrayLike) -> Exact:
        """Return the exact integer logits, shape (batch, logits); int64, or Python integers where they need it."""
        return self.trace(x)[-1]

    def __call__(self, x: npt.ArrayLike) -> Array:
        """Return the logits in the network's units, float64, shape (batch, logits)."""
        logits: Array = np.asarray(self.integers(x), dtype=np.float64) / self.output_scale
        return logits

    @cached_property
    def worst_case(self) -> tuple[Exact, ...]:
        """Bounds that no input in range exceeds, by interval arithmetic over the integers; shape (outputs,) per map."""
        low, high = (np.full(self.original.inputs, bound) for bound in self.input_bounds)
        bounds: list[Exact] = []
        for number, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            if number:
                low, high = _squared_interval(low, high)
            # Twice the middle and twice the radius, so that everything stays an integer.
            middle = _affine(layer, (low + high)[None], 2 * bias)[0]
            radius = _affine(_mapped(layer, np.abs), (high - low)[None], 0 * bias)[0]
            low, high = (middle - radius) // 2, (middle + radius) // 2
            bounds.append(np.maximum(np.abs(low), np.abs(high)))
        return tuple(bounds)

    @property
    def largest(self) -> tuple[int, ...]:
        """Largest absolute integer after each step (map, square, map, …) for any input in range."""
        return _with_squares(int(bound.max()) for bound in self.worst_case)

    @property
    def measured(self) -> tuple[int, ...] | None:
        """The same for calibration data, from the network's measured magnitudes; None when nothing was measured."""
        if self.original.magnitudes is None:
            return None
        peaks = (float(peak.max()) for peak in self.original.magnitudes)
        return _with_squares(max(math.ceil(peak * scale), 1) for peak, scale in zip(peaks, self.scales, strict=True))

    @property
    def deviation(self) -> float:
        """Predicted standard deviation of the worst logit, in the network's units, where every value is at its peak.

        An ordinary image is far from that, and is off by far less.
        """
        shares = rounding_variances(self.original, 1.0)
        scales = (self.input_scale, *self.weight_scales)
        return math.sqrt(sum(share / scale**2 for share, scale in zip(shares, scales, strict=True)))

    @property
    def input_bounds(self) -> tuple[int, int]:
        """Smallest and largest integer that a value in the network's input range becomes."""
        low, high = self.original.input_range
        return round(low * self.input_scale), round(high * self.input_scale)


def quantise(
    network: CollapsedNetwork, precision: float = PRECISION, input_scale: float | None = None
) -> QuantisedNetwork:
    """Turn a network into integers with as few bits as a precision needs.

    Parameters
    ----------
    network:
        The network; its measured magnitudes say how large values are, or its worst case where nothing was measured.
    precision:
        Standard deviation of a typical logit that rounding the weights may cause, as a part of a typical logit. The
        default changes fewer labels than one in a hundred (docs/parameters.md has the measurement).
    input_scale:
        What inputs are multiplied by; by default such that they have 255 steps up to the largest absolute value of the
        input range, which is exact for 8-bit pixels times 1/255.

    Raises
    ------
    NetworkError
        If values or integers grow beyond all reason.
    """
    if not 0 < precision < math.inf or not (input_scale is None or 0 < input_scale < math.inf):
        raise NetworkError(f"precision {precision:g} with input scale {input_scale}; expected positive numbers")
    if not all(np.isfinite(peak).all() for peak in network.peaks):
        raise NetworkError(
            f"values reach infinity after {network.squares} squares; use fewer squares, "
            "or train with smaller activations"
        )
    reach = max(abs(bound) for bound in network.input_range)
    scale = input_scale or INPUT_STEPS / (reach or 1.0)
    shares = rounding_variances(network, _TYPICAL)[1:]
    target = precision * _TYPICAL * max(float(network.peaks[-1].max()), 2.0**-100)
    costs = [2 ** (network.squares - number) for number in range(len(network.linears))]
    found: list[float] = []
    for layer, share, cost in zip(network.linears, shares, costs, strict=True):
        largest = float(np.abs(_weights(layer)).max())
        # Where rounding hardly matters, keep two bits of the largest weight all the same.
        least = 4 / largest if largest else 1.0
        found.append(_rounded_up(max(math.sqrt(share * sum(costs) / cost) / target, least)))
    return at_scales(network, scale, found)


def at_scales(network: CollapsedNetwork, input_scale: float, weight_scales: Sequence[float]) -> QuantisedNetwork:
    """Turn a network into integers at scales that are given.

    Raises
    ------
    NetworkError
        If an integer would not be finite, or weights would be integers beyond all reason.
    """
    if len(weight_scales) != len(network.linears):
        raise NetworkError(f"{len(weight_scales)} weight scales for {len(network.linears)} layers; expected one each")
    scales = output_scales(input_scale, weight_scales)
    if not math.isfinite(scales[-1]):
        raise NetworkError(f"{network.squares} squares make integers of over 1000 bits; use fewer squares")
    layers: list[Linear] = []
    biases: list[Exact] = []
    for number, (layer, scale, total) in enumerate(zip(network.linears, weight_scales, scales, strict=True)):
        rows = _weights(layer).reshape(len(_weights(layer)), -1)
        reach = float(np.abs(rows).sum(axis=1).max()) * scale + rows.shape[1]
        constant = layer.offset() * total
        if not reach < _LARGEST_GAIN or not np.isfinite(constant).all():
            raise NetworkError(
                f"{layer.describe()}: at scale {scale:.3g} its weights become integers whose sums reach {reach:.3g}; "
                "ask for less precision, or prune weights that are far larger than all others"
            )
        over_images = number == 0 and isinstance(layer, Convolution) and rows.shape[1] <= _LARGEST_KERNEL
        layers.append(_mapped(layer, partial(_rounded_for_images if over_images else _rounded_in_runs, scale=scale)))
        biases.append(np.array([round(value) for value in constant.tolist()], dtype=object))
    return QuantisedNetwork(network, input_scale, tuple(weight_scales), tuple(layers), tuple(biases))


def output_scales(input_scale: float, weight_scales: Sequence[float]) -> tuple[float, ...]:
    """Return what the outputs of each affine map are multiplied by; infinite beyond float64."""
    found: list[float] = []
    for number, scale in enumerate(weight_scales):
        # A product beyond float64 is infinite; a power would raise.
        found.append((found[-1] * found[-1] if number else input_scale) * scale)
    return tuple(found)


def rounding_variances(network: CollapsedNetwork, typical: float) -> list[float]:
    """Return the variance of the worst logit by rounding inputs, then each layer's weights, to integers at scale 1.

    Parameters
    ----------
    network:
        The network.
    typical:
        Size of the values, as a part of the network's peaks.
    """
    reach = typical * max(abs(bound) for bound in network.input_range)
    values = [np.full(network.inputs, reach), *((typical * peak) ** 2 for peak in network.peaks[:-1])]
    found: list[float] = []
    for source in range(len(network.linears) + 1):
        variance = np.full(network.inputs, 1 / 12 if source == 0 else 0.0)
        for number, layer in enumerate(network.linears):
            if number:
                variance = 4 * values[number] * variance
            variance = _mapped(layer, np.square)(variance[None])[0]
            if source == number + 1:
                variance = variance + _mapped(layer, _nonzero)(values[number][None] ** 2)[0] / 12
        found.append(float(variance.max()))
    return found


def _nonzero(weights: Array) -> Array:
    found: Array = (weights != 0).astype(np.float64)
    return found


def _rounded_up(scale: float) -> float:
    digit: float = 2.0 ** (math.floor(math.log2(scale)) + 1 - _SCALE_BITS)
    return math.ceil(scale / digit * (1 - 2.0**-40)) * digit


def _rounded_in_runs(weights: Array, scale: float) -> Array:
    """Round scaled weights so that the errors of neighbours cancel; what is zero stays zero."""
    rows = scale * weights.reshape(len(weights), -1)
    rounded: Array = np.diff(np.rint(np.cumsum(rows, axis=1)), axis=1, prepend=0.0)
    return rounded.reshape(weights.shape)


def _rounded_for_images(kernel: Array, scale: float) -> Array:
    """Round a scaled kernel, shape (outputs, channels, height, width), for smooth input; what is zero stays zero."""
    rest = scale * kernel.reshape(len(kernel), -1)
    zero, rounded = rest == 0, np.zeros_like(rest)
    # With M the second moments of a patch, M^-1 = U^T U: the error of a weight is made good by those that follow it.
    factor = np.linalg.cholesky(np.linalg.inv(_patch_moments(kernel.shape[1:]))).T
    for number in range(rest.shape[1]):
        rounded[:, number] = np.where(zero[:, number], 0.0, np.rint(rest[:, number]))
        error = (rest[:, number] - rounded[:, number]) / factor[number, number]
        rest[:, number + 1 :] -= error[:, None] * factor[number, number + 1 :]
    return rounded.reshape(kernel.shape)


def _patch_moments(shape: tuple[int, ...]) -> Array:
    """Return E[x_i x_j] of the pixels of a patch, up to a factor: mean and variance alike, correlation by distance."""
    channel, row, column = (axis.ravel() for axis in np.indices(shape))
    distance = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    colours = np.where(channel[:, None] == channel, 1.0, _COLOURS_ALIKE)
    moments: Array = 1 + colours * np.exp(-distance / _PIXELS_ALIKE)
    return moments


def _weights(layer: Linear) -> Array:
    return layer.weight if isinstance(layer, Dense) else layer.kernel


def _mapped(layer: Linear, function: Callable[[Array], Array]) -> Linear:
    """Return a layer with a function of the weights, and no bias."""
    weights, bias = function(_weights(layer)), np.zeros_like(layer.bias)
    if isinstance(layer, Dense):
        return replace(layer, weight=weights, bias=bias)
    return replace(layer, kernel=weights, bias=bias)


def _affine(layer: Linear, values: Exact, bias: Exact) -> Exact:
    """Apply integer weights to integers without error, shape (batch, inputs) -> (batch, outputs).

    Values of so few bits that no sum reaches 2^53 go through float64; longer ones piece by piece.
    """
    gain = int(_mapped(layer, np.abs)(np.ones((1, layer.inputs))).max())
    if gain * int(np.abs(values).max()) < _EXACT:
        return _narrowed(layer(values.astype(np.float64)).astype(np.int64).astype(object) + bias)
    bits = 53 - gain.bit_length()
    # Python integers from here on: a sum of pieces may take any number of bits.
    total: Exact = np.zeros((len(values), layer.outputs), dtype=object)
    sign, rest = np.where(values < 0, -1.0, 1.0), np.abs(values).astype(object)
    shift = 0
    while rest.any():
        piece = (rest & ((1 << bits) - 1)).astype(np.float64) * sign
        total = total + (layer(piece).astype(np.int64).astype(object) << shift)
        rest, shift = rest >> bits, shift + bits
    return _narrowed(total + bias)


def _squared(values: Exact) -> Exact:
    large = int(np.abs(values).max()) >= 1 << 31
    wide = values.astype(object) if large else values
    square: Exact = wide * wide
    return square


def _squared_interval(low: Exact, high: Exact) -> tuple[Exact, Exact]:
    lower, upper = _squared(low), _squared(high)
    smallest = np.where((low < 0) & (high > 0), 0, np.minimum(lower, upper))
    return smallest, np.maximum(lower, upper)


def _narrowed(values: Exact) -> Exact:
    """Return int64 where that holds the values with a bit to spare, so that two of them can be added."""
    return values.astype(np.int64) if int(np.abs(values).max()) < 1 << 62 else values


def _with_squares(peaks: Iterable[int]) -> tuple[int, ...]:
    """Put the square of each value but the last behind it."""
    found = [value for peak in peaks for value in (peak, peak * peak)]
    return tuple(found[:-1])
