"""Fold a trained Keras model into affine maps with squares between them.

Here Keras layers are read and translated; `hemacrypt.model.folding` says what folds, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from hemacrypt.errors import NetworkError
from hemacrypt.model.folding import NO_PADDING, Fold, Padding, same_padding
from hemacrypt.model.network import Array, CollapsedNetwork, Linear, Shape
from training.errors import CollapseError
from training.models import Quadratic, Square
from training.symmetry import ORDER, OrbitMean, SymmetricConv2D, SymmetricNormalization, SymmetricQuadratic


def collapse(model: keras.Sequential, input_range: tuple[float, float] = (0.0, 1.0)) -> CollapsedNetwork:
    """Fold a model of the family into Linear, Square, Linear, …, Linear.

    Parameters
    ----------
    model:
        Sequential of Conv2D, AveragePooling2D, BatchNormalization, Rescaling, Dropout, Flatten, Dense, Square,
        Quadratic and the layers of `training.symmetry`, reading (batch, height, width, channels) and ending in a dense
        layer or convolution.
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
    fold = _KerasFold((channels, height, width))
    try:
        for layer in model.layers:
            fold.add(layer)
        return CollapsedNetwork((channels, height, width), fold.finish(), input_range)
    except NetworkError as error:
        raise CollapseError(str(error)) from error


def largest_difference(network: CollapsedNetwork, model: Any, batches: Iterable[npt.NDArray[np.float32]]) -> float:
    """Return by how much network and Keras model differ at most, relative to the size of the logits.

    For an image with Keras logits ``k`` and collapsed logits ``c`` the difference is
    ``max|c - k| / max(1, max|k|)``: relative for large logits, absolute where all of them are below one. The model
    is evaluated in float64: in float32 four squares in a row round more than any fault of folding would show.

    Parameters
    ----------
    batches:
        At least one of images that need not be in memory together, float32, shape (n, height, width, channels), as the
        model reads them.
    """
    exact, largest = _in_double(model), []
    for images in batches:
        keras_logits = np.asarray(exact.predict(images, batch_size=512, verbose=0), dtype=np.float64)
        difference = np.abs(network(np.moveaxis(images, -1, -3)) - keras_logits).max(axis=1)
        largest.append((difference / np.maximum(1.0, np.abs(keras_logits).max(axis=1))).max())
    # Not Python's max, which may pass over what is no number.
    return float(np.max(largest))


def _in_double(model: Any) -> Any:
    """Return a copy of a model that computes in float64, with the same weights."""

    def wider(layer: Any) -> Any:
        return layer.__class__.from_config({**layer.get_config(), "dtype": "float64"})

    copy = keras.models.clone_model(model, clone_function=wider)
    copy.set_weights(model.get_weights())
    return copy


