"""Small networks in the throughput layout, with everything that an encrypted batch of them needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk._crypto import BatchKeyHolder
from hemacrypt.engines.vector.batch import BatchEngine, BatchKeys
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.plan.batch_plan import BatchPlan
from hemacrypt.planner.throughput.ckks import plan_batch
from hemacrypt.seal.evaluation_keys import EvaluationKeys

Values = npt.NDArray[np.float64]


def random_network(seed: int, squares: int, *, convolutions: int = 1, size: int = 6) -> CollapsedNetwork:
    """Make a network of convolutions and dense layers, calibrated on random images."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 3)), size, size)
    into = shape
    layers: list[Convolution | Dense] = []
    for number in range(squares + 1):
        last = number == squares
        if number < convolutions and not last:
            kernel = rng.normal(size=(int(rng.integers(1, 4)), into[0], 3, 3)) / 3
            layer = Convolution(kernel, rng.normal(size=len(kernel)) / 3, into, 1 + number % 2 * 1, ((0, 1), (1, 0)))
            into = layer.output_shape
            layers.append(layer)
        else:
            width = int(np.prod(into))
            outputs = 3 if last else int(rng.integers(2, 7))
            layers.append(Dense(rng.normal(size=(outputs, width)) / np.sqrt(width), rng.normal(size=outputs) / 3))
            into = (outputs, 1, 1)
    network = CollapsedNetwork(shape, tuple(layers), (-1.0, 1.0))
    return network.calibrated(rng.uniform(-1, 1, (300, *shape)))


@dataclass(frozen=True)
class Batch:
    """A network, its batch plan, a hospital's keys and an engine."""

    network: CollapsedNetwork
    plan: BatchPlan
    holder: BatchKeyHolder
    engine: BatchEngine
    evaluation_keys: EvaluationKeys
    keys: BatchKeys

    @classmethod
    def of(cls, network: CollapsedNetwork, threads: int = 1) -> Batch:
        plan = plan_batch(network)
        holder, engine = BatchKeyHolder(plan.public), BatchEngine(plan, threads)
        keys = holder.evaluation_keys()
        return cls(network, plan, holder, engine, keys, engine.load_keys(keys))

    def images(self, count: int, seed: int = 0) -> Values:
        """Make images unlike those of the calibration, but of the same kind."""
        return np.random.default_rng(1000 + seed).uniform(-1, 1, (count, *self.network.input_shape))

    def evaluate(self, ciphertexts: Iterable[bytes]) -> list[bytes]:
        """Evaluate with this hospital's key."""
        return self.engine.evaluate(ciphertexts, self.keys)

    def error(self, images: Values) -> float:
        """Return the largest error of a logit of any image, by the encrypted path."""
        found = self.holder.decrypt(self.evaluate(self.holder.encrypt(images)), len(images))
        return float(np.abs(found - self.network(images)).max())
