"""Public plans for exact evaluation as messages: the same on both sides, and nothing impossible is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from hemacrypt import wire
from hemacrypt.errors import PlanError
from hemacrypt.model.preprocess import Preprocessing
from hemacrypt.plan.bfv_plan import PublicBfvPlan
from hemacrypt.plan.plan import Layout, PublicPlan
from hemacrypt.planner.chain import primes_below
from hemacrypt.v1 import inference_pb2 as pb
from tests.hemacrypt.setups import Setup

PREPROCESSING = Preprocessing(image_size=10, crop=8, block=2, scale=0.5, largest_mean=100.0)


def _moduli(degree: int, count: int, bits: int = 24) -> tuple[int, ...]:
    return tuple(islice(primes_below(1 << bits, degree), count))


def without_guard(plan: PublicPlan) -> dict[str, np.ndarray]:
    """Return where the logits of a plan under CKKS lie, and in which part."""
    layout, count = plan.output_layout, len(plan.labels)
    return {"positions": layout.positions[:count], "imaginary": layout.flags[:count]}


@pytest.fixture(scope="module")
def public(cell: Setup) -> PublicBfvPlan:
    """An exact plan that has the layouts and keys of one under CKKS: half of the image in the second row."""
    plan = cell.plan.public
    moduli = _moduli(plan.parameters.degree, 3)
    return PublicBfvPlan(
        model="model",
        labels=plan.labels,
        parameters=plan.parameters,
        plain_moduli=moduli,
        input_layout=plan.input_layout,
        output_layout=replace(plan.output_layout, factor=1.0, **without_guard(plan)),
        input_scale=255.0,
        output_scale=1e9,
        output_level=1,
        keys=plan.keys,
        input_range=(0, 255),
        largest_logit=1 << 70,
        proven=True,
        quantisation_error=0.01,
        preprocessing_digest=PREPROCESSING.digest,
    )


def _read(message: pb.BfvPlan, model: str = "model") -> PublicBfvPlan:
    return wire.bfv_plan_from_message(message, model, PREPROCESSING)


def test_a_plan_arrives_as_it_was_sent(public: PublicBfvPlan, cell: Setup) -> None:
    received = _read(pb.BfvPlan.FromString(wire.bfv_plan_to_message(public).SerializeToString()))
    assert received.plan_id == public.plan_id
    assert received.requirements_id == public.requirements_id == cell.plan.public.requirements_id
    for field in PublicBfvPlan.__dataclass_fields__:
        if not field.endswith("layout"):
            assert getattr(received, field) == getattr(public, field)
    for name in ("input_layout", "output_layout"):
        one, other = getattr(received, name), getattr(public, name)
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.flags, other.flags)
        assert (one.period, one.slots, one.ciphertexts, one.images) == (
            other.period, other.slots, other.ciphertexts, other.images
        )  # fmt: skip


def test_a_bound_of_hundreds_of_bits_arrives(public: PublicBfvPlan) -> None:
    moduli = _moduli(public.parameters.degree, 16, 60)
    largest = int(np.prod(np.array(moduli, dtype=object))) // 2
    wide = replace(public, plain_moduli=moduli, largest_logit=largest)
    assert largest.bit_length() > 950
    assert _read(wire.bfv_plan_to_message(wide)).largest_logit == largest


def test_two_rows_of_two_images_arrive(public: PublicBfvPlan) -> None:
    def apart(layout: Layout) -> Layout:
        return Layout(np.arange(len(layout.positions)), layout.slots, layout.slots, 1, None, 1.0, 2)

    pair = replace(public, input_layout=apart(public.input_layout), output_layout=apart(public.output_layout))
    assert _read(wire.bfv_plan_to_message(pair)).images == 2


def test_other_models_and_preprocessings_make_other_plans(public: PublicBfvPlan) -> None:
    message = wire.bfv_plan_to_message(public)
    with pytest.raises(PlanError, match="another name"):
        _read(message, "another model")
    with pytest.raises(PlanError, match="another name"):
        wire.bfv_plan_from_message(message, "model", PREPROCESSING.model_copy(update={"scale": 0.25}))


def _set(message: object, **fields: object) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


def _replaced(values: Iterator[int] | list[int]) -> Callable[[pb.BfvPlan], None]:
    def change(message: pb.BfvPlan) -> None:
        del message.plain_moduli[:]
        message.plain_moduli.extend(values)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.Clear(), "quantisation error|input scale|labels"),
        (lambda m: _set(m.parameters, degree=2048), "below 128-bit security"),
        (lambda m: _set(m.parameters, degree=4096), "1 modulo|security|bits"),
        (lambda m: _set(m.parameters, special_prime=m.parameters.data_primes[0]), "repeats a prime"),
        (lambda m: m.parameters.ClearField("data_primes"), "data primes"),
        (lambda m: m.ClearField("plain_moduli"), "0 plaintext moduli"),
        (lambda m: m.plain_moduli.append(m.plain_moduli[0]), "all different"),
        (lambda m: m.plain_moduli.append(m.parameters.data_primes[0]), "also stands in the modulus chain"),
        (lambda m: m.plain_moduli.append(m.parameters.special_prime), "also stands in the modulus chain"),
        (lambda m: m.plain_moduli.append(65537 * 65537), "no prime"),
        (lambda m: m.plain_moduli.append(1), "no prime"),
        (lambda m: m.plain_moduli.append(0), "no prime"),
        (lambda m: m.plain_moduli.append(1_000_003), "no prime"),
        (lambda m: m.plain_moduli.append((1 << 64) - 1), "no prime"),
        (_replaced([12289] * 1_000_000), "plaintext moduli; expected 1 to 16"),
        (lambda m: _replaced(list(_moduli(m.parameters.degree, 17)))(m), "17 plaintext moduli"),
        (lambda m: m.plain_moduli.pop(), "take one more"),
        (lambda m: _set(m, largest_logit="0"), "do not fit"),
        (lambda m: _set(m, largest_logit=""), "no number"),
        (lambda m: _set(m, largest_logit="-1"), "no number"),
        (lambda m: _set(m, largest_logit="1e5"), "no number"),
        (lambda m: _set(m, largest_logit="٣"), "no number"),
        (lambda m: _set(m, largest_logit=" 12"), "no number"),
        (lambda m: _set(m, largest_logit="9" * 290), "do not fit"),
        (lambda m: _set(m, largest_logit="9" * 1_000_000), "no number"),
        (lambda m: _set(m, input_scale=float("nan")), "input scale"),
        (lambda m: _set(m, input_scale=float("inf")), "input scale"),
        (lambda m: _set(m, input_scale=-1.0), "input scale"),
        (lambda m: _set(m, input_scale=2.0**53), "input scale"),
        (lambda m: _set(m, output_scale=0.0), "scales"),
        (lambda m: _set(m, output_scale=float("nan")), "scales"),
        (lambda m: _set(m, quantisation_error=float("nan")), "quantisation error"),
        (lambda m: _set(m, quantisation_error=float("inf")), "quantisation error"),
        (lambda m: _set(m, quantisation_error=-0.1), "quantisation error"),
        (lambda m: _set(m, output_level=len(m.parameters.data_primes)), "replies of level"),
        (lambda m: _set(m, output_level=(1 << 32) - 1), "replies of level"),
        (lambda m: m.labels.append("another"), "labels for"),
        (lambda m: m.labels.__setitem__(0, m.labels[1]), "two labels are the same"),
        (lambda m: m.labels.__setitem__(0, "x" * 100_000), "characters"),
        (lambda m: m.labels.__setitem__(0, "\x1b[2Jall clear"), "do not print"),
        (lambda m: m.keys.append(m.keys[0]), "descending order"),
        (lambda m: m.keys[0].elements.append(2), "ascending|odd"),
        (lambda m: _set(m.keys[0], level=63), "levels|level"),
        (lambda m: m.input_layout.positions.append(m.input_layout.positions[0]), "share a slot"),
        (lambda m: _set(m.input_layout, factor=2.0), "factor of 2"),
        (lambda m: _set(m.output_layout, factor=float("nan")), "factor of nan"),
        (lambda m: _set(m.input_layout, images=2), "images"),
        (lambda m: _set(m.input_layout, images=3), "images"),
        (lambda m: _set(m.output_layout, period=3), "period 3"),
        (lambda m: _set(m.output_layout, ciphertexts=(1 << 32) - 1), "at most 64"),
    ],
)
def test_an_insecure_or_contradictory_plan_is_refused(
    public: PublicBfvPlan, change: Callable[[pb.BfvPlan], None], told: str
) -> None:
    message = wire.bfv_plan_to_message(public)
    change(message)
    with pytest.raises(PlanError, match=told) as refusal:
        _read(message)
    # What is wrong is said: nothing is left to the name that the plan carries, which a stranger can compute as well.
    assert "hashes to another name" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _set(m, plan_id=""),
        lambda m: _set(m, input_scale=m.input_scale * 2),
        lambda m: _set(m, output_scale=m.output_scale * 2),
        lambda m: _set(m, output_level=0),
        lambda m: _set(m, proven=False),
        lambda m: _set(m, largest_logit=str(int(m.largest_logit) - 1)),
        lambda m: _set(m, quantisation_error=0.0),
        lambda m: m.keys[0].elements.pop(),
        lambda m: _set(m, largest_logit="1") or m.plain_moduli.pop(),
        lambda m: m.labels.__setitem__(0, "another"),
    ],
)
def test_a_plan_that_is_another_than_its_name_says_is_refused(
    public: PublicBfvPlan, change: Callable[[pb.BfvPlan], None]
) -> None:
    message = wire.bfv_plan_to_message(public)
    change(message)
    with pytest.raises(PlanError, match="hashes to another name than it carries"):
        _read(message)


def test_a_plan_for_hundreds_of_ciphertexts_is_refused(public: PublicBfvPlan) -> None:
    layout = public.input_layout
    far = Layout(layout.positions, layout.period, layout.slots, 33, layout.flags)
    wide = replace(public, plain_moduli=_moduli(public.parameters.degree, 8), input_layout=far)
    with pytest.raises(PlanError, match="264 ciphertexts there and 8 back; at most 256 are sent"):
        _read(wire.bfv_plan_to_message(wide))


def test_a_plan_that_wants_gigabytes_of_keys_is_refused(public: PublicBfvPlan) -> None:
    keys = tuple(group._replace(elements=tuple(range(3, 8000, 2))) for group in public.keys)
    with pytest.raises(PlanError, match="MiB"):
        _read(wire.bfv_plan_to_message(replace(public, keys=keys)))
