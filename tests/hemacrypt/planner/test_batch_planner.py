"""What the planner of batches chooses, promises and refuses; and which layout it recommends."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.plan.batch_plan import BatchLinear
from hemacrypt.plan.plan import Parameters
from hemacrypt.plan.security import check_security
from hemacrypt.planner import plan_bundle, plan_network
from hemacrypt.planner.chain import choose_parameters, primes_below
from hemacrypt.planner.latency.scales import HEADROOM_BITS
from hemacrypt.planner.offer import compare_layouts
from hemacrypt.planner.throughput import ckks as planner
from hemacrypt.planner.throughput.ckks import plan_batch, plan_batch_bundle
from tests.hemacrypt.batches import random_network


def one_layer(weight: np.ndarray, bias: np.ndarray | None = None) -> CollapsedNetwork:
    side = weight.shape[1]
    return CollapsedNetwork((1, 1, side), (Dense(weight, np.zeros(len(weight)) if bias is None else bias),))


@pytest.mark.parametrize("squares", [0, 1, 2, 3])
def test_levels_scales_and_values_fit_at_every_step(squares: int) -> None:
    network = random_network(10 + squares, squares)
    plan = plan_batch(network)
    parameters, public = plan.parameters, plan.public
    check_security(parameters.degree, parameters.modulus_bits)
    level, scale = public.input_level, public.input_scale
    peaks = iter(network.peaks)
    for step in plan.steps:
        assert (step.level, step.input_scale) == (level, scale)
        if isinstance(step, BatchLinear):
            peak = float(next(peaks).max())
            inner = step.product_scale
            assert np.abs(
                step.weights / step.weight_scale - network_weights(network, plan.linears.index(step))
            ).max() <= (0.5 / step.weight_scale)
        else:
            peak, inner = peak**2, scale**2
        assert np.log2(peak * inner) + HEADROOM_BITS + 1 <= parameters.bits_at(level) + 1e-9
        after = inner
        for prime in range(level, level - step.rescales, -1):
            after /= parameters.data_primes[prime]
        assert step.output_scale == pytest.approx(after, rel=1e-12)
        level, scale = level - step.rescales, step.output_scale
    assert (level, scale) == (public.output_level, public.output_scale)
    assert public.logit_limit >= 2**HEADROOM_BITS * float(network.peaks[-1].max())


def network_weights(network: CollapsedNetwork, number: int) -> np.ndarray:
    return network.linears[number].entries()[2]


def test_late_relinearisation_is_announced_on_both_sides() -> None:
    plan = plan_batch(random_network(1, 2))
    for number, square in enumerate(plan.squares):
        assert square.relinearise != plan.linears[number + 1].relinearise
        if not square.relinearise:
            assert square.rescales == 0
    assert not plan.linears[0].relinearise


def test_the_bundle_gets_the_parameters_and_the_precision_of_its_latency_plan(bundle: Bundle) -> None:
    (latency, *_), plan = plan_bundle(bundle), plan_batch_bundle(bundle)
    assert plan.parameters == latency.parameters
    assert plan.public.logit_error_bound <= latency.public.logit_error_bound
    assert plan.public.labels == latency.public.labels
    assert plan.public.preprocessing_digest == latency.public.preprocessing_digest
    assert plan.calibrated


def test_given_parameters_are_used() -> None:
    parameters = choose_parameters(16384, 2)
    plan = plan_batch(random_network(1, 1), parameters=parameters)
    assert plan.parameters == parameters
    assert plan.public.images == 8192
    assert plan.public.input_level <= parameters.top_level


def test_a_network_too_wide_for_one_ciphertext_gets_the_smallest_degree() -> None:
    rng = np.random.default_rng(3)
    wide = Convolution(rng.normal(size=(20, 1, 1, 1)), np.zeros(20), (1, 40, 40))
    plan = plan_batch(
        CollapsedNetwork(
            (1, 40, 40), (wide, Dense(rng.normal(size=(2, 32000)) / 179, np.ones(2))), magnitudes=None
        ).calibrated(rng.random((5, 1, 40, 40)))
    )
    assert plan.parameters.degree == 8192


def test_a_precise_plan_is_taken_before_a_cheap_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(1, 2)
    precise = plan_batch(network)
    monkeypatch.setattr(planner, "TARGET", 1e-1)
    cheap = plan_batch(network)
    assert cheap.estimated_ms < precise.estimated_ms
    assert cheap.public.logit_error_bound > precise.public.logit_error_bound


def test_larger_weights_make_a_larger_bound() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(5, 16)) / 4, rng.normal(size=(2, 5))
    bounds = []
    for factor in (1.0, 8.0):
        layers = (Dense(first * factor, np.ones(5)), Dense(second, np.ones(2)))
        network = CollapsedNetwork((1, 4, 4), layers).calibrated(rng.random((50, 1, 4, 4)))
        bounds.append(plan_batch(network).public.logit_error_bound)
    assert bounds[1] > bounds[0]


def test_outputs_that_nothing_would_encrypt_are_refused() -> None:
    weight = np.ones((3, 8))
    weight[1] = 0
    with pytest.raises(PlanError, match="1 outputs with only zero weights"):
        plan_batch(one_layer(weight))
    weight[1] = 1e-12
    with pytest.raises(PlanError, match="output 1 are so small that they round to zero"):
        plan_batch(one_layer(weight))


def test_too_many_squares_and_infinite_values_are_refused() -> None:
    layers = tuple(Dense(np.full((1, 1), 0.5), np.zeros(1)) for _ in range(20))
    with pytest.raises(PlanError, match="squares"):
        plan_batch(CollapsedNetwork((1, 1, 1), layers))
    huge = (Dense(np.full((1, 1), 1e200), np.zeros(1)), Dense(np.ones((1, 1)), np.zeros(1)))
    with pytest.raises(PlanError, match="smaller activations"):
        plan_batch(CollapsedNetwork((1, 1, 1), huge))


def test_values_without_room_are_refused() -> None:
    layers = (Dense(np.full((1, 1), 2.0**60), np.zeros(1)), Dense(np.ones((1, 1)), np.zeros(1)))
    with pytest.raises(PlanError, match="leave no room"):
        plan_batch(CollapsedNetwork((1, 1, 1), layers))


def test_insecure_parameters_cannot_be_given() -> None:
    chain = choose_parameters(8192, 2)
    with pytest.raises(PlanError, match="128-bit"):
        Parameters(8192, (*chain.data_primes, *islice(primes_below(1 << 29, 8192), 4)), chain.special_prime)


def test_many_images_make_batches_better_and_few_do_not(bundle: Bundle) -> None:
    latency, batch = plan_bundle(bundle), plan_batch_bundle(bundle)
    one, many = compare_layouts(latency, batch, 1), compare_layouts(latency, batch, 4096)
    assert (one.layout, many.layout) == ("latency", "batch")
    assert one.latency_ms == many.latency_ms
    assert one.batch_ms == pytest.approx(4096 * many.batch_ms)
    assert one.break_even == many.break_even
    assert many.break_even is not None
    assert compare_layouts(latency, batch, many.break_even).layout == "batch"
    assert compare_layouts(latency, batch, many.break_even - 1).layout == "latency"
    assert any("4096 images" in reason for reason in many.reasons)
    assert any(str(many.break_even) in reason for reason in many.reasons)
    with pytest.raises(PlanError, match="at least 1"):
        compare_layouts(latency, batch, 0)


def test_more_images_than_slots_make_several_batches() -> None:
    network = random_network(1, 1)
    latency, batch = plan_network(network), plan_batch(network)
    full, more = (compare_layouts(latency, batch, count) for count in (4096, 4097))
    assert more.batch_ms == pytest.approx(2 * 4096 / 4097 * full.batch_ms)
    assert more.batch_bytes == pytest.approx(2 * 4096 / 4097 * full.batch_bytes)
