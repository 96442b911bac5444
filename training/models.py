"""The trainable network: "CryptoNets for ALL", in Keras.

Three convolutions, mean pooling, two squares, dropout, flatten and two dense layers, as the paper (section III.B.2);
no softmax, because the loss is taken on the logits. Between the squares everything is linear, so the network folds
to convolution 4x4/2, square, dense 4096→64, square, dense 64→2.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from training.settings import Settings


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

    It costs what `Square` costs: it folds into the affine maps around it (`hemacrypt.folding.Fold.quadratic`).
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
