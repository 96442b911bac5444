"""Two hundred random networks of the family: evaluated under encryption within the plan's bound, or refused truly."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from client_sdk._crypto import KeyHolder
from hemacrypt.engines import ClearEngine, encrypted_engine
from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array, CollapsedNetwork
from hemacrypt.plan.plan import Plan
from hemacrypt.planner import plan_network
from tests.hemacrypt.families import Member, member

# How many networks of each number of squares: degrees 4096, 8192, 8192, 16384, 16384.
COUNTS = (110, 70, 16, 4, 2)
FAMILY = [(squares, seed) for squares, count in enumerate(COUNTS) for seed in range(count)]
# SEAL, and pairs of images, take a part of them.
WITH_SEAL = [(0, seed) for seed in range(0, 90, 5)] + [(1, seed) for seed in range(0, 70, 12)] + [(2, 3)]
IN_PAIRS = [(0, seed) for seed in range(3, 90, 9)] + [(1, seed) for seed in range(4, 70, 12)] + [(2, 5), (2, 8)]


def encrypted(plan: Plan, engine: str, requests: Array) -> Array:
    """Return the logits of the images of some requests by the whole encrypted path, with fresh keys."""
    evaluator, holder = encrypted_engine(engine, plan), KeyHolder(plan.public)
    keys = evaluator.load_keys(holder.evaluation_keys())
    return np.concatenate([holder.decrypt(evaluator.evaluate(holder.encrypt(request), keys)) for request in requests])


@cache
def planned(squares: int, seed: int, images: int = 1, engine: str = "vector") -> Plan | None:
    """Return the plan of a network, None if it is refused; then the reason has been found to be true."""
    drawn = member(seed, squares)
    try:
        return plan_network(drawn.network, images=images, engine=engine)
    except PlanError as refusal:
        confirm(drawn, str(refusal))
        return None


def confirm(drawn: Member, reason: str) -> None:
    """Make sure that what a refusal says is so; any other refusal is a failure."""
    if found := re.match(r"layer (\d+) .* (has only zero weights|reads nothing but its padding)", reason):
        layer = drawn.network.linears[int(found[1])]
        inputs = np.random.default_rng(1).normal(size=(2, layer.inputs))
        np.testing.assert_array_equal(*layer(inputs))
    elif "leaves errors" in reason:
        assert magnified(drawn.network, drawn.images) > 1
    else:
        raise AssertionError(f"a network of the family is refused: {reason}")


def magnified(network: CollapsedNetwork, images: Array) -> float:
    """Return by how much, relative to them, logits change when all layers' values get errors of 2^-17 of the largest.

    No scale of 30-bit primes makes errors much smaller, as a rescale leaves one of about 2^11.
    """
    rng, value = np.random.default_rng(0), images
    for number, layer in enumerate(network.linears):
        value = layer(value if number == 0 else value**2)
        value = value + rng.normal(size=value.shape) * np.abs(value).max() * 2.0**-17
    exact = network(images)
    return float(np.abs(value - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize(("squares", "seed"), FAMILY)
def test_encrypted_logits_are_within_the_bound(squares: int, seed: int) -> None:
    drawn, plan = member(seed, squares), planned(squares, seed)
    if plan is None:
        return
    clear = drawn.network(drawn.images)
    computed = np.concatenate([ClearEngine(plan).predict(image) for image in drawn.images])
    np.testing.assert_allclose(computed, clear, rtol=1e-9, atol=1e-9 * np.abs(clear).max())
    error = np.abs(encrypted(plan, "vector", drawn.images[:2, None]) - clear[:2]).max()
    assert error <= plan.public.logit_error_bound


@pytest.mark.parametrize(("squares", "seed"), WITH_SEAL)
def test_seal_is_within_the_bound_as_well(squares: int, seed: int) -> None:
    drawn, plan = member(seed, squares), planned(squares, seed, engine="seal")
    if plan is not None:
        error = np.abs(encrypted(plan, "seal", drawn.images[:1, None]) - drawn.network(drawn.images[:1])).max()
        assert error <= plan.public.logit_error_bound


@pytest.mark.parametrize(("squares", "seed"), IN_PAIRS)
def test_pairs_are_within_the_bound_as_well(squares: int, seed: int) -> None:
    drawn, plan = member(seed, squares), planned(squares, seed, images=2)
    if plan is not None:
        error = np.abs(encrypted(plan, "vector", drawn.images[None, :2]) - drawn.network(drawn.images[:2])).max()
        assert error <= plan.public.logit_error_bound


def test_few_of_the_networks_are_refused() -> None:
    refused = [(squares, seed) for squares, seed in FAMILY if planned(squares, seed) is None]
    assert len(FAMILY) >= 200
    assert len(refused) <= 10