class _KerasFold:
    """Translates Keras layers, which are channel last, into the steps of a `Fold`, which is channel first."""

    def __init__(self, shape: Shape) -> None:
        self._fold = Fold(shape)

    def add(self, layer: Any) -> None:
        """Fold one more layer in."""
        # Subclasses may compute something else, so only the exact types are accepted.
        handlers: dict[type, Callable[[Any], None]] = {
            layers.InputLayer: self._nothing,
            layers.Dropout: self._nothing,
            layers.Rescaling: self._rescaling,
            layers.Flatten: self._flatten,
            layers.Conv2D: self._convolution,
            layers.AveragePooling2D: self._mean_pooling,
            layers.BatchNormalization: self._normalisation,
            layers.Dense: self._dense,
            Square: self._square,
            Quadratic: self._quadratic,
            SymmetricConv2D: self._symmetric_convolution,
            SymmetricNormalization: self._symmetric_normalisation,
            SymmetricQuadratic: self._symmetric_quadratic,
            OrbitMean: self._orbit_mean,
        }
        handler = handlers.get(type(layer))
        if handler is None:
            raise CollapseError(refusal(layer.name, type(layer).__name__))
        activation = getattr(layer, "activation", None)
        if activation is not None and activation is not keras.activations.linear:
            raise CollapseError(
                f"layer {layer.name!r} has the activation {getattr(activation, '__name__', activation)!r}; "
                "leave it linear and put a Square layer behind it (the last layer gives logits: no softmax)"
            )
        handler(layer)

    def finish(self) -> tuple[Linear, ...]:
        """Close the last segment."""
        return self._fold.finish()

    def _nothing(self, layer: Any) -> None:
        del layer

    def _rescaling(self, layer: Any) -> None:
        self._fold.scale_and_shift(layer.name, *self._last_axis(layer.name, layer.scale, layer.offset))

    def _flatten(self, layer: Any) -> None:
        _require_channels_last(layer)
        self._fold.flatten()

    def _square(self, layer: Any) -> None:
        self._fold.square(layer.name)

    def _quadratic(self, layer: Any) -> None:
        self._fold.quadratic(layer.name, *self._last_axis(layer.name, layer.a, layer.b, layer.c))

    def _last_axis(self, name: str, *numbers: Any) -> list[Array]:
        """Return numbers that Keras keeps along the last axis, channel first."""
        arrays = [np.asarray(number, dtype=np.float64) for number in numbers]
        shape = self._fold.map_shape
        if shape is None or not self._fold.flat:
            return arrays
        channels, height, width = shape
        if any(array.shape not in ((), (prod(shape),)) for array in arrays):
            raise CollapseError(f"{name!r} has numbers that fit no value; put it before Flatten")
        order = np.arange(prod(shape)).reshape(height, width, channels).transpose(2, 0, 1).reshape(-1)
        return [array[order] if array.ndim else array for array in arrays]

    def _convolution(self, layer: Any) -> None:
        _require_channels_last(layer)
        if layer.groups != 1 or tuple(layer.dilation_rate) != (1, 1):
            raise CollapseError(f"{layer.name!r} is grouped or dilated; expected a plain Conv2D")
        stride = _one_step(layer.name, layer.strides)
        kernel = np.asarray(layer.kernel, dtype=np.float64).transpose(3, 2, 0, 1)
        bias = np.asarray(layer.bias, dtype=np.float64) if layer.use_bias else np.zeros(len(kernel))
        self._fold.convolution(layer.name, kernel, bias, stride, self._padding(layer, kernel.shape[2:], stride))

    def _mean_pooling(self, layer: Any) -> None:
        _require_channels_last(layer)
        stride = _one_step(layer.name, layer.strides)
        if self._padding(layer, layer.pool_size, stride) != NO_PADDING:
            # Keras leaves padding out of the mean, so that border windows weigh differently: no convolution.
            raise CollapseError(f"{layer.name!r} pads its windows; use padding='valid' or a pool that divides the map")
        self._fold.mean_pooling(layer.name, tuple(layer.pool_size), stride)

    def _normalisation(self, layer: Any) -> None:
        axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
        on_map = self._fold.map_shape is not None
        if axes not in ([-1], [3 if on_map and not self._fold.flat else 1]):
            raise CollapseError(f"{layer.name!r} normalises axis {axes}; expected the last one, the channels")
        if on_map and self._fold.flat:
            raise CollapseError(f"{layer.name!r} stands between Flatten and Dense; put it before Flatten")
        variance = np.asarray(layer.moving_variance, dtype=np.float64) + layer.epsilon
        scale = (np.asarray(layer.gamma, dtype=np.float64) if layer.scale else 1.0) / np.sqrt(variance)
        shift = np.asarray(layer.beta, dtype=np.float64) if layer.center else 0.0
        shift = shift - np.asarray(layer.moving_mean, dtype=np.float64) * scale
        self._fold.scale_and_shift(layer.name, scale, shift)

    def _dense(self, layer: Any) -> None:
        kernel = np.asarray(layer.kernel, dtype=np.float64)
        shape = self._fold.map_shape
        if shape is not None and self._fold.flat:
            channels, height, width = shape
            # Keras flattens (height, width, channels); our values are numbered channel first.
            kernel = kernel.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(prod(shape), -1)
        bias = np.asarray(layer.bias, dtype=np.float64) if layer.use_bias else np.zeros(kernel.shape[1])
        self._fold.dense(layer.name, kernel.T, bias)

    def _symmetric_convolution(self, layer: Any) -> None:
        kernel = layer.exact_kernel().transpose(3, 2, 0, 1)
        nothing = np.zeros(len(kernel))
        shape = self._fold.map_shape
        if shape is not None and shape[1:] == kernel.shape[2:] and not layer.padding:
            # Of one window only: a dense layer, for which the planner has more ways.
            self._fold.flatten()
            self._fold.dense(layer.name, kernel.reshape(len(kernel), -1), nothing)
        else:
            edge = (layer.padding, layer.padding)
            self._fold.convolution(layer.name, kernel, nothing, layer.stride, (edge, edge))

    def _symmetric_normalisation(self, layer: Any) -> None:
        gamma, beta, mean, variance = (
            np.repeat(np.asarray(numbers, dtype=np.float64), ORDER)
            for numbers in (layer.gamma, layer.beta, layer.mean, layer.variance)
        )
        scale = gamma / np.sqrt(variance + layer.epsilon)
        self._fold.scale_and_shift(layer.name, scale, beta - mean * scale)

    def _symmetric_quadratic(self, layer: Any) -> None:
        a, b, c = (np.repeat(np.asarray(numbers, dtype=np.float64), ORDER) for numbers in (layer.a, layer.b, layer.c))
        self._fold.quadratic(layer.name, a, b, c)

    def _orbit_mean(self, layer: Any) -> None:
        orbits = self._fold.values // ORDER
        mean = np.repeat(np.eye(orbits), ORDER, axis=1) / ORDER
        self._fold.dense(layer.name, mean, np.zeros(orbits))

    def _padding(self, layer: Any, window: tuple[int, ...], stride: int) -> Padding:
        """Return the zeros that Keras adds; with 'same' and an odd number of them the end gets one more."""
        if layer.padding == "valid":
            return NO_PADDING
        if layer.padding != "same":
            raise CollapseError(f"{layer.name!r} has padding {layer.padding!r}; expected 'same' or 'valid'")
        if self._fold.map_shape is None:
            raise CollapseError(f"{layer.name!r} needs a feature map; put it before Flatten")
        return same_padding(self._fold.map_shape, (window[0], window[1]), stride)


def _one_step(name: str, strides: tuple[int, ...]) -> int:
    if len(set(strides)) != 1:
        raise CollapseError(f"{name!r} has strides {tuple(strides)}; expected the same in both directions")
    return int(strides[0])


def _require_channels_last(layer: Any) -> None:
    if layer.data_format != "channels_last":
        raise CollapseError(f"{layer.name!r} reads {layer.data_format}; expected channels_last")


def refusal(name: str, kind: str) -> str:
    """Say what to use instead of a layer that does not fold."""
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
    }.get(kind, "Conv2D, AveragePooling2D, BatchNormalization, Dropout, Flatten, Dense, Square or Quadratic")
    return f"layer {name!r} is {kind}, which does not fold; use {instead}"
