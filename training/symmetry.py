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
# Standard deviations that `SymmetricNormalization` lets pass freely: of normal values one in 16,000 lies beyond.
_WITHIN = 4.0
Floats = npt.NDArray[np.float32]


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
    whitened:
        Multiply every kernel with a fixed matrix that `whiten` sets; until then it is the identity.

    Raises
    ------
    ValueError
        When built on a map that is not square, or that stride and padding do not cover alike from both sides.
    """

    def __init__(
        self,
        orbits: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        lifted: bool = True,
        whitened: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.whitened = whitened
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
        if self.whitened:
            self.whitening = self.add_weight(
                shape=(values, values), initializer="identity", trainable=False, name="whitening"
            )

    def full_kernel(self) -> Any:
        """Return the kernel of the ordinary convolution that this one is: (kernel, kernel, channels, 8 * orbits)."""
        return self._orbits_of(ops.matmul(self.weight, self.whitening) if self.whitened else self.weight)

    def exact_kernel(self) -> npt.NDArray[np.float64]:
        """Return `full_kernel`, multiplied out in float64: whitening cancels much of what it multiplies."""
        weight = np.asarray(self.weight, dtype=np.float64)
        if self.whitened:
            weight = weight @ np.asarray(self.whitening, dtype=np.float64)
        return np.asarray(self._orbits_of(weight))

    def _orbits_of(self, weight: Any) -> Any:
        """Return the kernels of all orbits, (kernel, kernel, channels, 8 * orbits), in the weight's own precision."""
        shape = (ORDER * self.orbits, self.kernel, self.kernel, -1)
        return ops.transpose(ops.reshape(ops.take(weight, self._sources, axis=1), shape), (1, 2, 3, 0))

    def whiten(self, images: Floats, damping: float = 0.01) -> None:
        """Make the patches of images that a first layer reads look uncorrelated to its kernels.

        Neighbouring pixels are nearly equal, so a patch's variance is nearly all brightness, and kernels that tell
        textures apart are found late: their gradients are thousands of times smaller. With the inverse root of the
        patches' covariance in front all directions are learned at one pace. That root is symmetric and commutes with
        the eight symmetries, and it folds into the kernels. (Desjardins et al., *Natural neural networks*, NeurIPS
        2015; as a fixed first layer: Jordan, *94% on CIFAR-10 in 3.29 seconds on a single GPU*, 2024, section 3.2.)

        Parameters
        ----------
        images:
            Training images as the network reads them, float32, shape (n, size, size, channels); some hundreds do.
        damping:
            Share of the mean variance that is added to every variance, so that noise is not blown up.

        Raises
        ------
        ValueError
            If the layer is not built with ``whitened``, or reads a symmetric layer.
        """
        if not self.whitened or self.lifted:
            raise ValueError(f"{self.name}: only a first layer (lifted=False) that is built with whitened=True whitens")
        side = (self.kernel, self.kernel)
        windows = np.lib.stride_tricks.sliding_window_view(images, side, axis=(1, 2))[:, :: self.stride, :: self.stride]
        patches = np.moveaxis(windows, 3, -1).reshape(-1, self.kernel**2 * images.shape[-1])
        found = np.cov(patches, rowvar=False)
        covariance = np.mean([found[np.ix_(source, source)] for source in self._sources], axis=0)
        variances, directions = np.linalg.eigh(covariance)
        roots = np.sqrt(variances + damping * variances.mean())
        self.whitening.assign((directions / roots) @ directions.T)

    def call(self, values: Any) -> Any:
        """Return (batch, side, side, 8 * orbits)."""
        if self.padding:
            edge = (self.padding, self.padding)
            values = ops.pad(values, ((0, 0), edge, edge, (0, 0)))
        return ops.conv(values, self.full_kernel(), strides=self.stride, padding="valid")

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        names = ("orbits", "kernel", "stride", "padding", "lifted", "whitened")
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
    range_penalty:
        Weight in the loss of how far values lie beyond four standard deviations, squared, on average. Each activation
        of the second degree squares an outlier, and four in a row raise it to the sixteenth power; what keeps within
        the range while training explodes less on images that nobody trained on.
    """

    def __init__(
        self, momentum: float = 0.95, epsilon: float = 1e-3, range_penalty: float = 0.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.momentum, self.epsilon, self.range_penalty = momentum, epsilon, range_penalty

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
            if self.range_penalty:
                deviations = ops.abs(orbits - mean[:, None]) * ops.rsqrt(variance + self.epsilon)[:, None]
                beyond = ops.relu(deviations - _WITHIN)
                self.add_loss(self.range_penalty * ops.mean(beyond * beyond))
        else:
            mean, variance = self.mean.value, self.variance.value
        scale = self.gamma * ops.rsqrt(variance + self.epsilon)
        return values * ops.repeat(scale, ORDER) + ops.repeat(self.beta - mean * scale, ORDER)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in ("momentum", "epsilon", "range_penalty")},
        }


@keras.saving.register_keras_serializable(package="hemacrypt")
class OrbitMean(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Averages the eight values of every orbit: (batch, 8 * orbits) -> (batch, orbits), which no symmetry changes."""

    def call(self, values: Any) -> Any:
        """Return the means."""
        return ops.mean(ops.reshape(values, (-1, values.shape[-1] // ORDER, ORDER)), axis=2)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return (batch, orbits)."""
        return (input_shape[0], input_shape[-1] // ORDER)


@keras.saving.register_keras_serializable(package="hemacrypt")
class SymmetricQuadratic(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Computes a x² + b x + c with a, b and c learned for each orbit.

    It costs what a square costs (`hemacrypt.model.folding.Fold.quadratic`) and trains far better, because it begins at
    0.5 x + 0.2 (x² - 1): close to the best second-degree approximation of a ReLU for normally distributed x, mean
    zero, and nearly linear, so that gradients reach the first layers of a deep network. (After Park et al., *AESPA:
    Accuracy preserving low-degree polynomial activation*, 2022, section 3.)
    """

    def build(self, input_shape: Any) -> None:
        """Make the three weights, shape (orbits,)."""
        for name, initial in (("a", 0.2), ("b", 0.5), ("c", -0.2)):
            start = keras.initializers.Constant(initial)
            setattr(self, name, self.add_weight(shape=(input_shape[-1] // ORDER,), initializer=start, name=name))

    def call(self, values: Any) -> Any:
        """Return a x² + b x + c, same shape."""
        a, b, c = (ops.repeat(numbers, ORDER) for numbers in (self.a, self.b, self.c))
        return (a * values + b) * values + c

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape
