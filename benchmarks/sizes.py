"""The smallest and the largest networks of the family: how long planning and evaluation take, and how large keys are.

::

    python -m benchmarks.sizes [--engine vector|seal] [--heart processed.cleveland.data]

Weights are random and magnitudes measured on random images, except for the logistic regression over the thirteen
features of the UCI heart disease data (Detrano et al., 1989), which is fitted when the file is given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.floor import best
from client_sdk._crypto import KeyHolder
from hemacrypt.engines import encrypted_engine
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear, Shape
from hemacrypt.planner import plan_network

Case = tuple[CollapsedNetwork, Array]
_FEATURES = 13


def cases(heart: Path | None) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield a name and a way to make each network, calibrated, with images for it."""
    yield "logistic regression, 13 features", lambda: _regression(heart)
    yield "96×96×3, conv 5×5/4 3→8, dense 64, dense 2", lambda: _random((3, 96, 96), 8, 4, (64, 2))
    yield "32×32×3, conv 5×5/2 3→8, dense 64, 32, 32, 10", lambda: _random((3, 32, 32), 8, 2, (64, 32, 32, 10))
    yield "28×28, conv 5×5/2 1→4, dense 1000", lambda: _random((1, 28, 28), 4, 2, (1000,))


def _random(shape: Shape, channels: int, stride: int, widths: tuple[int, ...]) -> Case:
    rng = np.random.default_rng(0)
    scale = np.sqrt(shape[0] * 25)
    kernel, bias = rng.normal(size=(channels, shape[0], 5, 5)) / scale, rng.normal(size=channels) / 4
    layers: list[Linear] = [Convolution(kernel, bias, shape, stride)]
    for width in widths:
        inputs = layers[-1].outputs
        layers.append(Dense(rng.normal(size=(width, inputs)) / np.sqrt(inputs), rng.normal(size=width) / 4))
    network = CollapsedNetwork(shape, tuple(layers))
    images = rng.random((64, network.inputs))
    return network.calibrated(images), images


def _regression(heart: Path | None) -> Case:
    rng = np.random.default_rng(0)
    if heart is None:
        features, labels = rng.random((300, _FEATURES)), rng.integers(0, 2, 300).astype(float)
    else:
        rows = [line.split(",") for line in heart.read_text(encoding="ascii").splitlines() if "?" not in line]
        table = np.array(rows, dtype=np.float64)
        features, labels = table[:, :_FEATURES], (table[:, _FEATURES] > 0).astype(float)
        features = (features - features.min(axis=0)) / np.ptp(features, axis=0)
    known, weights = np.hstack([features, np.ones((len(features), 1))]), np.zeros(_FEATURES + 1)
    for _ in range(3000):
        weights -= 0.5 * known.T @ (1 / (1 + np.exp(-known @ weights)) - labels) / len(labels)
    layer = Dense(weights[None, :_FEATURES], weights[_FEATURES:])
    return CollapsedNetwork((1, 1, _FEATURES), (layer,)).calibrated(features), features


def measure(name: str, case: Case, engine_name: str) -> None:
    """Plan and evaluate one network, and print a line."""
    network, images = case
    started = time.perf_counter()
    plan = plan_network(network, engine=engine_name)
    planning = time.perf_counter() - started
    engine, holder = encrypted_engine(engine_name, plan), KeyHolder(plan.public)
    evaluation_keys = holder.evaluation_keys()
    keys = engine.load_keys(evaluation_keys)
    uploads = holder.encrypt(images[0])
    took = best(lambda: engine.evaluate(uploads, keys), 5)
    error = np.abs(holder.decrypt(engine.evaluate(uploads, keys)) - network(images[:1])).max()
    size = sum(len(level.relinearisation) + len(level.galois) for level in evaluation_keys.levels)
    print(
        f"{name}: {engine_name}, N = {plan.parameters.degree}, planned in {planning:.2f} s, "
        f"evaluated in {took:.1f} ms, keys {size / 1e6:.1f} MB, {len(uploads)} ciphertexts up, error {error:.1e}, "
        f"bound {plan.public.logit_error_bound:.1e}, largest logit {plan.step_peaks[-1]:.1e}",
        flush=True,
    )


def main() -> None:
    """Measure every case with one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vector", choices=("vector", "seal"))
    parser.add_argument("--heart", type=Path)
    options = parser.parse_args()
    for name, make in cases(options.heart):
        measure(name, make(), options.engine)


if __name__ == "__main__":
    main()
