"""The networks that engines and peers are measured on, with the images they see.

Weights are random (they decide no time) and scaled so that logits are of size about 1; `leukaemia` is the trained
network that comes with Hemacrypt, on the embedded cells. Magnitudes are calibrated on images that no row evaluates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from hemacrypt.embedded import bundle_path, sample
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear, Shape
from hemacrypt.model.preprocess import read_pixels

_CALIBRATION_IMAGES = 256
Padding = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A network and the images to evaluate.

    Attributes
    ----------
    name:
        What the rows call it.
    network:
        Calibrated.
    images:
        Shape (images, channels, height, width).
    """

    name: str
    network: CollapsedNetwork
    images: Array

    def write(self, path: Path) -> Path:
        """Write weights, images and logits to an .npz file for `read` and for `benchmarks.peers.worker`."""
        arrays: dict[str, Array] = {"images": self.images, "logits": self.network(self.images)}
        arrays["input_range"] = np.array(self.network.input_range)
        for number, peak in enumerate(self.network.peaks):
            arrays[f"magnitudes{number}"] = peak
        for number, layer in enumerate(self.network.linears):
            arrays[f"bias{number}"] = layer.bias
            if isinstance(layer, Dense):
                arrays[f"weight{number}"] = layer.weight
            else:
                (top, bottom), (left, right) = layer.padding
                arrays[f"weight{number}"] = layer.kernel
                arrays[f"geometry{number}"] = np.array([*layer.input_shape, layer.stride, top, bottom, left, right])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return path

    @classmethod
    def read(cls, path: Path) -> Case:
        """Read what `write` wrote; the file's name is the case's."""
        layers: list[Linear] = []
        with np.load(path) as file:
            for number in range(sum(name.startswith("weight") for name in file)):
                weight, bias = file[f"weight{number}"], file[f"bias{number}"]
                if f"geometry{number}" not in file:
                    layers.append(Dense(weight, bias))
                    continue
                channels, height, width, stride, top, bottom, left, right = (
                    file[f"geometry{number}"].astype(int).tolist()
                )
                padding = (top, bottom), (left, right)
                layers.append(Convolution(weight, bias, (channels, height, width), stride, padding))
            images, (low, high) = file["images"], file["input_range"].tolist()
            magnitudes = tuple(file[f"magnitudes{number}"] for number in range(len(layers)))
        _, channels, height, width = images.shape
        network = CollapsedNetwork((channels, height, width), tuple(layers), (low, high), magnitudes)
        return cls(path.stem, network, images)


def _convolution(
    rng: np.random.Generator, shape: Shape, outputs: int, side: int, stride: int, padding: Padding
) -> Convolution:
    kernel = rng.normal(size=(outputs, shape[0], side, side)) / np.sqrt(shape[0] * side * side)
    return Convolution(kernel, 0.1 * rng.normal(size=outputs), shape, stride, padding)


def _dense(rng: np.random.Generator, inputs: int, outputs: int) -> Dense:
    return Dense(rng.normal(size=(outputs, inputs)) / np.sqrt(inputs), 0.1 * rng.normal(size=outputs))


def _cell_shape(rng: np.random.Generator) -> tuple[Linear, ...]:
    first = _convolution(rng, (3, 32, 32), 16, 5, 2, ((2, 2), (2, 2)))
    return first, _dense(rng, 4096, 64), _dense(rng, 64, 2)


def _two_convolutions(rng: np.random.Generator) -> tuple[Linear, ...]:
    first = _convolution(rng, (3, 32, 32), 16, 5, 2, ((2, 2), (2, 2)))
    second = _convolution(rng, first.output_shape, 32, 5, 2, ((2, 2), (2, 2)))
    return first, second, _dense(rng, 2048, 2)


def _cryptonets(rng: np.random.Generator) -> tuple[Linear, ...]:
    """Collapse of the network of Gilad-Bachrach et al., "CryptoNets", 2016."""
    first = _convolution(rng, (1, 28, 28), 5, 5, 2, ((1, 0), (1, 0)))
    return first, _dense(rng, 845, 100), _dense(rng, 100, 10)


def _lola(rng: np.random.Generator) -> tuple[Linear, ...]:
    """Collapse of the CIFAR-10 network of Brutzkus et al., "Low Latency Privacy Preserving Inference", 2019."""
    first = _convolution(rng, (3, 32, 32), 83, 8, 2, ((1, 1), (1, 1)))
    second = _convolution(rng, first.output_shape, 112, 10, 2, ((4, 4), (4, 4)))
    return first, second, _dense(rng, 5488, 10)


_RANDOM: dict[str, Callable[[np.random.Generator], tuple[Linear, ...]]] = {
    "rp": _cell_shape,
    "r": _two_convolutions,
    "cryptonets-mnist": _cryptonets,
    "lola-cifar": _lola,
}
NAMES = ("rp", "r", "leukaemia", "cryptonets-mnist", "lola-cifar")


def random_case(name: str, layers: tuple[Linear, ...], shape: Shape, images: int) -> Case:
    """Put random layers, separate calibration images and the images to evaluate together."""
    pictures = np.random.default_rng(1)
    calibration = pictures.random((_CALIBRATION_IMAGES, prod(shape)))
    network = CollapsedNetwork(shape, layers).calibrated(calibration)
    return Case(name, network, pictures.random((images, *shape)))


def make_case(name: str, images: int) -> Case:
    """Make one of the cases.

    Parameters
    ----------
    name:
        One of `NAMES`.
    images:
        How many images to evaluate; of the embedded cells there are 180 and they repeat.
    """
    if name == "leukaemia":
        bundle = Bundle.read(bundle_path())
        preprocessing, cells = bundle.manifest.preprocessing, sample()
        # Every 7th cell, so that few images hold both labels; 7 and 180 share no divisor.
        chosen = [cells[7 * number % len(cells)].path for number in range(images)]
        reduced = {path: preprocessing.reduce(read_pixels(path, preprocessing.image_size)) for path in set(chosen)}
        pixels = np.stack([reduced[path] for path in chosen])
        return Case(name, bundle.network, preprocessing.normalise(pixels).astype(np.float64))
    layers = _RANDOM[name](np.random.default_rng(0))
    first = layers[0]
    assert isinstance(first, Convolution)
    return random_case(name, layers, first.input_shape, images)
