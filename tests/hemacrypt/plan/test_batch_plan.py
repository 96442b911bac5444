"""Plans of batches: packing, identity, what they refuse; and the schedules that follow from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from hemacrypt.errors import PlanError
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.plan.batch_plan import LARGEST_ROW, BatchLinear, BatchPlan
from hemacrypt.plan.plan import PublicPlan
from hemacrypt.plan.schedule import CHUNK, ROWS, LayerSchedule, make_schedule, memory_bytes
from hemacrypt.planner import plan_network
from hemacrypt.planner.throughput.ckks import plan_batch
from tests.hemacrypt.batches import random_network


@pytest.fixture(scope="module")
def plan() -> BatchPlan:
    return plan_batch(random_network(1, 2, convolutions=2, size=20))


def test_values_go_into_slots_in_the_order_of_sending(plan: BatchPlan) -> None:
    public = plan.public
    images = np.random.default_rng(0).random((5, public.inputs))
    slots = public.pack(images)
    assert slots.shape == (public.inputs, public.images)
    for place, value in enumerate(public.input_order):
        assert np.array_equal(slots[place, :5], images[:, value])
        # Slots that would be free repeat the images, so that answers can be compared.
        assert np.array_equal(slots[place, 5:], slots[place, np.arange(5, public.images) % 5])


def test_logits_come_out_image_by_image(plan: BatchPlan) -> None:
    public = plan.public
    slots = np.random.default_rng(1).random((public.outputs, public.images))
    logits = public.unpack(slots, 7)
    assert np.array_equal(logits, slots[:, :7].T)
    with pytest.raises(PlanError, match="expected"):
        public.unpack(slots[:-1], 7)
    with pytest.raises(PlanError, match="images"):
        public.unpack(slots, public.images + 1)


def test_images_that_do_not_fit_are_refused(plan: BatchPlan) -> None:
    public = plan.public
    for shape in ((0, public.inputs), (public.images + 1, public.inputs), (2, public.inputs - 1), (public.inputs,)):
        with pytest.raises(PlanError, match=r"expected 1 to|this plan reads"):
            public.pack(np.zeros(shape))


def test_the_plan_id_changes_with_everything_a_client_relies_on(plan: BatchPlan) -> None:
    public = plan.public
    changes: list[dict[str, object]] = [
        {"model": "other"},
        {"labels": ("a", "b", "c")},
        {"input_order": public.input_order[::-1]},
        {"input_level": public.input_level - 1, "output_level": 0, "output_scale": 2.0**20},
        {"output_scale": public.output_scale * 2},
        {"input_scale": public.input_scale / 2},
        {"keys": ()},
        {"logit_error_bound": 1.0},
        {"logit_limit": 1.0},
        {"preprocessing_digest": "0" * 64},
    ]
    identities = {public.plan_id} | {replace(public, **change).plan_id for change in changes}  # type: ignore[arg-type]
    assert len(identities) == len(changes) + 1
    assert replace(public).plan_id == public.plan_id


def test_keys_depend_on_parameters_and_squares_alone(plan: BatchPlan) -> None:
    public = plan.public
    assert replace(public, model="other", output_scale=1.0).requirements_id == public.requirements_id
    assert replace(public, keys=()).requirements_id != public.requirements_id


def test_impossible_public_plans_are_refused(plan: BatchPlan) -> None:
    public = plan.public
    with pytest.raises(PlanError, match="order"):
        replace(public, input_order=(0, *public.input_order[:-1]))
    with pytest.raises(PlanError, match="levels"):
        replace(public, input_level=public.parameters.top_level + 1)
    with pytest.raises(PlanError, match="scale"):
        replace(public, output_scale=2.0**200)


def test_weights_that_do_not_fit_or_vanish_are_refused(plan: BatchPlan) -> None:
    linear = plan.linears[-1]
    heavy = np.full(len(linear.weights), LARGEST_ROW * linear.outputs // len(linear.weights) + 1)
    with pytest.raises(PlanError, match="at most"):
        replace(linear, weights=heavy)
    with pytest.raises(PlanError, match="round to zero"):
        replace(linear, weights=np.where(linear.rows == 1, 0, linear.weights))
    with pytest.raises(PlanError, match="missing"):
        replace(linear, bias=linear.bias[:-1])


def test_a_latency_plan_of_the_same_network_shares_parameters() -> None:
    network = random_network(3, 2)
    latency: PublicPlan = plan_network(network).public
    assert plan_batch(network).parameters == latency.parameters


def _replayed(linear: BatchLinear, layer: LayerSchedule, values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Carry a schedule out on integers, with sums where the schedule puts them; return outputs and their order."""
    sums = np.full(layer.open, 1 << 40)
    found, order = np.zeros(linear.outputs, dtype=np.int64), []
    for chunk in layer.chunks:
        arrived = values[chunk.inputs]
        assert len(arrived) <= layer.largest <= CHUNK
        for column, terms, weight, row, rows in chunk.groups.tolist():
            assert rows in ROWS
            assert terms > 0
            used = arrived[chunk.columns[column : column + terms]]
            block = chunk.weights[weight : weight + rows * terms].reshape(terms, rows).astype(np.int64)
            for number in range(rows):
                place = chunk.sums[row + number]
                kept = 0 if chunk.opens[row + number] else sums[place]
                sums[place] = kept + used @ block[:, number]
        outputs, places = chunk.closing
        found[outputs] = sums[places]
        sums[places] = 1 << 40
        order += outputs.tolist()
    return found, order


@pytest.mark.parametrize("size", [6, 21])
def test_schedules_compute_their_matrices_and_close_every_output_once(size: int) -> None:
    plan = plan_batch(random_network(4, 2, convolutions=2, size=size))
    rng = np.random.default_rng(size)
    for linear, layer in zip(plan.linears, make_schedule(plan), strict=True):
        values = rng.integers(-1000, 1000, linear.inputs)
        found, order = _replayed(linear, layer, values)
        expected = np.zeros(linear.outputs, dtype=np.int64)
        np.add.at(expected, linear.rows, linear.weights * values[linear.columns])
        assert np.array_equal(found, expected)
        assert sorted(order) == list(range(linear.outputs))


def test_values_arrive_in_the_order_in_which_they_were_closed(plan: BatchPlan) -> None:
    layers = make_schedule(plan)
    first = np.concatenate([chunk.inputs for chunk in layers[0].chunks])
    assert tuple(first.tolist()) == plan.public.input_order
    for before, after in pairwise(layers):
        closed = np.concatenate([chunk.closing[0] for chunk in before.chunks])
        arrived = np.concatenate([chunk.inputs for chunk in after.chunks])
        assert np.array_equal(closed, arrived)


def test_a_convolution_keeps_few_sums_open() -> None:
    rng = np.random.default_rng(9)
    shape = (2, 64, 64)
    layers = (
        Convolution(rng.normal(size=(4, 2, 3, 3)) / 4, np.ones(4), shape, 2, ((0, 1), (0, 1))),
        Dense(rng.normal(size=(2, 4096)) / 64, np.ones(2)),
    )
    plan = plan_batch(CollapsedNetwork(shape, layers).calibrated(rng.random((10, *shape))))
    first, second = make_schedule(plan)
    assert first.open < layers[0].outputs / 8
    assert second.open == 2


def test_more_threads_need_more_memory(plan: BatchPlan) -> None:
    layers = make_schedule(plan)
    assert memory_bytes(plan, layers, 1) < memory_bytes(plan, layers, 2)
