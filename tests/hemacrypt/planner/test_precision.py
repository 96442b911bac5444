"""Precision is asked for in bits; the smallest parameters that give it are taken, and nothing smaller would do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hemacrypt.embedded import bundle_path
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.calibration import default_precision, margin_quantiles
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.planner import chain, plan_bundle, plan_network
from hemacrypt.planner.latency import ckks as build
from hemacrypt.planner.latency.choices import Chooser, affordable
from hemacrypt.planner.offer import plan_bundle_layouts
from tests.hemacrypt.engines.test_error_bound import Path


def network_of(squares: int, seed: int = 1) -> CollapsedNetwork:
    """Return a calibrated network of dense maps, 64 → 16 → … → 2."""
    rng, layers, width = np.random.default_rng(seed), [], 64
    for number in range(squares + 1):
        outputs = 16 if number < squares else 2
        layers.append(Dense(rng.normal(size=(outputs, width)) / np.sqrt(width), 0.1 * rng.normal(size=outputs)))
        width = outputs
    return CollapsedNetwork((1, 8, 8), tuple(layers)).calibrated(rng.random((200, 64)))


@pytest.mark.parametrize("squares", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", [2, 4, 6])
def test_the_smallest_degree_that_is_exact_enough_is_taken(squares: int, precision: int) -> None:
    network = network_of(squares)
    plan = plan_network(network, precision=precision)
    assert plan.public.logit_error_bound <= 2.0**-precision
    smaller = [p for p in chain.candidates(squares, 64, []) if p.degree < plan.parameters.degree]
    for parameters in smaller:
        wanted = build._wanted(network, "network", None, "", None, precision, "vector", None)
        try:
            chosen = affordable(Chooser(wanted.network, "complex", 1, parameters), None)
            bound = build._planned(chosen, wanted).public.logit_error_bound
        except PlanError:
            bound = math.inf
        assert bound > 2.0**-precision
        assert any(f"degree {parameters.degree}" in reason and "rejected" in reason for reason in plan.reasons)
    assert any("one prime less was rejected" in reason for reason in plan.reasons)


def test_less_precision_makes_smaller_parameters() -> None:
    network = network_of(1)
    rough, fine = plan_network(network, precision=4), plan_network(network, precision=8)
    assert (rough.parameters.degree, fine.parameters.degree) == (4096, 8192)
    assert max(rough.parameters.data_primes) < 2**22 < min(fine.parameters.data_primes)


@pytest.mark.parametrize("engine", ["vector", "seal"])
def test_short_primes_keep_their_bound_under_encryption(engine: str) -> None:
    network = network_of(1)
    path, images = (
        Path(plan_network(network, precision=4, engine=engine), engine),
        np.random.default_rng(3).random((5, 64)),
    )
    for image, wanted in zip(images, network(images), strict=True):
        outcome = path.ask(image, wanted)
        assert outcome is not None
        assert outcome.error <= outcome.bound <= 2.0**-4


@pytest.mark.parametrize("precision", [14, 20, 60, 1000])
def test_what_no_chain_reaches_is_refused_with_what_is_best(precision: int) -> None:
    with pytest.raises(PlanError, match=rf"2\^-{precision}\.0 are out of reach .* best bound is 2\^-1.* bfv"):
        plan_network(network_of(2), precision=precision)


@pytest.mark.parametrize("precision", [-1, 2000])
def test_no_number_of_bits_is_refused(precision: int) -> None:
    with pytest.raises(PlanError, match="expected a number of bits from 0"):
        plan_network(network_of(0), precision=precision)


def test_margins_are_how_far_the_largest_logits_are_apart() -> None:
    apart = np.arange(1, 1001) / 1000
    logits = np.stack([apart, np.zeros(1000), np.full(1000, -9.0)], axis=1)
    assert margin_quantiles(logits)["0.5"] == pytest.approx(0.5005)
    assert margin_quantiles(apart[:, None])["0.5"] == pytest.approx(2 * 0.5005)
    assert default_precision({"0.01": 2 * 2.0**-7}) == 7
    assert default_precision({"0.01": 2 * 2.0**-7 * 0.99}) == 8
    assert default_precision({"0.01": 0.0}) == 41
    assert default_precision({"0.01": 100.0}) == 0


def test_a_bundle_is_planned_as_exactly_as_its_margins_ask_for() -> None:
    bundle = Bundle.read(bundle_path())
    bits = default_precision(bundle.manifest.metrics["margins"])
    assert bits == 5
    plans = plan_bundle_layouts(bundle).plans
    assert plans[0].public.logit_error_bound <= 2.0**-bits
    assert [plan.public.images for plan in plans] == [1, 2]
    with pytest.raises(PlanError, match="out of reach"):
        plan_bundle(bundle, precision=14)


def test_margins_that_no_plan_resolves_are_no_reason_to_refuse() -> None:
    network = network_of(1)
    plan = plan_network(network, margins={"0.01": 1e-9})
    assert plan.parameters.degree == 8192
    assert plan.public.logit_error_bound > 1e-9
