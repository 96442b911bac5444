"""A tiny model that reads cells at 64x64 pixels, for whatever should work at either size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hemacrypt.embedded import sample
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.model.preprocess import Preprocessing


def write_large_bundle(folder: Path) -> Bundle:
    """Write a bundle with a convolution to 64 values, a square and a dense layer; random weights, real magnitudes."""
    rng = np.random.default_rng(3)
    preprocessing = Preprocessing(block=5)
    kernel = rng.normal(0, 0.1, (1, 3, 8, 8))
    first = Convolution(kernel, rng.normal(0, 0.1, 1), (3, 64, 64), 8, ((0, 0), (0, 0)))
    weight = rng.normal(0, 0.3, (2, 64))
    cells = np.stack([preprocessing(cell.path) for cell in sample()[::20]])
    # Both labels have to occur: the mean cell lies on the border between them.
    middle = (weight @ np.square(first(cells.reshape(len(cells), -1).astype(np.float64))).T).mean(axis=1)
    network = CollapsedNetwork((3, 64, 64), (first, Dense(weight, -middle)), preprocessing.input_range)
    bundle = Bundle.create(
        network.calibrated(cells), name="large", labels=("normal", "leukaemic"), preprocessing=preprocessing
    )
    return bundle.write(folder)
