"""Fold the layers of a network, one by one, into affine maps with squares between them.

Whatever reads a network (Keras, ONNX, CryptoNets' files) translates its layers into the few steps of `Fold`; that they
fold exactly is argued here, once. All values are channel first, all arithmetic is in float64.

Neighbouring affine maps merge. A convolution stays one as long as that is exact: mean pooling, factors and constants
per channel, and a convolution that needs no padding fold onto it; a padded convolution folds onto factors and constants
per channel, and then its bias depends on the position (at the border, constants are padded with zeros like all else).
A padded convolution does not fold onto a larger one (padding cuts what the composed kernel would still see); then, and
with dense layers, the segment becomes a matrix.

Source: Gilad-Bachrach et al., CryptoNets (2016), section 5.2, "collapsing adjacent linear layers"; the paper on ALL,
section III.B.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import NetworkError
from hemacrypt.model.network import Array, Convolution, Dense, Linear, Shape

Padding = tuple[tuple[int, int], tuple[int, int]]
NO_PADDING: Padding = ((0, 0), (0, 0))
# 1 GiB of float64: a matrix larger than this is no layer of the family, and would exhaust memory.
_LARGEST_MATRIX = 1 << 27
# Far beyond what any plan carries.
_MOST_VALUES = 1 << 22
# A vertex of a x² + b x + c further from zero than this is not shifted to: x would drown in the constant beside it.
_FARTHEST_VERTEX = 64.0


class Fold:
    """The fold so far: finished segments, and the open one as a list of maps that could not merge.

    Every method takes the name of the layer, for messages.

    Parameters
    ----------
    shape:
        (channels, height, width) of what the network reads.
    """

    def __init__(self, shape: Shape) -> None:
        self.map_shape: Shape | None = shape  # None once the values are a plain vector
        self.flat = False
        self._width = prod(shape)
        self._finished: list[Linear] = []
        self._segment: list[Linear] = []

    @property
    def channels(self) -> int:
        """How many values a factor or constant per channel has: channels of the map, or values of the vector."""
        return self.map_shape[0] if self.map_shape is not None else self._width

    @property
    def values(self) -> int:
        """Number of values between the last layer and the next."""
        return self._width

    def convolution(
        self, name: str, kernel: npt.ArrayLike, bias: npt.ArrayLike, stride: int = 1, padding: Padding = NO_PADDING
    ) -> None:
        """Add a convolution; see `Convolution` for the shapes.

        Raises
        ------
        NetworkError
            If there is no feature map (any more), shapes do not fit, or windows would lie in the padding alone.
        """
        shape = self._open_map(name)
        with _naming(name):
            layer = Convolution(np.asarray(kernel), np.asarray(bias), shape, stride, padding)
        if any(max(zeros) >= side for zeros, side in zip(padding, layer.kernel.shape[2:], strict=True)):
            raise NetworkError(f"{name!r} pads {padding}, more than its kernel {layer.kernel.shape[2:]} reaches")
        self._append(layer)

    def mean_pooling(self, name: str, window: tuple[int, int], stride: int, padding: Padding = NO_PADDING) -> None:
        """Add the mean of every window; zeros of the padding count like values.

        Raises
        ------
        NetworkError
            If there is no feature map, or the window is larger than it.
        """
        shape = self._open_map(name)
        _check_room(name, shape[0] ** 2 * prod(window))
        mean = np.broadcast_to(np.eye(shape[0])[:, :, None, None], (shape[0], shape[0], *window))
        self.convolution(name, mean / prod(window), np.zeros(shape[0]), stride, padding)

    def scale_and_shift(self, name: str, scale: npt.ArrayLike, shift: npt.ArrayLike) -> None:
        """Add a factor and a constant per channel (batch normalisation), or per value of a vector.

        Parameters
        ----------
        scale, shift:
            One number, or shape (channels,).

        Raises
        ------
        NetworkError
            If their sizes do not fit.
        """
        _check_room(name, self.channels**2)
        factors = self._per_channel(name, scale)
        self._mix(name, np.diag(factors), self._per_channel(name, shift))

    def flatten(self) -> None:
        """Read the feature map as a vector from here on, channel first."""
        self.flat = True

    def dense(self, name: str, weight: npt.ArrayLike, bias: npt.ArrayLike) -> None:
        """Add a dense layer.

        Parameters
        ----------
        weight:
            Shape (outputs, inputs); inputs of a flattened map are channel first.
        bias:
            Shape (outputs,).

        Raises
        ------
        NetworkError
            If a feature map was not flattened, or shapes do not fit.
        """
        if self.map_shape is not None and not self.flat:
            raise NetworkError(f"{name!r} reads a feature map; put Flatten before it")
        with _naming(name):
            layer = Dense(np.asarray(weight), np.asarray(bias))
        if layer.inputs != self._width:
            raise NetworkError(f"{name!r} reads {layer.inputs} values but gets {self._width}")
        self.map_shape = None
        self._append(layer)

    def square(self, name: str) -> None:
        """Add a square and close the segment before it.

        Raises
        ------
        NetworkError
            If nothing linear stands before it.
        """
        if not self._segment:
            raise NetworkError(
                f"nothing linear stands before {name!r}; put a convolution or dense layer before every Square"
            )
        self._finished.append(_multiplied(name, self._segment))
        self._segment = []

    def quadratic(self, name: str, a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> None:
        """Add the activation a x² + b x + c, each a number or one per channel, as a square between two affine maps.

        The square is completed: a (x + b/2a)² + (c − b²/4a). Where a is zero, or so small beside b that the vertex lies
        far away, the channel is doubled instead: with x² = ((x+1)² + (x−1)²)/2 − 1 and x = ((x+1)² − (x−1)²)/4,

            a x² + b x + c = (a/2 + b/4) (x+1)² + (a/2 − b/4) (x−1)² + c − a.

        Both are exact. A channel with a = b = 0 is constant: nothing of it is squared.

        Raises
        ------
        NetworkError
            If sizes do not fit, a number is not finite, or every channel is constant.
        """
        _check_room(name, self.channels**2)
        a, b, c = (self._per_channel(name, numbers) for numbers in (a, b, c))
        doubled = np.abs(b) > 2 * _FARTHEST_VERTEX * np.abs(a)
        single = ~doubled & (a != 0)
        if not (doubled | single).any():
            raise NetworkError(f"{name!r} makes every channel a constant (a = b = 0); expected x² somewhere")
        vertex = np.divide(b, 2 * a, out=np.zeros_like(a), where=single)
        one, two = np.flatnonzero(single), np.flatnonzero(doubled)
        reads = np.concatenate([one, two, two])
        shift = np.concatenate([vertex[one], np.ones(two.size), -np.ones(two.size)])
        factor = np.concatenate([a[one], a[two] / 2 + b[two] / 4, a[two] / 2 - b[two] / 4])
        order = np.argsort(reads, kind="stable")
        chosen = np.eye(self.channels)[reads[order]]
        self._mix(name, chosen, shift[order])
        self.square(name)
        self._mix(name, chosen.T * factor[order], c - np.where(doubled, a, a * vertex**2))

    def finish(self) -> tuple[Linear, ...]:
        """Close the last segment and return the affine maps.

        Raises
        ------
        NetworkError
            If the last layer is a square, or there is none.
        """
        if not self._segment:
            raise NetworkError("the model ends in a Square layer; expected a dense layer that gives the logits")
        return (*self._finished, _multiplied("the last layers", self._segment))

    def _open_map(self, name: str) -> Shape:
        if self.map_shape is None or self.flat:
            raise NetworkError(f"{name!r} needs a feature map; put it before Flatten")
        return self.map_shape

    def _per_channel(self, name: str, numbers: npt.ArrayLike) -> Array:
        array = np.asarray(numbers, dtype=np.float64)
        if not np.isfinite(array).all():
            raise NetworkError(f"{name!r} holds numbers that are not finite")
        if self.flat and self.map_shape is not None and array.shape == (self._width,):
            places = array.reshape(self.map_shape[0], -1)
            if (places != places[:, :1]).any():
                raise NetworkError(f"{name!r} stands between Flatten and Dense; put it before Flatten")
            array = places[:, 0]
        if array.shape not in ((), (1,), (self.channels,)):
            raise NetworkError(f"{name!r} has {array.shape} numbers; expected one for each of {self.channels} channels")
        return np.array(np.broadcast_to(array.reshape(-1), self.channels))

    def _mix(self, name: str, matrix: Array, constant: Array) -> None:
        """Add a map of the channels, the same at every place."""
        _check_room(name, matrix.size)
        with _naming(name):
            if self.map_shape is None:
                self._append(Dense(matrix, constant))
            else:
                self._append(Convolution(matrix[:, :, None, None], constant, self.map_shape))

    def _append(self, new: Linear) -> None:
        if new.outputs > _MOST_VALUES:
            raise NetworkError(f"{new.describe()} writes {new.outputs:,} values; at most {_MOST_VALUES:,} are folded")
        merged = _merge(self._segment[-1], new) if self._segment else None
        if merged is None:
            self._segment.append(new)
        else:
            self._segment[-1] = merged
        if isinstance(new, Convolution):
            self.map_shape = new.output_shape
        self._width = new.outputs


def same_padding(shape: Shape, window: tuple[int, int], stride: int) -> Padding:
    """Return the zeros that make a map of ceil(size / stride); of an odd number the end gets one more.

    Source: TensorFlow's and Keras' padding 'same', ONNX's SAME_UPPER.
    """

    def sides(size: int, width: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + width - size, 0)
        return total // 2, total - total // 2

    return sides(shape[1], window[0]), sides(shape[2], window[1])


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"{name!r}: {error}") from error


def _check_room(name: str, entries: int) -> None:
    if entries > _LARGEST_MATRIX:
        raise NetworkError(
            f"{name!r} needs a matrix of {entries:,} entries; at most {_LARGEST_MATRIX:,} are folded: "
            "use fewer channels, a larger stride, or convolutions without padding"
        )


def _merge(first: Linear, second: Linear) -> Linear | None:
    """Return ``second`` after ``first`` as one layer of the same kind, or None where there is none."""
    if isinstance(first, Dense) and isinstance(second, Dense):
        return Dense(second.weight @ first.weight, second.weight @ first.bias + second.bias)
    if not (isinstance(first, Convolution) and isinstance(second, Convolution)):
        return None
    if second.padding != NO_PADDING and not _tiles(first):
        return None
    rows, columns = first.kernel.shape[2:]
    step = first.stride
    high, wide = second.kernel.shape[2:]
    kernel = np.zeros(
        (len(second.kernel), first.kernel.shape[1], rows + (high - 1) * step, columns + (wide - 1) * step)
    )
    for i in range(high):
        for j in range(wide):
            window = np.s_[:, :, i * step : i * step + rows, j * step : j * step + columns]
            kernel[window] += np.tensordot(second.kernel[:, :, i, j], first.kernel, axes=1)
    # At most one of the two pads: where the second does, the first has nothing that reaches beyond the map.
    padding = first.padding
    if second.padding != NO_PADDING:
        (top, bottom), (left, right) = second.padding
        padding = (top * step, bottom * step), (left * step, right * step)
    return Convolution(kernel, _merged_bias(first, second), first.input_shape, step * second.stride, padding)


def _tiles(layer: Convolution) -> bool:
    """Say whether windows lie side by side and cover the map, as those of a pooling or of a mix of channels.

    A zero that is added behind such a layer is then what the layer makes of a window of zeros in front of it.
    """
    sides, step = layer.kernel.shape[2:], layer.stride
    whole = all(count * step == size for count, size in zip(layer.output_shape[1:], layer.input_shape[1:], strict=True))
    return max(sides) <= step and whole and layer.padding == NO_PADDING


def _merged_bias(first: Convolution, second: Convolution) -> Array:
    """Return what ``second`` makes of the constants of ``first``: one number a channel where all places agree."""
    if second.padding == NO_PADDING and first.bias.ndim == second.bias.ndim == 1:
        return np.asarray(second.kernel.sum(axis=(2, 3)) @ first.bias + second.bias)
    places = second(first.offset()[None]).reshape(second.output_shape)
    return places[:, 0, 0] if (places == places[:, :1, :1]).all() else places


def _multiplied(name: str, segment: list[Linear]) -> Linear:
    """Return a segment as one layer; a lone convolution stays what it is."""
    if len(segment) == 1:
        return segment[0]
    # From the last map to the first: the product keeps as few rows as the segment has outputs.
    last = segment[-1]
    _check_room(name, last.outputs * max(layer.inputs for layer in segment))
    after = Dense(_matrix(last), last.offset())
    for layer in reversed(segment[:-1]):
        bias = after.weight @ layer.offset() + after.bias
        weight = after.weight @ layer.weight if isinstance(layer, Dense) else _pulled_back(after.weight, layer)
        after = Dense(weight, bias)
    return after


def _matrix(layer: Linear) -> Array:
    """Return the matrix of a map, shape (outputs, inputs)."""
    if isinstance(layer, Dense):
        return layer.weight
    matrix = np.zeros((layer.outputs, layer.inputs))
    rows, columns, values = layer.entries()
    matrix[rows, columns] = values
    return matrix


def _pulled_back(weight: Array, layer: Convolution) -> Array:
    """Return ``weight`` times the matrix of a convolution, which is never written out.

    Parameters
    ----------
    weight:
        Shape (rows, outputs of the convolution).

    Returns
    -------
    array of shape (rows, inputs of the convolution)
    """
    channels, high, wide = layer.output_shape
    into, height, width = layer.input_shape
    (top, bottom), (left, right) = layer.padding
    step = layer.stride
    maps = weight.reshape(-1, channels, high, wide)
    pulled = np.zeros((len(maps), into, height + top + bottom, width + left + right))
    for i in range(layer.kernel.shape[2]):
        for j in range(layer.kernel.shape[3]):
            window = np.s_[:, :, i : i + step * high : step, j : j + step * wide : step]
            pulled[window] += np.einsum("rohw,oc->rchw", maps, layer.kernel[:, :, i, j], optimize=True)
    return pulled[:, :, top : top + height, left : left + width].reshape(len(maps), -1)
