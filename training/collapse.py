"""Fold a trained Keras model into affine maps with squares between them.

Every layer becomes an affine map in channel-first order; neighbours merge. A convolution stays one as long as that is
exact: mean pooling and batch normalisation after it fold in, and so does a convolution that needs no padding. A padded
convolution does not fold onto another (at the border, padding cuts what the composed kernel would still see); then, and
with dense layers, the segment becomes a matrix. All arithmetic is in float64.

Source: Gilad-Bachrach et al., CryptoNets (2016), section 5.2, "collapsing adjacent linear layers"; the paper on ALL,
section III.B.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from hemacrypt.network import Array, CollapsedNetwork, Convolution, Dense, Linear, Shape
from training.errors import CollapseError
from training.models import Square

Padding = tuple[tuple[int, int], tuple[int, int]]
NO_PADDING: Padding = ((0, 0), (0, 0))


def collapse(model: keras.Sequential, input_range: tuple[float, float] = (0.0, 1.0)) -> CollapsedNetwork:
    """Fold a model of the family into Linear, Square, Linear, …, Linear.

    Parameters
    ----------
    model:
        Sequential of Conv2D, AveragePooling2D, BatchNormalization, Dropout, Flatten, Dense and Square, reading
        (batch, height, width, channels) and ending in a dense layer or convolution.
    input_range:
        Smallest and largest value of a preprocessed image.

    Returns
    -------
    CollapsedNetwork
        Float64, channel first, not calibrated.

    Raises
    ------
    CollapseError
        If a layer, or the order of layers, is not of the family; the message names it and what to use instead.
    """
    if not isinstance(model, keras.Sequential) or len(model.input_shape) != 4 or None in model.input_shape[1:]:
        raise CollapseError(
            f"got {type(model).__name__} with input {getattr(model, 'input_shape', None)}; "
            "expected keras.Sequential on (height, width, channels) of fixed size"
        )
    height, width, channels = model.input_shape[1:]
    fold = _Fold((channels, height, width))
    for layer in model.layers:
        fold.add(layer)
    return CollapsedNetwork((channels, height, width), fold.finish(), input_range)


def largest_difference(network: CollapsedNetwork, model: Any, images: npt.NDArray[np.float32]) -> float:
    """Return by how much network and Keras model differ at most, relative to the size of the logits.

    For an image with Keras logits ``k`` and collapsed logits ``c`` the difference is
    ``max|c - k| / max(1, max|k|)``: relative for large logits, absolute where all of them are below one.

    Parameters
    ----------
    images:
        float32, shape (n, height, width, channels), as the model reads them.
    """
    keras_logits = np.asarray(model.predict(images, batch_size=512, verbose=0), dtype=np.float64)
    difference = np.abs(network(np.moveaxis(images, -1, -3)) - keras_logits).max(axis=1)
    return float((difference / np.maximum(1.0, np.abs(keras_logits).max(axis=1))).max())


class _Fold:
    """The fold so far: finished segments, and the open one as a list of maps that could not merge."""

    def __init__(self, shape: Shape) -> None:
        self.map_shape: Shape | None = shape  # (channels, height, width); None once the values are a plain vector
        self.flat = False
        self.finished: list[Linear] = []
        self.segment: list[Linear] = []

    def add(self, layer: Any) -> None:
        """Fold one more layer in."""
        # Subclasses may compute something else, so only the exact types are accepted.
        handlers: dict[type, Callable[[Any], None]] = {
            layers.InputLayer: self._nothing,
            layers.Dropout: self._nothing,
            layers.Flatten: self._flatten,
            layers.Conv2D: self._convolution,
            layers.AveragePooling2D: self._mean_pooling,
            layers.BatchNormalization: self._normalisation,
            layers.Dense: self._dense,
            Square: self._square,
        }
        handler = handlers.get(type(layer))
        if handler is None:
            raise CollapseError(_refusal(layer))
        activation = getattr(layer, "activation", None)
        if activation is not None and activation is not keras.activations.linear:
            raise CollapseError(
                f"layer {layer.name!r} has the activation {getattr(activation, '__name__', activation)!r}; "
                "leave it linear and put a Square layer behind it (the last layer gives logits: no softmax)"
            )
        handler(layer)

    def finish(self) -> tuple[Linear, ...]:
        """Close the last segment."""
        if not self.segment:
            raise CollapseError("the model ends in a Square layer; expected a dense layer that gives the logits")
        return (*self.finished, _multiplied(self.segment))

    def _nothing(self, layer: Any) -> None:
        del layer

    def _flatten(self, layer: Any) -> None:
        _require_channels_last(layer)
        self.flat = True

    def _square(self, layer: Any) -> None:
        if not self.segment:
            raise CollapseError(
                f"nothing linear stands before {layer.name!r}; put a convolution or dense layer before every Square"
            )
        self.finished.append(_multiplied(self.segment))
        self.segment = []

    def _convolution(self, layer: Any) -> None:
        _require_channels_last(layer)
        if layer.groups != 1 or tuple(layer.dilation_rate) != (1, 1):
            raise CollapseError(f"{layer.name!r} is grouped or dilated; expected a plain Conv2D")
        shape, stride = self._open_map(layer), _one_step(layer.name, layer.strides)
        kernel = np.asarray(layer.kernel, dtype=np.float64).transpose(3, 2, 0, 1)
        bias = np.asarray(layer.bias, dtype=np.float64) if layer.use_bias else np.zeros(len(kernel))
        self._append(Convolution(kernel, bias, shape, stride, _padding(layer, shape, kernel.shape[2:], stride)))

    def _mean_pooling(self, layer: Any) -> None:
        _require_channels_last(layer)
        shape, stride = self._open_map(layer), _one_step(layer.name, layer.strides)
        if _padding(layer, shape, layer.pool_size, stride) != NO_PADDING:
            # Keras leaves padding out of the mean, so that border windows weigh differently: no convolution.
            raise CollapseError(f"{layer.name!r} pads its windows; use padding='valid' or a pool that divides the map")
        rows, columns = layer.pool_size
        mean = np.broadcast_to(np.eye(shape[0])[:, :, None, None], (shape[0], shape[0], rows, columns))
        self._append(Convolution(mean / (rows * columns), np.zeros(shape[0]), shape, stride))

    def _normalisation(self, layer: Any) -> None:
        axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
        rank = 2 if self.flat or self.map_shape is None else 4
        if axes not in ([-1], [rank - 1]):
            raise CollapseError(f"{layer.name!r} normalises axis {axes}; expected the last one, the channels")
        if self.map_shape is not None and self.flat:
            raise CollapseError(f"{layer.name!r} stands between Flatten and Dense; put it before Flatten")
        variance = np.asarray(layer.moving_variance, dtype=np.float64) + layer.epsilon
        scale = (np.asarray(layer.gamma, dtype=np.float64) if layer.scale else 1.0) / np.sqrt(variance)
        shift = np.asarray(layer.beta, dtype=np.float64) if layer.center else 0.0
        shift = shift - np.asarray(layer.moving_mean, dtype=np.float64) * scale
        if self.map_shape is None:
            self._append(Dense(np.diag(scale), shift))
        else:
            self._append(Convolution(np.diag(scale)[:, :, None, None], shift, self.map_shape))

    def _dense(self, layer: Any) -> None:
        kernel = np.asarray(layer.kernel, dtype=np.float64)
        if self.map_shape is not None:
            if not self.flat:
                raise CollapseError(f"{layer.name!r} reads a feature map; put Flatten before it")
            channels, height, width = self.map_shape
            # Keras flattens (height, width, channels); our values are numbered channel first.
            kernel = kernel.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(prod(self.map_shape), -1)
        bias = np.asarray(layer.bias, dtype=np.float64) if layer.use_bias else np.zeros(kernel.shape[1])
        self._append(Dense(kernel.T, bias))
        self.map_shape = None

    def _open_map(self, layer: Any) -> Shape:
        if self.map_shape is None or self.flat:
            raise CollapseError(f"{layer.name!r} needs a feature map; put it before Flatten")
        return self.map_shape

    def _append(self, new: Linear) -> None:
        merged = _merge(self.segment[-1], new) if self.segment else None
        if merged is None:
            self.segment.append(new)
        else:
            self.segment[-1] = merged
        if isinstance(new, Convolution):
            self.map_shape = new.output_shape


def _merge(first: Linear, second: Linear) -> Linear | None:
    """Return ``second`` after ``first`` as one layer of the same kind, or None where there is none."""
    if isinstance(first, Dense) and isinstance(second, Dense):
        return Dense(second.weight @ first.weight, second.weight @ first.bias + second.bias)
    if isinstance(first, Convolution) and isinstance(second, Convolution) and second.padding == NO_PADDING:
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
        bias = second.kernel.sum(axis=(2, 3)) @ first.bias + second.bias
        return Convolution(kernel, bias, first.input_shape, step * second.stride, first.padding)
    return None


def _multiplied(segment: list[Linear]) -> Linear:
    """Return a segment as one layer; a lone convolution stays what it is."""
    if len(segment) == 1:
        return segment[0]

    # From the last map to the first: the product keeps as few rows as the segment has outputs.
    def before(after: Dense, layer: Linear) -> Dense:
        return Dense(after.weight @ _matrix(layer), after.weight @ layer.offset() + after.bias)

    last = segment[-1]
    return reduce(before, reversed(segment[:-1]), Dense(_matrix(last), last.offset()))


def _matrix(layer: Linear) -> Array:
    """Return the matrix of a map, shape (outputs, inputs)."""
    matrix = np.zeros((layer.outputs, layer.inputs))
    rows, columns, values = layer.entries()
    matrix[rows, columns] = values
    return matrix


def _padding(layer: Any, shape: Shape, window: tuple[int, ...], stride: int) -> Padding:
    """Return the zeros that Keras adds; with 'same' and an odd number of them the end gets one more."""
    if layer.padding == "valid":
        return NO_PADDING
    if layer.padding != "same":
        raise CollapseError(f"{layer.name!r} has padding {layer.padding!r}; expected 'same' or 'valid'")

    def sides(size: int, width: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + width - size, 0)
        return total // 2, total - total // 2

    return sides(shape[1], window[0]), sides(shape[2], window[1])


def _one_step(name: str, strides: tuple[int, ...]) -> int:
    if len(set(strides)) != 1:
        raise CollapseError(f"{name!r} has strides {tuple(strides)}; expected the same in both directions")
    return int(strides[0])


def _require_channels_last(layer: Any) -> None:
    if layer.data_format != "channels_last":
        raise CollapseError(f"{layer.name!r} reads {layer.data_format}; expected channels_last")


def _refusal(layer: Any) -> str:
    instead = {
        "ReLU": "Square",
        "LeakyReLU": "Square",
        "PReLU": "Square",
        "ELU": "Square",
        "Activation": "Square",
        "Softmax": "no layer at all: the loss takes logits, and the order of classes does not need it",
        "MaxPooling2D": "AveragePooling2D",
        "GlobalMaxPooling2D": "AveragePooling2D over the whole map and Flatten",
        "GlobalAveragePooling2D": "AveragePooling2D over the whole map and Flatten",
        "LayerNormalization": "BatchNormalization",
        "SeparableConv2D": "Conv2D",
        "DepthwiseConv2D": "Conv2D",
    }.get(type(layer).__name__, "Conv2D, AveragePooling2D, BatchNormalization, Dropout, Flatten, Dense or Square")
    return f"layer {layer.name!r} is {type(layer).__name__}, which does not fold; use {instead}"
