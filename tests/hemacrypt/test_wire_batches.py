"""Public batch plans as messages: the same on both sides, and nothing insecure is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hemacrypt import wire
from hemacrypt.errors import PlanError
from hemacrypt.model.preprocess import Preprocessing
from hemacrypt.plan.batch_plan import PublicBatchPlan
from hemacrypt.planner import plan_layouts
from hemacrypt.v1 import inference_pb2 as pb
from tests.hemacrypt.batches import random_network

PREPROCESSING = Preprocessing(image_size=10, crop=8, block=2, scale=0.5, largest_mean=100.0)


@pytest.fixture(scope="module")
def public() -> PublicBatchPlan:
    batch = plan_layouts(random_network(1, 1), preprocessing_digest=PREPROCESSING.digest).batch
    assert batch is not None
    return batch.public


def test_a_plan_arrives_as_it_was_sent(public: PublicBatchPlan) -> None:
    for break_even in (None, 700):
        sent = wire.batch_plan_to_message(public, break_even).SerializeToString()
        message = pb.BatchPlan.FromString(sent)
        received = wire.batch_plan_from_message(message, public.model, PREPROCESSING)
        assert message.break_even == (break_even or 0)
        assert received.plan_id == public.plan_id
        assert received.requirements_id == public.requirements_id
        assert received.input_order == public.input_order
        assert received.keys == public.keys


def test_another_preprocessing_makes_another_plan(public: PublicBatchPlan) -> None:
    other = PREPROCESSING.model_copy(update={"scale": 0.25})
    with pytest.raises(PlanError, match="another name"):
        wire.batch_plan_from_message(wire.batch_plan_to_message(public, None), public.model, other)


def _set(message: Any, **fields: object) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _set(m.parameters, degree=2048),
        lambda m: _set(m.parameters, special_prime=m.parameters.data_primes[0]),
        lambda m: m.parameters.ClearField("data_primes"),
        lambda m: m.ClearField("input_order"),
        lambda m: m.input_order.append(m.input_order[0]),
        lambda m: m.input_order.append(1 << 30),
        lambda m: _set(m, input_level=63),
        lambda m: _set(m, output_level=m.input_level + 1),
        lambda m: _set(m, input_scale=float("nan")),
        lambda m: _set(m, output_scale=0.0),
        lambda m: _set(m, logit_error_bound=float("inf")),
        lambda m: _set(m, logit_limit=-1.0),
        lambda m: m.labels.append(m.labels[0]),
        lambda m: m.labels.__setitem__(0, "x" * 10_000),
        lambda m: m.labels.__setitem__(0, "\x1b[2Jall clear"),
        lambda m: m.keys.append(m.keys[0]),
        lambda m: m.keys[0].elements.append(2),
        lambda m: _set(m.keys[0], level=63),
        lambda m: _set(m, plan_id=""),
        lambda m: m.Clear(),
    ],
)
def test_an_insecure_or_contradictory_plan_is_refused(
    public: PublicBatchPlan, change: Callable[[pb.BatchPlan], None]
) -> None:
    message = wire.batch_plan_to_message(public, 5)
    change(message)
    with pytest.raises(PlanError):
        wire.batch_plan_from_message(message, public.model, PREPROCESSING)


def test_a_plan_that_wants_gigabytes_of_keys_is_refused(public: PublicBatchPlan) -> None:
    keys = tuple(group._replace(elements=tuple(range(3, 8000, 2))) for group in public.keys)
    message = wire.batch_plan_to_message(replace(public, keys=keys), None)
    with pytest.raises(PlanError, match="MiB"):
        wire.batch_plan_from_message(message, public.model, PREPROCESSING)
