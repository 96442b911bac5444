"""Networks, plans and keys that several test modules share; everything expensive is made once per session."""

from __future__ import annotations

import numpy as np
import pytest

from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from tests.hemacrypt.setups import Setup


@pytest.fixture(scope="session")
def cell_network() -> CollapsedNetwork:
    """Return a random network of the shape that classifies cells, calibrated on random images."""
    rng = np.random.default_rng(20)
    network = CollapsedNetwork(
        (3, 32, 32),
        (
            Convolution(rng.normal(size=(16, 3, 5, 5)) / 9, rng.normal(size=16) / 10, (3, 32, 32), 2, ((1, 2), (1, 2))),
            Dense(rng.normal(size=(64, 4096)) / 64, rng.normal(size=64)),
            Dense(rng.normal(size=(2, 64)) / 8, rng.normal(size=2)),
        ),
    )
    extremes = np.stack([np.zeros((3, 32, 32)), np.ones((3, 32, 32))])
    return network.calibrated(np.concatenate([rng.random((20, 3, 32, 32)), extremes]))


@pytest.fixture(scope="session")
def cell(cell_network: CollapsedNetwork) -> Setup:
    """Return the cell network (degree 8192, 144 + 64 + 2 diagonals) ready to run."""
    return Setup.of(cell_network)


@pytest.fixture(scope="session")
def regression() -> Setup:
    """Return a logistic regression (degree 4096, two data primes, no square) ready to run."""
    rng = np.random.default_rng(21)
    return Setup.of(CollapsedNetwork((1, 4, 4), (Dense(rng.normal(size=(3, 16)), rng.normal(size=3)),)))


@pytest.fixture(scope="session")
def one_square() -> Setup:
    """Return a small network with one square (degree 8192, four data primes) ready to run."""
    rng = np.random.default_rng(22)
    first = Convolution(rng.normal(size=(2, 1, 2, 2)), rng.normal(size=2), (1, 4, 4), 2)
    return Setup.of(CollapsedNetwork((1, 4, 4), (first, Dense(rng.normal(size=(2, 8)), rng.normal(size=2)))))


@pytest.fixture(scope="session")
def pair() -> Setup:
    """Return a small network with one square (degree 8192) that takes two images at once, ready to run."""
    rng = np.random.default_rng(23)
    first = Convolution(rng.normal(size=(2, 1, 2, 2)) / 2, rng.normal(size=2) / 4, (1, 4, 4), 2)
    network = CollapsedNetwork((1, 4, 4), (first, Dense(rng.normal(size=(3, 8)) / 4, rng.normal(size=3))))
    return Setup.of(network, images=2)


@pytest.fixture(scope="session")
def spread() -> Setup:
    """Return a network whose 5000 activations (degree 8192) need two ciphertexts, which one square joins."""
    rng = np.random.default_rng(24)
    first = Dense(rng.normal(size=(5000, 4)) / 2, rng.normal(size=5000) / 4)
    return Setup.of(CollapsedNetwork((1, 2, 2), (first, Dense(rng.normal(size=(2, 5000)) / 500, rng.normal(size=2)))))


@pytest.fixture(scope="session")
def large_image() -> Setup:
    """Return a logistic regression (degree 4096) over an image in both parts of three ciphertexts, ready to run."""
    rng = np.random.default_rng(25)
    return Setup.of(CollapsedNetwork((6, 32, 64), (Dense(rng.normal(size=(3, 12288)) / 60, rng.normal(size=3)),)))


@pytest.fixture(scope="session")
def real() -> Setup:
    """Return a network with one square (degree 8192) whose imaginary parts stay empty, ready to run."""
    rng = np.random.default_rng(26)
    first = Convolution(rng.normal(size=(3, 2, 3, 3)) / 4, rng.normal(size=3) / 4, (2, 6, 6), 1, ((1, 1), (1, 1)))
    network = CollapsedNetwork((2, 6, 6), (first, Dense(rng.normal(size=(2, 108)) / 8, rng.normal(size=2))))
    return Setup.of(network, slots="real")


@pytest.fixture(scope="session")
def pair_spread() -> Setup:
    """Return a network for two images whose 5000 activations (degree 8192) lie in two ciphertexts, ready to run."""
    rng = np.random.default_rng(27)
    first = Dense(rng.normal(size=(5000, 4)) / 2, rng.normal(size=5000) / 4)
    last = Dense(rng.normal(size=(2, 5000)) / 500, rng.normal(size=2))
    return Setup.of(CollapsedNetwork((1, 2, 2), (first, last)), images=2)


@pytest.fixture(scope="session")
def many_logits() -> Setup:
    """Return an affine map (degree 4096) whose 5000 logits come in three ciphertexts, ready to run."""
    rng = np.random.default_rng(28)
    return Setup.of(CollapsedNetwork((1, 4, 4), (Dense(rng.normal(size=(5000, 16)) / 4, rng.normal(size=5000)),)))


@pytest.fixture(scope="session")
def two_wide_pairs() -> Setup:
    """Return an affine map (degree 4096) over two images at once, each in two ciphertexts, ready to run."""
    rng = np.random.default_rng(29)
    first = Convolution(rng.normal(size=(1, 2, 2, 2)) / 4, rng.normal(size=1), (2, 32, 64), 2)
    return Setup.of(CollapsedNetwork((2, 32, 64), (first,)), images=2)


@pytest.fixture(scope="session")
def odd_spread() -> Setup:
    """Return a network whose 8200 activations (degree 8192) lie in three ciphertexts, of which two are joined."""
    rng = np.random.default_rng(30)
    first = Dense(rng.normal(size=(8200, 2)) / 2, rng.normal(size=8200) / 4)
    return Setup.of(CollapsedNetwork((1, 1, 2), (first, Dense(rng.normal(size=(2, 8200)) / 800, rng.normal(size=2)))))
