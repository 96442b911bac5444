"""The network after collapse: Linear, Square, Linear, Square, …, Linear — and nothing else.

Values of a layer are numbered channel first: a feature map of shape (C, H, W) has value ``c*H*W + y*W + x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import NetworkError

Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
Shape = tuple[int, int, int]
Entries = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Array]


def _finite(name: str, values: npt.ArrayLike, ndim: int) -> Array:
    array = np.array(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise NetworkError(f"{name} has shape {array.shape}; expected {ndim} non-empty dimensions")
    if not np.isfinite(array).all():
        raise NetworkError(f"{name} holds {np.count_nonzero(~np.isfinite(array))} values that are not finite numbers")
    array.setflags(write=False)
    return array


@dataclass(frozen=True)
class Dense:
    """An affine map given by its matrix.

    Parameters
    ----------
    weight:
        Matrix, shape (outputs, inputs).
    bias:
        Shape (outputs,).

    Raises
    ------
    NetworkError
        If shapes disagree, a dimension is empty or a value is not finite.
    """

    weight: Array
    bias: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _finite("dense weight", self.weight, 2))
        object.__setattr__(self, "bias", _finite("dense bias", self.bias, 1))
        if self.weight.shape[0] != self.bias.shape[0]:
            raise NetworkError(f"dense layer has {self.weight.shape[0]} rows but {self.bias.shape[0]} biases")

    @property
    def inputs(self) -> int:
        """Number of values the layer reads."""
        return int(self.weight.shape[1])

    @property
    def outputs(self) -> int:
        """Number of values the layer writes."""
        return int(self.weight.shape[0])

    def entries(self) -> Entries:
        """Return the entries of the map's matrix that are not zero: (rows, columns, values)."""
        rows, columns = np.nonzero(self.weight)
        return rows, columns, self.weight[rows, columns]

    def offset(self) -> Array:
        """Return the constant part, shape (outputs,)."""
        return self.bias

    def __call__(self, x: Array) -> Array:
        """Apply the map to a batch, shape (batch, inputs) -> (batch, outputs)."""
        return x @ self.weight.T + self.bias

    def describe(self) -> str:
        """Say in a few words what the layer is."""
        return f"dense {self.inputs}→{self.outputs}"


@dataclass(frozen=True)
class Convolution:
    """A strided, zero-padded two-dimensional convolution (cross-correlation, as in Keras).

    Parameters
    ----------
    kernel:
        Shape (out channels, in channels, height, width).
    bias:
        Shape (out channels,), or (out channels, out height, out width) where it depends on the position: constants that
        were padded with zeros are missing at the border.
    input_shape:
        (channels, height, width) of the feature map it reads.
    stride:
        Step in both directions, at least 1.
    padding:
        Zeros before (top, left) and after (bottom, right) the map: ((top, bottom), (left, right)).

    Raises
    ------
    NetworkError
        If shapes disagree, nothing is left of the map, or a value is not finite.
    """

    kernel: Array
    bias: Array
    input_shape: Shape
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", _finite("convolution kernel", self.kernel, 4))
        object.__setattr__(self, "bias", _finite("convolution bias", self.bias, 3 if np.ndim(self.bias) == 3 else 1))
        if self.kernel.shape[0] != self.bias.shape[0]:
            raise NetworkError(f"convolution has {self.kernel.shape[0]} filters but {self.bias.shape[0]} biases")
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise NetworkError(f"convolution input shape is {self.input_shape}; expected (channels, height, width)")
        if self.kernel.shape[1] != self.input_shape[0]:
            raise NetworkError(
                f"convolution reads {self.kernel.shape[1]} channels but its input has {self.input_shape[0]}"
            )
        if self.stride < 1 or min(min(pair) for pair in self.padding) < 0:
            raise NetworkError(f"stride {self.stride}, padding {self.padding}: expected stride ≥ 1 and padding ≥ 0")
        if min(self.output_shape) < 1:
            raise NetworkError(f"convolution leaves an empty map of shape {self.output_shape}; use a smaller kernel")
        if self.bias.ndim == 3 and self.bias.shape != self.output_shape:
            raise NetworkError(f"convolution has biases of shape {self.bias.shape} for a map of {self.output_shape}")

    @property
    def output_shape(self) -> Shape:
        """(channels, height, width) of the feature map it writes."""
        (top, bottom), (left, right) = self.padding
        height = (self.input_shape[1] + top + bottom - self.kernel.shape[2]) // self.stride + 1
        width = (self.input_shape[2] + left + right - self.kernel.shape[3]) // self.stride + 1
        return int(self.kernel.shape[0]), height, width

    @property
    def inputs(self) -> int:
        """Number of values the layer reads."""
        return prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """Number of values the layer writes."""
        return prod(self.output_shape)

    def entries(self) -> Entries:
        """Return the entries of the map's matrix that are not zero: (rows, columns, values).

        The matrix is the Toeplitz form of the convolution, shape (outputs, inputs).
        """
        channels, height, width = self.output_shape
        into, map_height, map_width = self.input_shape
        (top, _), (left, _) = self.padding
        o, c, i, j, y, x = np.ogrid[:channels, :into, : self.kernel.shape[2], : self.kernel.shape[3], :height, :width]
        row, column = y * self.stride + i - top, x * self.stride + j - left
        value = self.kernel[:, :, :, :, None, None]
        inside = (row >= 0) & (row < map_height) & (column >= 0) & (column < map_width) & (value != 0)
        outputs = np.broadcast_to((o * height + y) * width + x, inside.shape)
        inputs = np.broadcast_to((c * map_height + row) * map_width + column, inside.shape)
        return outputs[inside], inputs[inside], np.broadcast_to(value, inside.shape)[inside]

    def offset(self) -> Array:
        """Return the constant part, shape (outputs,)."""
        if self.bias.ndim == 3:
            return self.bias.ravel()
        _, height, width = self.output_shape
        return np.repeat(self.bias, height * width)

    def __call__(self, x: Array) -> Array:
        """Apply the map to a batch, shape (batch, inputs) -> (batch, outputs)."""
        channels, height, width = self.output_shape
        maps = np.pad(x.reshape(-1, *self.input_shape), ((0, 0), (0, 0), *self.padding))
        out = np.zeros((len(maps), channels, height, width))
        for i in range(self.kernel.shape[2]):
            for j in range(self.kernel.shape[3]):
                window = maps[
                    :, :, i : i + self.stride * height : self.stride, j : j + self.stride * width : self.stride
                ]
                out += np.einsum("oc,bchw->bohw", self.kernel[:, :, i, j], window, optimize=True)
        return out.reshape(len(maps), -1) + self.offset()

    def describe(self) -> str:
        """Say in a few words what the layer is."""
        out, into, height, width = self.kernel.shape
        return f"conv {height}×{width}/{self.stride} {into}→{out}"


