"""Public plans and preprocessing as messages: the same on both sides, and nothing insecure is believed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hemacrypt import wire
from hemacrypt.errors import PlanError
from hemacrypt.model.preprocess import ArrayPreprocessing, Preprocessing
from hemacrypt.plan.plan import PublicPlan
from hemacrypt.v1 import inference_pb2 as pb
from tests.hemacrypt.setups import Setup

PREPROCESSING = Preprocessing(image_size=10, crop=8, block=2, scale=0.5, largest_mean=100.0)


@pytest.mark.parametrize("name", ["cell", "one_square", "regression", "pair", "spread"])
def test_a_public_plan_arrives_as_it_was_sent(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    public = replace(setup.plan.public, preprocessing_digest=PREPROCESSING.digest)
    sent = wire.plan_to_message(public).SerializeToString()
    received = wire.plan_from_message(pb.PublicPlan.FromString(sent), public.model, PREPROCESSING)
    assert received.plan_id == public.plan_id
    assert received.parameters == public.parameters
    assert received.requirements_id == public.requirements_id
    assert received.keys == public.keys
    for name in ("input_layout", "output_layout"):
        one, other = getattr(received, name), getattr(public, name)
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.flags, other.flags)
        assert (one.period, one.slots, one.ciphertexts) == (other.period, other.slots, other.ciphertexts)
        assert (one.factor, one.images) == (other.factor, other.images)


def test_a_plan_with_another_preprocessing_is_another_plan(regression: Setup) -> None:
    public = replace(regression.plan.public, model="model", preprocessing_digest=PREPROCESSING.digest)
    message = wire.plan_to_message(public)
    assert wire.plan_from_message(message, "model", PREPROCESSING).plan_id == public.plan_id
    other = PREPROCESSING.model_copy(update={"scale": 0.25})
    assert replace(public, preprocessing_digest=other.digest).plan_id != public.plan_id
    with pytest.raises(PlanError, match="hashes to another name"):
        wire.plan_from_message(message, "model", other)
    with pytest.raises(PlanError, match="hashes to another name"):
        wire.plan_from_message(message, "another model", PREPROCESSING)


def sent(setup: Setup) -> PublicPlan:
    """Return a public plan as it is when it goes with `PREPROCESSING` and the name "model"."""
    return replace(setup.plan.public, model="model", preprocessing_digest=PREPROCESSING.digest)


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
        lambda m: m.keys[0].elements.append(1),
        lambda m: m.keys[0].elements.append(4),
        lambda m: m.keys[0].elements.append(m.keys[0].elements[-1]),
        lambda m: m.keys[0].elements.append((1 << 20) + 1),
        lambda m: setattr(m.keys[0], "level", 2),
        lambda m: setattr(m.keys[0], "level", (1 << 32) - 1),
        lambda m: m.keys.append(m.keys[0]),
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
        lambda m: setattr(m.input_layout, "ciphertexts", 0),
        lambda m: setattr(m.input_layout, "ciphertexts", (1 << 32) - 1),
        lambda m: setattr(m.input_layout, "images", 0),
        lambda m: setattr(m.input_layout, "images", 2),
        lambda m: setattr(m.input_layout, "images", 3),
        lambda m: setattr(m.input_layout, "factor", 0.0),
        lambda m: setattr(m.input_layout, "factor", -1.0),
        lambda m: setattr(m.input_layout, "factor", float("nan")),
        lambda m: setattr(m.input_layout, "factor", float("inf")),
        lambda m: setattr(m.input_layout, "factor", 1e9),
        lambda m: m.input_layout.imaginary.append(16),
        lambda m: m.input_layout.imaginary.append((1 << 32) - 1),
        lambda m: m.input_layout.ClearField("imaginary"),
        lambda m: m.input_layout.imaginary.pop(0),
        lambda m: m.input_layout.ClearField("factor"),
        lambda m: m.Clear(),
    ],
)
def test_an_insecure_or_contradictory_plan_is_refused(
    regression: Setup, change: Callable[[pb.PublicPlan], None]
) -> None:
    message = wire.plan_to_message(sent(regression))
    change(message)
    with pytest.raises(PlanError) as refusal:
        wire.plan_from_message(message, "model", PREPROCESSING)
    # What is wrong is said: nothing is left to the name that the plan carries, which a stranger can compute as well.
    assert "hashes to another name" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.keys[0].elements.pop(),
        lambda m: m.keys[0].ClearField("level"),
        lambda m: setattr(m.keys[0], "relinearise", True),
        lambda m: m.keys.add(level=0, relinearise=True),
        lambda m: m.ClearField("keys"),
        lambda m: setattr(m.input_layout, "ciphertexts", 2),
        lambda m: setattr(m.output_layout, "factor", 2.0),
        lambda m: m.labels.__setitem__(0, "another"),
        lambda m: _set(m, logit_limit=m.logit_limit * 2),
        lambda m: _set(m, input_scale=m.input_scale * 2),
        lambda m: _set(m, plan_id=""),
        lambda m: _set(m, plan_id="0" * 64),
    ],
)
def test_a_plan_that_is_another_than_its_name_says_is_refused(
    regression: Setup, change: Callable[[pb.PublicPlan], None]
) -> None:
    message = wire.plan_to_message(sent(regression))
    change(message)
    with pytest.raises(PlanError, match="hashes to another name than it carries"):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_two_images_in_a_message_without_imaginary_values_only(pair: Setup) -> None:
    message = wire.plan_to_message(pair.plan.public)
    message.input_layout.imaginary.append(0)
    with pytest.raises(PlanError, match="2 images with 1 imaginary values cannot be"):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_a_plan_that_wants_gigabytes_of_keys_is_refused(cell: Setup) -> None:
    message = wire.plan_to_message(cell.plan.public)
    del message.keys[0].elements[:]
    message.keys[0].elements.extend(range(3, 16384, 2))
    with pytest.raises(PlanError, match="MiB"):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_a_plan_that_wants_gigabytes_of_keys_in_many_small_groups_is_refused(cell: Setup) -> None:
    message = wire.plan_to_message(cell.plan.public)
    for group in message.keys:
        del group.elements[:]
        group.elements.extend(range(3, 2000, 2))
    with pytest.raises(PlanError, match="MiB"):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_a_layout_over_more_ciphertexts_than_the_planner_uses_is_refused(cell: Setup) -> None:
    message = wire.plan_to_message(cell.plan.public)
    message.output_layout.ciphertexts = 65
    with pytest.raises(PlanError, match="a layout over 65 ciphertexts; at most 64 are sent"):
        wire.plan_from_message(message, "model", PREPROCESSING)


def test_the_digest_is_that_of_all_ciphertexts_one_after_another() -> None:
    assert wire.digest([b"ab", b"", b"c"]) == hashlib.sha256(b"abc").hexdigest()
    assert wire.digest([]) == hashlib.sha256(b"").hexdigest()


def test_preprocessing_arrives_as_it_was_declared() -> None:
    message = wire.preprocessing_to_message(PREPROCESSING).SerializeToString()
    assert wire.preprocessing_from_message(pb.Preprocessing.FromString(message)) == PREPROCESSING


def test_an_impossible_preprocessing_is_refused() -> None:
    with pytest.raises(PlanError, match="impossible preprocessing"):
        wire.preprocessing_from_message(pb.Preprocessing(image_size=10, crop=7, block=2, scale=0.5))
    with pytest.raises(PlanError, match="impossible preprocessing"):
        wire.preprocessing_from_message(pb.Preprocessing())


ARRAY = ArrayPreprocessing(shape=(1, 28, 20), scale=1 / 256, smallest=-128, largest=127)


def test_the_preprocessing_of_arrays_arrives_as_it_was_declared() -> None:
    message = wire.preprocessing_to_message(ARRAY).SerializeToString()
    arrived = wire.preprocessing_from_message(pb.Preprocessing.FromString(message))
    assert arrived == ARRAY
    assert arrived.digest == ARRAY.digest != ArrayPreprocessing(shape=(1, 28, 20)).digest


def test_a_service_that_names_no_kind_means_cells() -> None:
    message = wire.preprocessing_to_message(PREPROCESSING)
    message.ClearField("kind")
    assert wire.preprocessing_from_message(message) == PREPROCESSING


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": []}, "impossible preprocessing"),
        ({"shape": [4096, 4096, 4096]}, "more than 1048576 values"),
        ({"shape": [1, 0, 3]}, "impossible preprocessing"),
        ({"smallest": 300.0}, "no range"),
        ({"largest": float("nan")}, "impossible preprocessing"),
        ({"scale": -1.0}, "impossible preprocessing"),
        ({"kind": "guess"}, "upgrade hemacrypt"),
    ],
)
def test_an_impossible_preprocessing_of_arrays_is_refused(changes: dict[str, Any], words: str) -> None:
    declared = {"kind": "array", "shape": [1, 4, 4], "scale": 1.0, "largest": 255.0} | changes
    with pytest.raises(PlanError, match=words):
        wire.preprocessing_from_message(pb.Preprocessing(**declared))
