"""Keys that serve lower levels than their own, and plans of both schemes that share one set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest

from client_sdk._crypto import BatchKeyHolder, KeyHolder
from hemacrypt.engines.seal.bfv import BfvSealEngine
from hemacrypt.engines.seal.ckks import SealEngine
from hemacrypt.engines.vector.batch import BatchEngine
from hemacrypt.engines.vector.bfv import BfvVectorEngine
from hemacrypt.engines.vector.ckks import VectorEngine
from hemacrypt.errors import PlanError
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, BfvSquare
from hemacrypt.plan.plan import KeyGroup, LinearStep, Plan, Turn, united, without_repeats
from hemacrypt.planner import offer as planning
from hemacrypt.planner import plan_layouts
from hemacrypt.planner.latency.bfv import plan_bfv, quantised_for
from hemacrypt.planner.offer import Layouts
from hemacrypt.seal.sizes import key_bytes
from tests.hemacrypt.batches import random_network
from tests.hemacrypt.setups import Setup


def test_a_key_stands_where_it_is_first_needed_only() -> None:
    groups = (
        KeyGroup(5, False, (3, 9)),
        KeyGroup(4, True, (3, 27)),
        KeyGroup(3, False, (3, 9)),
        KeyGroup(2, True, ()),
        KeyGroup(1, True, (5, 27)),
    )
    assert without_repeats(groups) == (KeyGroup(5, False, (3, 9)), KeyGroup(4, True, (27,)), KeyGroup(1, False, (5,)))
    assert without_repeats(without_repeats(groups)) == without_repeats(groups)
    assert without_repeats(()) == ()


def _all_at_the_top(plan: Plan) -> Plan:
    """Ask for every key at the highest level only."""
    groups = plan.public.keys
    elements = tuple(sorted({element for group in groups for element in group.elements}))
    keys = (KeyGroup(plan.parameters.top_level, any(group.relinearise for group in groups), elements),)
    return replace(plan, public=replace(plan.public, keys=keys))


@pytest.mark.parametrize("name", ["one_square", "pair", "spread"])
def test_keys_of_the_highest_level_serve_all_others(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    plan = _all_at_the_top(setup.plan)
    assert len(setup.plan.public.keys) > 1
    holder = KeyHolder(plan.public)
    keys, images = holder.evaluation_keys(), setup.images(4)
    uploads = holder.encrypt(images)
    clear = setup.network(images)
    for engine in (SealEngine(plan), VectorEngine(plan)):
        loaded: Any = engine.load_keys(keys)
        for _ in range(2):
            found = holder.decrypt(engine.evaluate(uploads, loaded))
            assert np.abs(found - clear).max() <= plan.public.logit_error_bound


def test_keys_of_the_highest_level_serve_batches() -> None:
    network = random_network(1, 2)
    batch = plan_layouts(network).batch
    assert batch is not None
    assert len(batch.relinearisation_levels) == 2
    keys = (KeyGroup(batch.parameters.top_level, True, ()),)
    batch = replace(batch, public=replace(batch.public, keys=keys))
    holder, engine = BatchKeyHolder(batch.public), BatchEngine(batch)
    images = np.random.default_rng(3).uniform(-1, 1, (4, *network.input_shape))
    loaded = engine.load_keys(holder.evaluation_keys())
    found = holder.decrypt(engine.evaluate(holder.encrypt(images), loaded), 4)
    assert np.abs(found - network(images)).max() <= batch.public.logit_error_bound


@pytest.fixture(scope="module")
def network() -> CollapsedNetwork:
    rng = np.random.default_rng(30)
    layers = (
        Dense(rng.normal(size=(12, 32)) / 6, rng.normal(size=12) / 3),
        Dense(rng.normal(size=(3, 12)) / 3, rng.normal(size=3)),
    )
    return CollapsedNetwork((2, 4, 4), layers).calibrated(rng.random((50, 2, 4, 4)))


@pytest.fixture(scope="module")
def both(network: CollapsedNetwork) -> Layouts:
    return plan_layouts(network, exact=True)


def _needed(plan: Plan | BfvPlan) -> set[tuple[int, int]]:
    """Return level and Galois element of every key that a plan uses; element 1 stands for relinearisation."""
    found: set[tuple[int, int]] = set()
    for step in plan.steps:
        if isinstance(step, BfvLinear):
            turns = {Turn(copy.step) for copy in step.copies[step.inputs :]} | {
                t for group in step.turns for t in group
            }
            turns |= {Turn(step.giant_step)} if step.giant_step else set()
        else:
            turns = set() if isinstance(step, BfvSquare) else set(step.rotations)
            found |= set() if isinstance(step, LinearStep) else {(step.level, 1)}
        found |= {(step.level, plan.parameters.galois_element(*turn)) for turn in turns}
    return found


def test_plans_of_both_schemes_share_parameters_and_keys(both: Layouts) -> None:
    (exact,) = both.exact
    assert both.no_exact == ""
    assert both.batch is not None
    every = (*both.plans, exact, both.batch)
    assert len({plan.public.requirements_id for plan in every}) == 1
    assert len({plan.public.plan_id for plan in every}) == len(every)
    for plan in (*both.plans, exact):
        for level, element in _needed(plan):
            served = [
                group.level
                for group in plan.public.keys
                if element in group.elements or (element == 1 and group.relinearise)
            ]
            assert max(served) >= level


def test_one_secret_and_one_key_set_serve_both_schemes(network: CollapsedNetwork, both: Layouts) -> None:
    (exact,), holder = both.exact, KeyHolder(both.plans[0].public)
    keys, images = holder.evaluation_keys(), np.random.default_rng(31).random((1, 2, 4, 4))
    clear, expected = network(images), quantised_for(network, exact).integers(images)
    exactly = holder.serving_exact(exact.public)
    pairs: list[tuple[Any, Any]] = [
        (SealEngine(both.plans[0]), BfvSealEngine(exact)),
        (VectorEngine(both.plans[0]), BfvVectorEngine(exact)),
    ]
    for approximate, other in pairs:
        loaded = approximate.load_keys(keys)
        found = holder.decrypt(approximate.evaluate(holder.encrypt(images), loaded))
        assert np.abs(found - clear).max() <= both.plans[0].public.logit_error_bound
        integers = exactly.decrypt_integers(other.evaluate(exactly.encrypt(images), loaded))
        assert [[int(n) for n in row] for row in integers] == [[int(n) for n in row] for row in expected]


def test_without_being_asked_nothing_is_planned_exactly(network: CollapsedNetwork, both: Layouts) -> None:
    alone = plan_layouts(network)
    assert (alone.exact, alone.no_exact) == ((), "not asked for")
    assert alone.plans[0].parameters == both.plans[0].parameters


def test_a_reason_is_given_when_bfv_is_refused(network: CollapsedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object, **named: object) -> NoReturn:
        raise PlanError("layer 1 is at fault")

    monkeypatch.setattr(planning, "plan_bfv", refuses)
    refused = plan_layouts(network, exact=True)
    assert (refused.exact, refused.no_exact) == ((), "layer 1 is at fault")
    assert refused.plans[0].public.keys == plan_layouts(network).plans[0].public.keys


def test_keys_beyond_the_budget_leave_bfv_out(network: CollapsedNetwork) -> None:
    alone = plan_layouts(network)
    first = alone.plans[0].public
    needed = key_bytes(first.parameters, first.keys)
    exact = plan_bfv(network, parameters=first.parameters)
    together = key_bytes(first.parameters, without_repeats(united([first.keys, exact.public.keys])))
    layouts = plan_layouts(network, exact=True, key_budget=round(max(needed, together) * 1.01))
    assert layouts.exact
    assert key_bytes(first.parameters, layouts.exact[0].public.keys) <= max(needed, together) * 1.01
    if together > needed * 1.02:
        tight = plan_layouts(network, exact=True, key_budget=round(needed * 1.01))
        assert not tight.exact or key_bytes(first.parameters, tight.exact[0].public.keys) <= needed * 1.01
        assert bool(tight.no_exact) == (not tight.exact)
