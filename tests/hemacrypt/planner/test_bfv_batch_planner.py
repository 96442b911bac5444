"""Exact batches: the plan's matrices give the quantised network's integers, in the clear and with SEAL."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.embedded import bundle_path
from hemacrypt.engines.clear.bfv import batch_integers
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan
from hemacrypt.planner import plan_model
from hemacrypt.planner.latency.bfv import quantised_for
from hemacrypt.planner.throughput.bfv import plan_bfv_batch
from tests.hemacrypt import exact
from tests.hemacrypt.batches import random_network


def assert_exact(network: CollapsedNetwork, plan: BfvBatchPlan, count: int = 3) -> None:
    images = np.random.default_rng(2).uniform(*network.input_range, (count, *network.input_shape))
    expected = quantised_for(network, plan).integers(images).astype(object)
    assert batch_integers(plan, images).tolist() == expected.tolist()


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1 << 30), squares=st.integers(0, 3))
def test_random_networks_are_exact(seed: int, squares: int) -> None:
    network = random_network(seed, squares)
    plan = plan_bfv_batch(network)
    assert min(plan.noise_budgets) > 0
    assert_exact(network, plan)


@pytest.mark.parametrize("squares", [0, 1, 2])
def test_budgets_are_those_of_seal_and_so_are_the_integers(squares: int) -> None:
    network = random_network(5, squares, size=3)
    plan = plan_bfv_batch(network)
    images = np.random.default_rng(3).uniform(-1, 1, (2, *network.input_shape))
    number = int(np.argmax(plan.public.plain_moduli))
    measured, residues = exact.evaluate_batch(plan, images, number)
    for step, found, predicted in zip(plan.steps, measured, plan.noise_budgets, strict=True):
        print(f"{step.name}: measured {found}, predicted {predicted:.2f}")
        assert predicted < found + 1
        assert found - predicted < 3
    expected = quantised_for(network, plan).integers(images).astype(object) % plan.public.plain_moduli[number]
    assert residues.tolist() == expected.tolist()


def test_the_embedded_network_is_planned_on_the_ring_of_ckks_with_few_moduli() -> None:
    network = Bundle.read(bundle_path()).network
    parameters = plan_model(network)[0].parameters
    plan = plan_bfv_batch(network, parameters=parameters)
    assert plan.parameters == parameters
    assert plan.public.images == 8192
    assert 2 * plan.public.largest_logit < math.prod(plan.public.plain_moduli)
    assert len(plan.public.plain_moduli) == 3
    # Relinearising 64 sums instead of 4096 squares.
    assert [step.relinearise for step in plan.steps] == [False, False, True, False, True]
    assert_exact(network, plan, 1)
    measured = plan_bfv_batch(network, magnitudes="measured").public
    assert measured.largest_logit < plan.public.largest_logit
    assert len(measured.plain_moduli) <= 3


def test_images_lie_in_both_rows_and_are_read_back() -> None:
    public = plan_bfv_batch(random_network(6, 1)).public
    images = np.random.default_rng(4).uniform(-1, 1, (3, public.inputs))
    packed = public.pack(images)
    assert packed.shape == (public.inputs, 2, public.parameters.slots)
    flat = packed.reshape(public.inputs, -1)
    assert (flat[:, :3] == np.rint(images[:, list(public.input_order)] * 255).T).all()
    assert (flat[:, 3:6] == flat[:, :3]).all()
    rows = np.arange(public.outputs * public.images).reshape(public.outputs, 2, -1)
    assert public.unpack(rows, 5).tolist() == rows.reshape(public.outputs, -1)[:, :5].T.tolist()
    with pytest.raises(PlanError, match="split batches"):
        public.pack(np.zeros((public.images + 1, public.inputs)))
    with pytest.raises(PlanError, match="for 0 images"):
        public.unpack(rows, 0)


def test_what_a_plan_promises_is_checked() -> None:
    plan = plan_bfv_batch(random_network(7, 1))
    with pytest.raises(PlanError, match="take one more"):
        replace(plan.public, largest_logit=math.prod(plan.public.plain_moduli))
    with pytest.raises(PlanError, match="do not descend"):
        replace(plan.public, output_level=plan.public.input_level + 1)
    first = plan.steps[0]
    assert isinstance(first, BfvBatchLinear)
    with pytest.raises(PlanError, match="only zero weights"):
        replace(first, weights=0 * first.weights)
    assert replace(plan.public, input_level=plan.public.input_level).plan_id == plan.public.plan_id
    assert replace(plan.public, proven=False).plan_id != plan.public.plan_id


def test_what_cannot_be_planned_is_refused() -> None:
    idle = CollapsedNetwork((1, 1, 2), (Dense(np.array([[1.0, 1.0], [0.0, 0.0]]), np.zeros(2)),))
    with pytest.raises(PlanError, match="output 1 has only zero weights"):
        plan_bfv_batch(idle)
    with pytest.raises(PlanError, match="use fewer squares"):
        plan_bfv_batch(random_network(8, 2), parameters=plan_model(random_network(8, 0))[0].parameters)
