"""Random networks of the family: any shapes, strides and paddings, weights over six decades, rows of zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear, Shape

# Deeper networks need larger degrees, so they are kept narrow: largest side of an image, and largest number of values
# that a dense layer inside writes, by the number of squares.
_SIDES = (28, 16, 8, 5, 4)
_WIDTHS = (1000, 60, 16, 6, 4)


@dataclass(frozen=True)
class Member:
    """A network and images whose layer values are within the magnitudes that it is planned with."""

    network: CollapsedNetwork
    images: Array


def member(seed: int, squares: int) -> Member:
    """Draw a network with a number of squares; every other one is calibrated on its images."""
    rng = np.random.default_rng([seed, squares])
    side = _SIDES[squares]
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, side + 1)), int(rng.integers(1, side + 1)))
    layers: list[Linear] = []
    current: Shape | None = shape
    for number in range(squares + 1):
        last, width = number == squares, layers[-1].outputs if layers else math.prod(shape)
        if current is not None and rng.random() < (0.3 if last else 0.6):
            layers.append(_convolution(rng, current))
            current = layers[-1].output_shape if isinstance(layers[-1], Convolution) else None
        else:
            layers.append(
                _dense(rng, width, _outputs(rng, squares) if last else int(rng.integers(1, _WIDTHS[squares])))
            )
            current = None
    smallest, extent = rng.choice([0.0, -0.5, -1.0, -3.0]), rng.choice([0.5, 1.0, 255.0])
    network = CollapsedNetwork(shape, tuple(layers), (float(smallest), float(smallest + extent)))
    images = rng.uniform(*network.input_range, size=(4, network.inputs))
    images[0] = network.input_range[1]
    return Member(network.calibrated(images) if seed % 2 else network, images)


def _outputs(rng: np.random.Generator, squares: int) -> int:
    most = 1000 if squares < 2 else 10
    return int(rng.choice([1, 2, 10, most], p=[0.3, 0.35, 0.25, 0.1]))


def _dense(rng: np.random.Generator, inputs: int, outputs: int) -> Dense:
    scale = 10.0 ** rng.uniform(-3, 3)
    weight, bias = rng.normal(size=(outputs, inputs)), rng.normal(size=outputs)
    if rng.random() < 0.3:
        weight[1:][rng.random(outputs - 1) < 0.4] = 0.0
    if rng.random() < 0.2:
        # Channels need not be of one size either.
        weight *= 10.0 ** rng.uniform(-2, 2, size=(outputs, 1))
    return Dense(weight * scale, bias * scale * (rng.random() < 0.7))


def _convolution(rng: np.random.Generator, shape: Shape) -> Convolution:
    top, bottom, left, right = (int(side) for side in rng.integers(0, 3, size=4))
    height = int(rng.integers(1, min(5, shape[1] + top + bottom) + 1))
    width = int(rng.integers(1, min(5, shape[2] + left + right) + 1))
    scale, channels = 10.0 ** rng.uniform(-3, 3), int(rng.integers(1, 6))
    kernel, bias = rng.normal(size=(channels, shape[0], height, width)), rng.normal(size=channels)
    if rng.random() < 0.3 and channels > 1:
        kernel[rng.integers(channels)] = 0.0
    if rng.random() < 0.2 and shape[0] > 1:
        kernel[:, rng.integers(shape[0])] = 0.0
    bias = bias * scale * (rng.random() < 0.7)
    return Convolution(kernel * scale, bias, shape, int(rng.integers(1, 4)), ((top, bottom), (left, right)))
