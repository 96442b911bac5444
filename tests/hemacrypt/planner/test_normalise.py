"""Networks that differ in factors that squares pass on are one network: the same function, and the same plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.engines.clear.ckks import ClearEngine
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear
from hemacrypt.plan.plan import LinearStep, Plan
from hemacrypt.planner import plan_network
from hemacrypt.planner.latency.normalise import normalised
from tests.hemacrypt.families import member


def rescaled(network: CollapsedNetwork, channels: list[Array]) -> CollapsedNetwork:
    """Multiply the outputs of all maps but the last, channel by channel, and undo it behind the squares."""
    layers: list[Linear] = []
    before = np.ones(network.inputs)
    for number, layer in enumerate(network.linears):
        factors = channels[number] if number < network.squares else np.ones(1)
        weight = layer.weight if isinstance(layer, Dense) else layer.kernel
        of_channels = np.broadcast_to(factors, weight.shape[0])
        columns = before.reshape(weight.shape[1], -1)[:, 0]
        weight = (weight.T * of_channels).T / columns.reshape(1, -1, *[1] * (weight.ndim - 2))
        bias = layer.bias * of_channels
        if isinstance(layer, Dense):
            layers.append(Dense(weight, bias))
        else:
            layers.append(Convolution(weight, bias, layer.input_shape, layer.stride, layer.padding))
        before = np.repeat(of_channels**2, layer.outputs // len(of_channels))
    return CollapsedNetwork(network.input_shape, tuple(layers), network.input_range)


def small(seed: int) -> CollapsedNetwork:
    rng = np.random.default_rng(seed)
    first = Convolution(rng.normal(size=(3, 1, 2, 2)), rng.normal(size=3), (1, 5, 5), 1)
    second = Convolution(rng.normal(size=(2, 3, 2, 2)) / 4, rng.normal(size=2), (3, 4, 4), 2)
    return CollapsedNetwork((1, 5, 5), (first, second, Dense(rng.normal(size=(2, 8)) / 8, rng.normal(size=2))))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(0, 4))
def test_the_normalised_network_is_the_same_function_but_for_a_factor(seed: int, squares: int) -> None:
    drawn = member(seed, squares)
    found = normalised(drawn.network)
    expected = drawn.network(drawn.images) * found.factor
    np.testing.assert_allclose(found.network(drawn.images), expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    assert np.log2(found.factor) == int(np.log2(found.factor))
    assert found.factor <= 1
    # Channels that contribute little may be smaller; none is larger.
    for peak in found.network.peaks:
        assert peak.max() <= 2
    for peak, before in zip(found.network.peaks[:-1], drawn.network.peaks[:-1], strict=True):
        assert peak.max() > 2.0**-11 or before.max() == 0


def test_nothing_is_rounded() -> None:
    network, found = small(3), normalised(small(3))
    image = np.random.default_rng(4).random((1, 25))
    np.testing.assert_array_equal(found.network(image), network(image) * found.factor)


@pytest.mark.parametrize("seed", range(4))
def test_channels_over_six_decades_cost_hardly_any_precision(seed: int) -> None:
    rng, network = np.random.default_rng(seed), small(seed)
    worse = rescaled(network, [10.0 ** rng.uniform(-3, 3, 3), 10.0 ** rng.uniform(-3, 3, 2)])
    image = rng.random((1, 25))
    np.testing.assert_allclose(worse(image), network(image), rtol=1e-9)
    bounds = [plan_network(each).public.logit_error_bound for each in (network, worse)]
    # Factors are powers of two, and channels that differ by less than four are left in proportion.
    assert bounds[1] < 4 * bounds[0]


def test_factors_of_whole_layers_change_nothing() -> None:
    network = small(5)
    other = rescaled(network, [np.full(1, 2.0**13), np.full(1, 2.0**-17)])
    ours, theirs = plan_network(network), plan_network(other)
    assert ours.public.plan_id == theirs.public.plan_id
    for one, two in zip(linears(ours), linears(theirs), strict=True):
        np.testing.assert_array_equal(one.diagonals, two.diagonals)


def linears(plan: Plan) -> list[LinearStep]:
    return [step for step in plan.steps if isinstance(step, LinearStep)]


@pytest.mark.parametrize("factor", [2.0**20, 2.0**40, 2.0**-6])
def test_larger_logits_are_the_same_numbers_at_a_smaller_scale(factor: float) -> None:
    network = small(6)
    last = network.linears[-1]
    assert isinstance(last, Dense)
    larger = Dense(last.weight * 64 * factor ** (1 / 2), last.bias * 64 * factor ** (1 / 2))
    base = Dense(last.weight * 64, last.bias * 64)
    plans = [plan_network(CollapsedNetwork((1, 5, 5), (*network.linears[:2], end))) for end in (base, larger)]
    ratio = factor ** (1 / 2)
    one, two = (plan.public for plan in plans)
    assert two.output_scale == one.output_scale / ratio
    assert two.logit_error_bound == one.logit_error_bound * ratio
    assert two.logit_limit == one.logit_limit * ratio
    assert two.copy_error_bound == one.copy_error_bound * ratio
    assert plans[1].step_peaks[-1] == plans[0].step_peaks[-1] * ratio
    image = np.full(25, 0.5)
    np.testing.assert_array_equal(ClearEngine(plans[1]).predict(image), ClearEngine(plans[0]).predict(image) * ratio)


def test_a_dead_channel_and_a_dead_layer_are_left_alone() -> None:
    weight = np.ones((3, 4))
    weight[1] = 0.0
    network = CollapsedNetwork((1, 2, 2), (Dense(weight, np.zeros(3)), Dense(np.ones((1, 3)), np.zeros(1))))
    found = normalised(network)
    assert np.isfinite(found.network(np.ones((1, 4)))).all()
    dead = network.calibrated(np.zeros((1, 4)))
    assert normalised(dead).network.linears[0].offset().tolist() == [0.0, 0.0, 0.0]
    plan = plan_network(dead)
    np.testing.assert_allclose(ClearEngine(plan).predict(np.zeros(4)), [[0.0]])
