"""Networks planned for BFV and evaluated under encryption: the integers are those of the quantised network."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from client_sdk._crypto import BfvKeyHolder, KeyHolder
from hemacrypt import embedded
from hemacrypt.engines import ENCRYPTED_ENGINES, encrypted_bfv_engine, encrypted_engine
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.planner import plan_bundle
from hemacrypt.planner.latency.bfv import plan_bfv, plan_bfv_bundle, quantised_for

PAPER = (957181001729, 957181034497)


def dense(*widths: int, seed: int = 0) -> CollapsedNetwork:
    """Make a network of dense layers, calibrated on random images."""
    rng = np.random.default_rng(seed)
    layers = [
        Dense(rng.normal(size=(outputs, inputs)) / np.sqrt(inputs), rng.normal(size=outputs) / 4)
        for inputs, outputs in pairwise(widths)
    ]
    return CollapsedNetwork((1, 1, widths[0]), tuple(layers)).calibrated(rng.random((30, 1, 1, widths[0])))


def convolved(seed: int = 1) -> CollapsedNetwork:
    """Make a network of a strided convolution, one square and a dense layer."""
    rng = np.random.default_rng(seed)
    first = Convolution(rng.normal(size=(3, 2, 3, 3)) / 4, rng.normal(size=3) / 4, (2, 6, 6), 2, ((1, 1), (1, 1)))
    last = Dense(rng.normal(size=(2, first.outputs)) / 8, rng.normal(size=2))
    return CollapsedNetwork((2, 6, 6), (first, last)).calibrated(rng.random((30, 2, 6, 6)))


NETWORKS: dict[str, tuple[CollapsedNetwork, dict[str, Any]]] = {
    "no square": (dense(16, 3), {}),
    "no square, two images": (dense(16, 3), {"images": 2}),
    "one output": (dense(5, 1), {}),
    "convolution": (convolved(), {}),
    "convolution, two images": (convolved(), {"images": 2}),
    "image in several ciphertexts": (dense(12288, 3), {}),
    "activations in several ciphertexts": (dense(4, 5000, 2), {}),
    "activations in several ciphertexts, two images": (dense(4, 5000, 2), {"images": 2}),
    "logits in several ciphertexts": (dense(16, 5000), {}),
    "three squares": (dense(6, 5, 4, 3, 2), {}),
}


def assert_exact(network: CollapsedNetwork, plan: BfvPlan, images: list[np.ndarray]) -> None:
    holder, quantised = BfvKeyHolder(plan.public), quantised_for(network, plan)
    keys = holder.evaluation_keys()
    for name in ENCRYPTED_ENGINES:
        engine = encrypted_bfv_engine(name, plan)
        loaded = engine.load_keys(keys)
        for image in images:
            reply = engine.evaluate(holder.encrypt(image), loaded)
            assert holder.decrypt_integers(reply).tolist() == quantised.integers(image).astype(object).tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_both_engines_return_the_integers_of_the_quantised_network(name: str) -> None:
    network, options = NETWORKS[name]
    plan = plan_bfv(network, **options)
    shape = (plan.public.images, *network.input_shape)
    assert_exact(network, plan, [np.random.default_rng(3).random(shape), np.ones(shape)])


def test_networks_of_every_layout_are_among_them() -> None:
    plans = {name: plan_bfv(network, **options).public for name, (network, options) in NETWORKS.items()}
    assert plans["image in several ciphertexts"].input_layout.ciphertexts > 1
    assert plans["image in several ciphertexts"].input_layout.mixes
    assert plans["logits in several ciphertexts"].output_layout.ciphertexts > 1
    assert {public.images for public in plans.values()} == {1, 2}
    assert len({len(public.plain_moduli) for public in plans.values()}) > 2
    assert len({public.parameters.degree for public in plans.values()}) > 1


def test_the_moduli_of_the_paper() -> None:
    network = dense(20, 8, 4, 2)
    plan = plan_bfv(network, plain_moduli=PAPER, degree=16384)
    assert (plan.parameters.degree, plan.public.plain_moduli) == (16384, PAPER)
    assert_exact(network, plan, [np.random.default_rng(5).random((1, *network.input_shape))])


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.read(embedded.bundle_path())


@pytest.mark.parametrize("images", [1, 2])
def test_the_embedded_network_on_cells_that_were_held_out(bundle: Bundle, images: int) -> None:
    plan = plan_bfv_bundle(bundle, images=images)
    cells = np.stack([bundle.manifest.preprocessing(cell.path) for cell in embedded.sample()[: 2 * images]])
    assert_exact(bundle.network, plan, list(cells.reshape(2, images, *bundle.network.input_shape)))


def test_one_secret_key_serves_the_embedded_network_under_both_schemes(bundle: Bundle) -> None:
    ckks, exact = plan_bundle(bundle)[0], plan_bfv_bundle(bundle)
    assert ckks.parameters == exact.parameters
    holder = KeyHolder(ckks.public)
    image = bundle.manifest.preprocessing(embedded.sample()[5].path)
    engine = encrypted_engine("vector", ckks)
    approximate = holder.decrypt(engine.evaluate(holder.encrypt(image), engine.load_keys(holder.evaluation_keys())))
    other = holder.serving_exact(exact.public)
    keeper = encrypted_bfv_engine("vector", exact)
    logits = other.decrypt(keeper.evaluate(other.encrypt(image), keeper.load_keys(other.evaluation_keys())))
    bound = ckks.public.logit_error_bound + exact.public.quantisation_error
    assert np.abs(logits - approximate).max() <= bound
