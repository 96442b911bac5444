"""Both encrypted engines on plans of every kind: right, within the bound, and in agreement on the same ciphertexts."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from client_sdk._crypto import KeyHolder
from hemacrypt.engines.clear.ckks import ClearEngine
from hemacrypt.engines.vector.ckks import VectorEngine
from hemacrypt.errors import FormatError
from hemacrypt.planner import plan_model
from tests.hemacrypt.setups import Setup

KINDS = (
    "regression",
    "real",
    "one_square",
    "pair",
    "spread",
    "odd_spread",
    "pair_spread",
    "large_image",
    "many_logits",
    "two_wide_pairs",
)
PAIRS = ("pair", "pair_spread", "two_wide_pairs")


@pytest.fixture(params=KINDS)
def setup(request: pytest.FixtureRequest) -> Setup:
    found: Setup = request.getfixturevalue(request.param)
    return found


def test_plans_of_every_kind_are_among_them(request: pytest.FixtureRequest) -> None:
    plans = {name: request.getfixturevalue(name).plan for name in KINDS}
    layouts = {name: (plan.public.input_layout, plan.public.output_layout) for name, plan in plans.items()}
    squares = {step.kind for plan in plans.values() for step in plan.steps[1::2]}
    assert squares == {"plain", "joined", "parted"}
    assert layouts["regression"][0].mixes
    assert not layouts["real"][0].mixes
    assert (layouts["large_image"][0].ciphertexts, layouts["large_image"][0].mixes) == (3, True)
    assert layouts["many_logits"][1].ciphertexts == 3
    assert layouts["two_wide_pairs"][0].ciphertexts == 2
    assert [plans["odd_spread"].steps[1].inputs, plans["odd_spread"].steps[1].outputs] == [3, 2]
    assert [plans["pair_spread"].steps[1].inputs, plans["pair_spread"].steps[1].outputs] == [2, 2]
    assert all(layouts[name][0].images == 2 for name in PAIRS)


@pytest.mark.parametrize("seed", range(3))
def test_both_engines_are_within_the_bound_and_agree_within_it(setup: Setup, seed: int) -> None:
    public = setup.plan.public
    images = [np.zeros, np.ones][seed]((public.images, *setup.network.input_shape)) if seed < 2 else setup.images(seed)
    expected = setup.network(images)
    np.testing.assert_allclose(ClearEngine(setup.plan).predict(images), expected, rtol=0, atol=1e-9)
    uploads = setup.holder.encrypt(images)
    reference = setup.holder.decrypt(setup.engine.evaluate(uploads, setup.keys))
    fast = setup.holder.decrypt(setup.vector.evaluate(uploads, setup.vector_keys))
    assert reference.shape == fast.shape == expected.shape
    # Decryption would refuse copies of a logit that disagree, so both replies hold logits in all of their slots.
    for found in (reference, fast):
        assert np.abs(found - expected).max() <= public.logit_error_bound
    assert np.abs(reference - fast).max() <= public.logit_error_bound


def test_slots_without_a_logit_hold_nothing_but_rounding(setup: Setup) -> None:
    layout, public = setup.plan.public.output_layout, setup.plan.public
    images = setup.images(5)
    expected = layout.pack(setup.network(images))
    uploads = setup.holder.encrypt(images)
    for replies in (setup.engine.evaluate(uploads, setup.keys), setup.vector.evaluate(uploads, setup.vector_keys)):
        error = np.abs(setup.slots(replies) - expected)
        assert error.max() <= layout.factor * public.copy_tolerance * np.sqrt(2)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("engine", ["seal", "vector"])
def test_images_of_a_pair_do_not_touch_each_other(name: str, engine: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    public = setup.plan.public

    def predict(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        uploads = setup.holder.encrypt(np.stack([first, second]))
        if engine == "seal":
            return setup.holder.decrypt(setup.engine.evaluate(uploads, setup.keys))
        return setup.holder.decrypt(setup.vector.evaluate(uploads, setup.vector_keys))

    one, other = setup.images(6)
    nothing, everything = np.zeros_like(one), np.ones_like(one)
    logits = setup.network(np.stack([one, other, nothing, everything]))
    assert np.abs(logits[0] - logits[1]).max() > 2 * public.logit_error_bound
    for first, second, wanted in (
        (one, other, [0, 1]),
        (other, one, [1, 0]),
        (one, one, [0, 0]),
        (one, nothing, [0, 2]),
        (everything, one, [3, 0]),
    ):
        assert np.abs(predict(first, second) - logits[wanted]).max() <= public.logit_error_bound


def test_more_or_fewer_ciphertexts_than_planned_are_refused_by_the_fast_engine_too(setup: Setup) -> None:
    uploads = setup.holder.encrypt(setup.images(7))
    expected = setup.plan.public.input_layout.ciphertexts
    for wrong in ([], uploads[1:], [*uploads, uploads[0]], uploads * 2):
        with pytest.raises(FormatError, match=f"{len(wrong)} came; the plan lays its input over {expected}"):
            setup.vector.evaluate(wrong, setup.vector_keys)


def test_any_ciphertext_of_several_that_is_damaged_is_refused(large_image: Setup) -> None:
    uploads = large_image.holder.encrypt(large_image.images(8))
    assert len(uploads) == 3
    for number in range(3):
        damaged = [*uploads]
        damaged[number] = damaged[number][:-1]
        with pytest.raises(FormatError, match="ciphertext"):
            large_image.engine.evaluate(damaged, large_image.keys)
        with pytest.raises(FormatError, match="ciphertext"):
            large_image.vector.evaluate(damaged, large_image.vector_keys)


def test_the_order_of_several_ciphertexts_matters(large_image: Setup) -> None:
    images = large_image.images(9)
    reply = large_image.engine.evaluate(large_image.holder.encrypt(images)[::-1], large_image.keys)
    logits = large_image.holder.decrypt(reply)
    assert np.abs(logits - large_image.network(images)).max() > 10 * large_image.plan.public.logit_error_bound


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bytes(setup: Setup, threads: int) -> None:
    engine = VectorEngine(setup.plan, threads)
    for seed in range(2):
        uploads = setup.holder.encrypt(setup.images(seed))
        alone = setup.vector.evaluate(uploads, setup.vector_keys)
        assert engine.evaluate(uploads, setup.vector_keys) == alone
        assert engine.evaluate(uploads, setup.vector_keys) == alone


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bytes_on_the_cell_network(cell: Setup, threads: int) -> None:
    uploads = cell.holder.encrypt(cell.images(0))
    alone = cell.vector.evaluate(uploads, cell.vector_keys)
    assert VectorEngine(cell.plan, threads).evaluate(uploads, cell.vector_keys) == alone


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["pair_spread", "cell"])
def test_requests_at_the_same_time_give_the_same_bytes_as_alone(
    name: str, threads: int, request: pytest.FixtureRequest
) -> None:
    setup: Setup = request.getfixturevalue(name)
    engine = VectorEngine(setup.plan, threads)
    requests = [setup.holder.encrypt(setup.images(seed)) for seed in range(2)]
    alone = [setup.vector.evaluate(uploads, setup.vector_keys) for uploads in requests]
    rounds, start = 4, threading.Barrier(2)
    replies: dict[int, list[list[bytes]]] = {0: [], 1: []}

    def work(number: int) -> None:
        start.wait()
        for _ in range(rounds):
            replies[number].append(engine.evaluate(requests[number], setup.vector_keys))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in range(2):
        assert replies[number] == [alone[number]] * rounds


def test_a_refused_request_leaves_nothing_behind_for_the_next_one(pair_spread: Setup) -> None:
    uploads = pair_spread.holder.encrypt(pair_spread.images(3))
    before = pair_spread.vector.evaluate(uploads, pair_spread.vector_keys)
    with pytest.raises(FormatError):
        pair_spread.vector.evaluate([uploads[0][:-1]], pair_spread.vector_keys)
    assert pair_spread.vector.evaluate(uploads, pair_spread.vector_keys) == before


# One key set for both plans of a model --------------------------------------------------------------------------------


def test_keys_of_a_model_serve_its_plans_for_one_image_and_for_two(pair: Setup) -> None:
    plans = plan_model(pair.network)
    assert [plan.public.images for plan in plans] == [1, 2]
    first = KeyHolder(plans[0].public)
    keys = first.evaluation_keys()
    for engine_type in (type(pair.engine), VectorEngine):
        engines = [engine_type(plan) for plan in plans]
        # Loaded once, by whichever engine.
        for loader in engines:
            loaded = loader.load_keys(keys)
            for plan, engine in zip(plans, engines, strict=True):
                holder = first.serving(plan.public)
                images = np.random.default_rng(4).random((plan.public.images, *pair.network.input_shape))
                found = holder.decrypt(engine.evaluate(holder.encrypt(images), loaded))
                assert np.abs(found - pair.network(images)).max() <= plan.public.logit_error_bound
