"""Images that make errors large, by gradient search: what an error bound has to hold for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hemacrypt.model.network import Array, CollapsedNetwork, Linear

Floats = npt.NDArray[np.float32]


def matrix(layer: Linear) -> Array:
    """Return the matrix of a map, shape (outputs, inputs)."""
    rows, columns, values = layer.entries()
    found = np.zeros((layer.outputs, layer.inputs))
    found[rows, columns] = values
    return found


class Search:
    """Looks for images on which errors of the first hidden layer of a network of two squares are magnified most.

    A logit y = V (W (C x + c)^2 + w)^2 + v is off by G . (2 a e) for errors e of a = C x + c, with G = (2 v h) W. The
    search climbs log |2 a G|^2 over images with values in [0, 1] of a mean that preprocessing accepts, and pays for an
    energy of h that comes near to what the guard lets pass.

    Parameters
    ----------
    network:
        With three affine maps.
    largest_mean:
        Of an image, in units of the network's input.
    energy:
        Largest sum of the squares of h.
    """

    def __init__(self, network: CollapsedNetwork, largest_mean: float, energy: float) -> None:
        self._maps = [matrix(layer).astype(np.float32) for layer in network.linears]
        self._offsets = [layer.offset().astype(np.float32) for layer in network.linears]
        self._largest_mean, self._energy = largest_mean, energy

    def magnified(self, images: Floats, logit: int) -> tuple[Floats, Floats, Floats]:
        """Return the magnification and the energy of each image, and the direction to climb in.

        Shapes (images,), (images,) and (images, inputs).
        """
        first, second, last = self._maps
        a = images @ first.T + self._offsets[0]
        h = (a * a) @ second.T + self._offsets[1]
        weights = 2 * last[logit]
        gradient = (weights * h) @ second
        whole = 2 * a * gradient
        size = (whole**2).sum(axis=1)
        # d log|2 a G|^2, through a and through h, which depends on a^2.
        through_h = ((2 * whole * 2 * a) @ second.T) * weights
        energy = (h * h).sum(axis=1)
        price = np.where(energy > 0.9 * self._energy, 8 / energy, 0)[:, None]
        through_h = through_h / size[:, None] - price * 2 * h
        by_a = 4 * whole * gradient / size[:, None] + (through_h @ second) * 2 * a
        return np.sqrt(size), energy, by_a @ first

    def worst(self, images: Floats, logit: int, rounds: int, step: float = 0.02) -> Floats:
        """Climb from some images and return the worst ones that were passed and would be accepted, as 8-bit levels."""
        current, best = images.copy(), images.copy()
        highest = self.magnified(images, logit)[0]
        first, second = np.zeros_like(current), np.zeros_like(current)
        for number in range(1, rounds + 1):
            size, energy, slope = self.magnified(current, logit)
            # Rounding to 8 bits may not carry it beyond what the guard lets pass.
            better = (energy <= 0.98 * self._energy) & (size > highest)
            highest, best[better] = np.where(better, size, highest), current[better]
            # Adam (Kingma and Ba, 2015).
            first = 0.9 * first + 0.1 * slope
            second = 0.99 * second + 0.01 * slope**2
            moved = first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.99**number)) + 1e-9)
            current = self._accepted(current + step * moved)
        return np.floor(best * 255) / 255

    def _accepted(self, images: Floats) -> Floats:
        clipped = np.clip(images, 0, 1)
        return clipped * np.minimum(1, self._largest_mean / np.maximum(clipped.mean(axis=1, keepdims=True), 1e-9))
