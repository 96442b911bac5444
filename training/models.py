"""The trainable networks: "CryptoNets for ALL" and its symmetric relatives, in Keras.

Three convolutions, mean pooling, two squares, dropout, flatten and two dense layers, as the paper (section III.B.2);
no softmax, because the loss is taken on the logits. Between the squares everything is linear, so the network folds
to convolution 4x4/2, square, dense 4096→64, square, dense 64→2.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
from keras import layers

from training.settings import Settings
from training.symmetry import ORDER, OrbitMean, SymmetricConv2D, SymmetricNormalization, SymmetricQuadratic


@keras.saving.register_keras_serializable(package="hemacrypt")
class Square(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Squares every value: the only activation, being the non-linear map that costs one multiplication."""

    def call(self, values: Any) -> Any:
        """Return ``values * values``, same shape."""
        return values * values

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape


@keras.saving.register_keras_serializable(package="hemacrypt")
class Quadratic(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Computes a x² + b x + c with a, b and c learned for each channel, beginning at x².

    It costs what `Square` costs: it folds into the affine maps around it (`hemacrypt.model.folding.Fold.quadratic`).
    """

    def build(self, input_shape: Any) -> None:
        """Make the three weights, shape (channels,): the size of the last axis."""
        for name, initial in (("a", "ones"), ("b", "zeros"), ("c", "zeros")):
            setattr(self, name, self.add_weight(shape=(input_shape[-1],), initializer=initial, name=name))

    def call(self, values: Any) -> Any:
        """Return a x² + b x + c, same shape."""
        return (self.a * values + self.b) * values + self.c

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape


def cryptonet(settings: Settings, size: int = 32) -> keras.Sequential:
    """Build the network, untrained.

    Batch normalisation stands before each square: it folds away, and it keeps the squares' inputs near one while
    training, without which a network of squares diverges.

    Parameters
    ----------
    settings:
        Widths of the layers, dropout and weight of the logits' penalty are used.
    size:
        Width and height of the reduced images.

    Returns
    -------
    keras.Sequential
        (batch, size, size, 3) float32 in [0, 1] -> (batch, 2) logits in the order of `training.datasets.LABELS`.
    """
    return keras.Sequential(
        [
            keras.Input((size, size, 3), name="cell"),
            layers.Conv2D(settings.first_maps, 4, strides=2, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(momentum=0.95, name="norm1"),
            Square(name="square1"),
            layers.Conv2D(settings.inner_maps, 3, padding="same", name="conv2"),
            layers.AveragePooling2D(2, name="pool"),
            layers.Conv2D(settings.inner_maps, 3, padding="same", name="conv3"),
            layers.Flatten(name="flatten"),
            layers.Dense(settings.hidden, use_bias=False, name="dense1"),
            layers.BatchNormalization(momentum=0.95, name="norm2"),
            Square(name="square2"),
            layers.Dropout(settings.dropout, name="dropout"),
            # The last modulus of the encrypted computation has to hold the logits: large ones cost a little here.
            layers.Dense(2, activity_regularizer=keras.regularizers.L2(settings.logit_penalty), name="logits"),
        ],
        name="cryptonet",
    )


def symmetric(
    size: int,
    first_maps: int = 16,
    kernel: int = 4,
    stride: int = 2,
    padding: int | None = None,
    inner_maps: int = 0,
    inner_kernel: int = 4,
    inner_stride: int = 2,
    inner_padding: int | None = None,
    inner_pool: int = 1,
    third_maps: int = 0,
    pool: int = 1,
    hidden: int = 64,
    activation: Literal["square", "quadratic"] = "square",
    whitened: bool = False,
    range_penalty: float = 0.0,
    dropout: float = 0.2,
    logit_penalty: float = 1e-3,
) -> keras.Sequential:
    """Build a network of squares that answers alike for all eight symmetries of a cell, untrained.

    Convolution, square, optionally one or two further convolutions and squares, mean pooling, a dense layer of
    ``hidden`` channels (a convolution over the whole map) and square, the mean over each orbit, and two logits. It
    collapses to what an ordinary network of the same sizes collapses to; see `training.symmetry`.

    Parameters
    ----------
    size:
        Width and height of the reduced images.
    first_maps, inner_maps, third_maps, hidden:
        Channels of the convolutions and of the dense layer, multiples of 8. Without ``inner_maps`` there are two
        squares, with them three, with ``third_maps`` four: that convolution is 3x3/1 with a border of one zero.
    kernel, stride, padding, inner_kernel, inner_stride, inner_padding:
        Of the convolutions; paddings default to (kernel - stride) / 2, rounded down.
    inner_pool, pool:
        Width and height of the mean pooling before the third convolution, and behind the last one's square; 1: none.
        They divide the map.
    activation:
        ``square``, or ``quadratic`` for `training.symmetry.SymmetricQuadratic`, which costs the same.
    whitened:
        Whether the first convolution can be whitened; see `training.symmetry.SymmetricConv2D.whiten`.
    range_penalty:
        See `training.symmetry.SymmetricNormalization`.
    dropout:
        On the means that the logits read.
    logit_penalty:
        Weight of the squared logits in the loss.

    Returns
    -------
    keras.Sequential
        (batch, size, size, 3) float32 in [0, 1] -> (batch, 2) logits in the order of `training.datasets.LABELS`.

    Raises
    ------
    ValueError
        If channels are no multiples of 8, there is a third convolution without a second, the activation is unknown,
        the pooling does not divide the map, or a convolution does not reach both borders of its map alike.
    """
    widths = {"first_maps": first_maps, "inner_maps": inner_maps, "third_maps": third_maps, "hidden": hidden}
    for name, number in widths.items():
        if number % ORDER or number < (ORDER if name in ("first_maps", "hidden") else 0):
            raise ValueError(f"{name} is {number}; channels come in orbits of {ORDER}, so give a multiple of {ORDER}")
    if third_maps and not inner_maps:
        raise ValueError(f"third_maps is {third_maps} and inner_maps 0; give inner_maps first")
    activations = {"square": Square, "quadratic": SymmetricQuadratic}
    if activation not in activations:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(activations)}")
    model = keras.Sequential([keras.Input((size, size, 3), name="cell")], name="symmetric")

    def activate(number: int) -> None:
        model.add(SymmetricNormalization(range_penalty=range_penalty, name=f"norm{number}"))
        model.add(activations[activation](name=f"square{number}"))

    model.add(_orbits(first_maps, kernel, stride, padding, lifted=False, whitened=whitened, name="conv1"))
    activate(1)
    if inner_maps:
        model.add(_orbits(inner_maps, inner_kernel, inner_stride, inner_padding, name="conv2"))
        activate(2)
    if third_maps:
        _add_pooling(model, inner_pool, "inner_pool")
        model.add(_orbits(third_maps, 3, 1, 1, name="conv3"))
        activate(3)
    side = _add_pooling(model, pool)
    model.add(SymmetricConv2D(hidden // ORDER, side, name="dense1"))
    model.add(layers.Flatten(name="flatten"))
    activate(2 + bool(inner_maps) + bool(third_maps))
    model.add(OrbitMean(name="orbits"))
    return _with_logits(model, dropout, logit_penalty)


def squares(
    size: int,
    first_maps: int = 16,
    kernel: int = 4,
    stride: int = 2,
    inner_maps: int = 0,
    inner_kernel: int = 4,
    inner_stride: int = 2,
    pool: int = 1,
    hidden: int = 64,
    dropout: float = 0.2,
    logit_penalty: float = 1e-3,
) -> keras.Sequential:
    """Build what `symmetric` builds, of ordinary layers: any number of channels, and Keras' padding 'same'.

    Parameters, what is returned and the error for a pooling that does not divide the map are those of `symmetric`.
    """
    model = keras.Sequential([keras.Input((size, size, 3), name="cell")], name="squares")
    blocks = [(first_maps, kernel, stride)] + ([(inner_maps, inner_kernel, inner_stride)] if inner_maps else [])
    for number, (maps, side, step) in enumerate(blocks, 1):
        model.add(layers.Conv2D(maps, side, strides=step, padding="same", use_bias=False, name=f"conv{number}"))
        model.add(layers.BatchNormalization(momentum=0.95, name=f"norm{number}"))
        model.add(Square(name=f"square{number}"))
    _add_pooling(model, pool)
    last = len(blocks) + 1
    model.add(layers.Flatten(name="flatten"))
    model.add(layers.Dense(hidden, use_bias=False, name="dense1"))
    model.add(layers.BatchNormalization(momentum=0.95, name=f"norm{last}"))
    model.add(Square(name=f"square{last}"))
    return _with_logits(model, dropout, logit_penalty)


def _add_pooling(model: keras.Sequential, pool: int, name: str = "pool") -> int:
    """Add mean pooling, 1 for none; return the side of the map behind it."""
    side = int(model.output_shape[1])
    if pool < 1 or side % pool:
        raise ValueError(f"{name} is {pool} on a map of {side}x{side}; give a divisor of {side}")
    if pool > 1:
        model.add(layers.AveragePooling2D(pool, name=name))
    return side // pool


def _with_logits(model: keras.Sequential, dropout: float, penalty: float) -> keras.Sequential:
    """Add dropout and the two logits, whose squares cost a little in the loss."""
    model.add(layers.Dropout(dropout, name="dropout"))
    model.add(layers.Dense(2, activity_regularizer=keras.regularizers.L2(penalty), name="logits"))
    return model


def _orbits(maps: int, kernel: int, stride: int, padding: int | None, **options: Any) -> SymmetricConv2D:
    """Return a symmetric convolution that reaches both borders alike, if that is possible."""
    edge = max(kernel - stride, 0) // 2 if padding is None else padding
    return SymmetricConv2D(maps // ORDER, kernel, stride, edge, **options)