Linear = Dense | Convolution


@dataclass(frozen=True)
class CollapsedNetwork:
    """Affine maps with a square between each two of them.

    Parameters
    ----------
    input_shape:
        (channels, height, width) of a preprocessed image.
    input_range:
        Smallest and largest value that preprocessing can produce; worst-case bounds start from it.
    linears:
        The affine maps in order. Squares stand between them, none before the first, none after the last.
    magnitudes:
        For each affine map the largest absolute value of every output seen on calibration (training) data, shape
        (outputs,) each; None when nothing was measured, then worst-case bounds take their place.

    Raises
    ------
    NetworkError
        If there is no layer, neighbouring layers do not fit, or magnitudes do not match the layers.
    """

    input_shape: Shape
    linears: tuple[Linear, ...]
    input_range: tuple[float, float] = (0.0, 1.0)
    magnitudes: tuple[Array, ...] | None = None

    def __post_init__(self) -> None:
        smallest, largest = self.input_range
        if not -np.inf < smallest <= largest < np.inf:
            raise NetworkError(f"input range is {self.input_range}; expected two finite numbers in ascending order")
        if not self.linears:
            raise NetworkError("the network has no affine map; expected at least one dense or convolution layer")
        width = prod(self.input_shape)
        for index, layer in enumerate(self.linears):
            if layer.inputs != width:
                raise NetworkError(f"layer {index} ({layer.describe()}) reads {layer.inputs} values but gets {width}")
            width = layer.outputs
        if self.magnitudes is not None:
            measured = tuple(_finite(f"magnitudes of layer {i}", m, 1) for i, m in enumerate(self.magnitudes))
            if [m.size for m in measured] != [layer.outputs for layer in self.linears]:
                raise NetworkError(
                    f"magnitudes have sizes {[m.size for m in measured]}; "
                    f"expected one per output: {[layer.outputs for layer in self.linears]}"
                )
            object.__setattr__(self, "magnitudes", measured)

    @property
    def squares(self) -> int:
        """Number of square activations."""
        return len(self.linears) - 1

    @property
    def inputs(self) -> int:
        """Number of values of one preprocessed image."""
        return prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return self.linears[-1].outputs

    def trace(self, x: npt.ArrayLike) -> list[Array]:
        """Return what every affine map writes, in float64.

        Parameters
        ----------
        x:
            Batch of preprocessed images, shape (batch, channels, height, width) or (batch, inputs).

        Returns
        -------
        list of arrays
            One per affine map, shape (batch, outputs); the last one holds the logits.
        """
        value = np.asarray(x, dtype=np.float64).reshape(-1, self.inputs)
        written: list[Array] = []
        for index, layer in enumerate(self.linears):
            value = layer(value if index == 0 else value * value)
            written.append(value)
        return written

    def __call__(self, x: npt.ArrayLike) -> Array:
        """Return the logits of a batch, shape (batch, logits), in float64."""
        return self.trace(x)[-1]

    def calibrated(self, x: npt.ArrayLike) -> CollapsedNetwork:
        """Return the same network with magnitudes measured on a batch of training images."""
        peaks = tuple(np.abs(written).max(axis=0) for written in self.trace(x))
        return CollapsedNetwork(self.input_shape, self.linears, self.input_range, peaks)

    @cached_property
    def worst_case(self) -> tuple[Array, ...]:
        """Bounds that no input in ``input_range`` exceeds, by interval arithmetic; shape (outputs,) per map."""
        # A bound beyond float64 is infinite or no number; the planner refuses both.
        with np.errstate(over="ignore", invalid="ignore"):
            return self._intervals()

    def _intervals(self) -> tuple[Array, ...]:
        low = np.full(self.inputs, self.input_range[0])
        high = np.full(self.inputs, self.input_range[1])
        bounds: list[Array] = []
        for index, layer in enumerate(self.linears):
            if index:
                straddles = (low < 0) & (high > 0)
                smallest = np.where(straddles, 0.0, np.minimum(low**2, high**2))
                low, high = smallest, np.maximum(low**2, high**2)
            rows, columns, values = layer.entries()
            centre, radius = (low + high) / 2, (high - low) / 2
            middle = layer.offset() + np.bincount(rows, values * centre[columns], layer.outputs)
            spread = np.bincount(rows, np.abs(values) * radius[columns], layer.outputs)
            low, high = middle - spread, middle + spread
            bounds.append(np.maximum(np.abs(low), np.abs(high)))
        return tuple(bounds)

    @property
    def peaks(self) -> Sequence[Array]:
        """The magnitudes to plan with: the measured ones where there are any, else the worst case."""
        return self.worst_case if self.magnitudes is None else self.magnitudes
