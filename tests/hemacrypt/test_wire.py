"""Public plans and preprocessing as messages: the same on both sides, and nothing insecure is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hemacrypt import wire
from hemacrypt.errors import PlanError
from hemacrypt.preprocess import Preprocessing
from hemacrypt.v1 import inference_pb2 as pb
from tests.hemacrypt.setups import Setup

PREPROCESSING = Preprocessing(image_size=10, crop=8, block=2, scale=0.5, largest_mean=100.0)


@pytest.mark.parametrize("name", ["cell", "one_square", "regression"])
def test_a_public_plan_arrives_as_it_was_sent(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    public = replace(setup.plan.public, preprocessing_digest=PREPROCESSING.digest)
    sent = wire.plan_to_message(public).SerializeToString()
    received = wire.plan_from_message(pb.PublicPlan.FromString(sent), public.model, PREPROCESSING)
    assert received.plan_id == public.plan_id
    assert received.parameters == public.parameters
    np.testing.assert_array_equal(received.input_layout.positions, public.input_layout.positions)


def test_a_plan_with_another_preprocessing_is_another_plan(regression: Setup) -> None:
    message = wire.plan_to_message(regression.plan.public)
    other = PREPROCESSING.model_copy(update={"scale": 0.25})
    ids = {wire.plan_from_message(message, "model", declared).plan_id for declared in (PREPROCESSING, other)}
    assert len(ids) == 2


def _set(message: pb.PublicPlan, **fields: object) -> None:
    for name, value in fields.items():
        target = message.parameters if name in ("degree", "special_prime") else message
        setattr(target, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _set(m, degree=2048),
        lambda m: _set(m, degree=0),
        lambda m: _set(m, special_prime=m.parameters.data_primes[0]),
        lambda m: _set(m, special_prime=15),
        lambda m: m.parameters.data_primes.append(m.parameters.data_primes[0]),
        lambda m: m.parameters.ClearField("data_primes"),
        lambda m: m.labels.append("another"),
        lambda m: m.labels.__setitem__(0, "x" * 100_000),
        lambda m: m.rotation_steps.append(1),
        lambda m: m.rotation_steps.append(1 << 20),
        lambda m: m.labels.__setitem__(0, "\x1b[2Jall clear"),
        lambda m: _set(m, input_scale=float("nan")),
        lambda m: _set(m, input_scale=2.0**70),
        lambda m: _set(m, output_scale=0.0),
        lambda m: _set(m, logit_error_bound=float("nan")),
        lambda m: _set(m, logit_error_bound=0.0),
        lambda m: _set(m, logit_limit=-1.0),
        lambda m: m.input_layout.positions.append(m.input_layout.positions[0]),
        lambda m: m.input_layout.positions.append(1 << 20),
        lambda m: m.output_layout.ClearField("positions"),
        lambda m: setattr(m.output_layout, "period", 3),
        lambda m: setattr(m.output_layout, "period", 0),
        lambda m: m.Clear(),
    ],
)
def test_an_insecure_or_contradictory_plan_is_refused(
    regression: Setup, change: Callable[[pb.PublicPlan], None]
) -> None:
    message = wire.plan_to_message(regression.plan.public)
    change(message)
    with pytest.raises(PlanError):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_a_plan_that_wants_gigabytes_of_keys_is_refused(cell: Setup) -> None:
    message = wire.plan_to_message(cell.plan.public)
    del message.rotation_steps[:]
    message.rotation_steps.extend(range(1, 4096))
    with pytest.raises(PlanError, match="MiB"):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_preprocessing_arrives_as_it_was_declared() -> None:
    message = wire.preprocessing_to_message(PREPROCESSING).SerializeToString()
    assert wire.preprocessing_from_message(pb.Preprocessing.FromString(message)) == PREPROCESSING


def test_an_impossible_preprocessing_is_refused() -> None:
    with pytest.raises(PlanError, match="impossible preprocessing"):
        wire.preprocessing_from_message(pb.Preprocessing(image_size=10, crop=7, block=2, scale=0.5))
    with pytest.raises(PlanError, match="impossible preprocessing"):
        wire.preprocessing_from_message(pb.Preprocessing())
