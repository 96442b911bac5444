"""The smallest and the largest networks of the family under encryption, with both engines."""

from __future__ import annotations

import numpy as np
import pytest

from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from tests.hemacrypt.setups import Setup


def _dense(rng: np.random.Generator, outputs: int, inputs: int) -> Dense:
    return Dense(rng.normal(size=(outputs, inputs)) / np.sqrt(inputs), rng.normal(size=outputs) / 4)


def logistic_regression() -> CollapsedNetwork:
    """Return one logit of thirteen features of either sign, as for the heart disease data."""
    return CollapsedNetwork((1, 1, 13), (_dense(np.random.default_rng(60), 1, 13),), (-3.0, 3.0))


def large_image() -> CollapsedNetwork:
    """Return a network that reads 96 × 96 × 3 values."""
    rng = np.random.default_rng(61)
    first = Convolution(rng.normal(size=(8, 3, 5, 5)) / 9, rng.normal(size=8) / 4, (3, 96, 96), 4)
    return CollapsedNetwork((3, 96, 96), (first, _dense(rng, 64, first.outputs), _dense(rng, 2, 64)))


def thousand_logits() -> CollapsedNetwork:
    """Return a network with one square and a thousand logits."""
    rng = np.random.default_rng(62)
    return CollapsedNetwork((1, 4, 4), (_dense(rng, 8, 16), _dense(rng, 1000, 8)))


def four_squares() -> CollapsedNetwork:
    """Return a network of degree 16384."""
    rng = np.random.default_rng(63)
    first = Convolution(rng.normal(size=(1, 1, 2, 2)), rng.normal(size=1) / 4, (1, 3, 3), 1)
    return CollapsedNetwork((1, 3, 3), (first, *(_dense(rng, 2, inputs) for inputs in (4, 2, 2, 2))))


@pytest.mark.parametrize(
    ("make", "degree", "primes", "ciphertexts"),
    [
        (logistic_regression, 4096, 2, (1, 1)),
        (large_image, 8192, 6, (6, 1)),
        (thousand_logits, 8192, 4, (1, 1)),
        (four_squares, 16384, 10, (1, 1)),
    ],
    ids=["logistic-regression", "96x96x3", "thousand-logits", "four-squares"],
)
def test_both_engines_are_within_the_bound(
    make: type[CollapsedNetwork], degree: int, primes: int, ciphertexts: tuple[int, int]
) -> None:
    network = make()
    rng = np.random.default_rng(64)
    low, high = network.input_range
    images = rng.uniform(low, high, size=(12, network.inputs))
    setup = Setup.of(network.calibrated(images), engine="seal")
    public = setup.plan.public
    assert (public.parameters.degree, len(public.parameters.data_primes)) == (degree, primes)
    assert (public.input_layout.ciphertexts, public.output_layout.ciphertexts) == ciphertexts
    expected = network(images[0])
    # A bound that says nothing would hold for anything.
    assert public.logit_error_bound < 0.05 * setup.plan.step_peaks[-1]
    uploads = setup.holder.encrypt(images[0])
    for engine, keys in ((setup.vector, setup.vector_keys), (setup.engine, setup.keys)):
        error = np.abs(setup.holder.decrypt(engine.evaluate(uploads, keys)) - expected).max()
        assert error <= public.logit_error_bound
