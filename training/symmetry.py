"""Layers that respect the eight symmetries of the square, which cost nothing under encryption.

A cell has no upright position: turned by right angles or mirrored it is the same cell. A network whose layers commute
with these eight symmetries (the dihedral group D4) gives the same answer for all eight images, exactly. That is the
average over eight symmetries at test time, folded into the weights: every layer collapses to an ordinary convolution
whose kernels come in *orbits* of eight, so the encrypted network is as large and as fast as one without the symmetry,
while an eighth of the weights is learned and none of them has to learn a rotation.

Channels are arranged as (orbit, symmetry): channel ``8 o + g`` is what symmetry ``g`` makes of the kernel of orbit
``o``. When the image is transformed by ``h``, the map of channel ``(o, g)`` becomes the transformed map of channel
``(o, h⁻¹ g)``.

Source: Cohen and Welling, Group Equivariant Convolutional Networks (ICML 2016), sections 4.2 and 6.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers, ops

# (transpose, flip rows, flip columns), applied in this order.
SYMMETRIES = tuple((t, r, c) for t in (False, True) for r in (False, True) for c in (False, True))
ORDER = len(SYMMETRIES)


def transformed(array: npt.NDArray[Any], symmetry: int, axes: tuple[int, int] = (0, 1)) -> npt.NDArray[Any]:
    """Apply one of the eight symmetries to two axes of equal length.

    Parameters
    ----------
    array:
        Any array; the two axes have the same length.
    symmetry:
        Index into `SYMMETRIES`; 0 changes nothing.
    axes:
        Rows and columns.
    """
    transpose, rows, columns = SYMMETRIES[symmetry]
    if transpose:
        array = np.swapaxes(array, *axes)
    if rows:
        array = np.flip(array, axes[0])
    return np.flip(array, axes[1]) if columns else array


def _products() -> npt.NDArray[np.intp]:
    """Return the table of the group: entry (h, g) is the symmetry that does g first and then h."""
    probe = np.arange(9).reshape(3, 3)
    number = {np.ascontiguousarray(transformed(probe, g)).tobytes(): g for g in range(ORDER)}
    table = [
        [number[np.ascontiguousarray(transformed(transformed(probe, g), h)).tobytes()] for g in range(ORDER)]
        for h in range(ORDER)
    ]
    return np.array(table, dtype=np.intp)


PRODUCTS = _products()


def _kernel_sources(kernel: int, channels: int, lifted: bool) -> npt.NDArray[np.intp]:
    """For each symmetry, where every weight of the transformed kernel comes from.

    Parameters
    ----------
    kernel:
        Width and height.
    channels:
        Channels that the kernel reads.
    lifted:
        Whether these are channels of an earlier symmetric layer, which the symmetry permutes, or those of the image.

    Returns
    -------
    Shape (8, kernel * kernel * channels); row g indexes the flattened kernel (row, column, channel).
    """
    index = np.arange(kernel * kernel * channels).reshape(kernel, kernel, -1, ORDER if lifted else 1)
    rows = []
    for h in range(ORDER):
        moved = np.empty_like(index)
        for g in range(index.shape[3]):
            moved[..., PRODUCTS[h, g] if lifted else g] = transformed(index[..., g], h)
        rows.append(moved.reshape(-1))
    return np.stack(rows)


@keras.saving.register_keras_serializable(package="hemacrypt")
class SymmetricConv2D(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """A convolution that commutes with the eight symmetries; its kernels come in orbits of eight.

    Parameters
    ----------
    orbits:
        Number of kernels that are learned; the layer has ``8 * orbits`` channels.
    kernel:
        Width and height of a kernel.
    stride:
        Step; with it, kernel and padding have to reach both borders alike, or a mirrored image would be read elsewhere.
    padding:
        Zeros on every side.
    lifted:
        False for the first layer, which reads an image; True for those that read a symmetric layer.

    Raises
    ------
    ValueError
        When built on a map that is not square, or that stride and padding do not cover alike from both sides.
    """

    def __init__(
        self, orbits: int, kernel: int, stride: int = 1, padding: int = 0, lifted: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.orbits, self.kernel, self.stride, self.padding, self.lifted = orbits, kernel, stride, padding, lifted

    def build(self, input_shape: Any) -> None:
        """Make the weights: ``weight``, shape (orbits, kernel * kernel * channels)."""
        _, height, width, channels = input_shape
        if height != width or (width + 2 * self.padding - self.kernel) % self.stride:
            raise ValueError(
                f"{self.name}: kernel {self.kernel}, stride {self.stride} and padding {self.padding} on a map of "
                f"{height}x{width}; expected a square map whose both borders are reached alike"
            )
        values = self.kernel * self.kernel * channels
        self._sources = _kernel_sources(self.kernel, channels, self.lifted)
        self.weight = self.add_weight(
            shape=(self.orbits, values), initializer=keras.initializers.RandomNormal(stddev=values**-0.5), name="weight"
        )

    def full_kernel(self) -> Any:
        """Return the kernel of the ordinary convolution that this one is: (kernel, kernel, channels, 8 * orbits)."""
        side, outputs = self.kernel, ORDER * self.orbits
        every = ops.reshape(ops.take(self.weight, self._sources, axis=1), (outputs, side, side, -1))
        return ops.transpose(every, (1, 2, 3, 0))

    def call(self, values: Any) -> Any:
        """Return (batch, side, side, 8 * orbits)."""
        if self.padding:
            edge = (self.padding, self.padding)
            values = ops.pad(values, ((0, 0), edge, edge, (0, 0)))
        return ops.conv(values, self.full_kernel(), strides=self.stride, padding="valid")

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        names = ("orbits", "kernel", "stride", "padding", "lifted")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="hemacrypt")
class SymmetricNormalization(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Batch normalisation with the same numbers for all eight channels of an orbit, so that the symmetry stays.

    Parameters
    ----------
    momentum:
        Share of the past in the moving mean and variance.
    epsilon:
        Added to the variance.
    """

    def __init__(self, momentum: float = 0.95, epsilon: float = 1e-3, **options: Any) -> None:
        super().__init__(**options)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape: Any) -> None:
        """Make gamma, beta, moving mean and moving variance, shape (orbits,) each."""
        shape = (input_shape[-1] // ORDER,)
        self.gamma = self.add_weight(shape=shape, initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=shape, initializer="zeros", name="beta")
        self.mean = self.add_weight(shape=shape, initializer="zeros", trainable=False, name="mean")
        self.variance = self.add_weight(shape=shape, initializer="ones", trainable=False, name="variance")

    def call(self, values: Any, training: bool = False) -> Any:
        """Return the normalised values, same shape."""
        if training:
            orbits = ops.reshape(values, (-1, values.shape[-1] // ORDER, ORDER))
            mean, variance = ops.moments(orbits, axes=(0, 2))
            self.mean.assign(self.momentum * self.mean + (1 - self.momentum) * mean)
            self.variance.assign(self.momentum * self.variance + (1 - self.momentum) * variance)
        else:
            mean, variance = self.mean.value, self.variance.value
        scale = self.gamma * ops.rsqrt(variance + self.epsilon)
        return values * ops.repeat(scale, ORDER) + ops.repeat(self.beta - mean * scale, ORDER)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable(package="hemacrypt")
class OrbitMean(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Averages the eight values of every orbit: (batch, 8 * orbits) -> (batch, orbits), which no symmetry changes."""

    def call(self, values: Any) -> Any:
        """Return the means."""
        return ops.mean(ops.reshape(values, (-1, values.shape[-1] // ORDER, ORDER)), axis=2)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return (batch, orbits)."""
        return (input_shape[0], input_shape[-1] // ORDER)
