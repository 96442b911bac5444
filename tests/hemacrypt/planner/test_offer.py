"""A network planned for all layouts at once: one key set, within the budget, and what is better for how many images."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from hemacrypt.cli import application
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.plan.plan import PRIME_LIMIT
from hemacrypt.planner import KEY_BUDGET, plan_bundle, plan_bundle_layouts, plan_layouts
from hemacrypt.planner.offer import Layouts, compare_layouts, describe_comparison
from hemacrypt.seal.evaluation_keys import largest_key_set
from hemacrypt.seal.sizes import key_bytes
from tests.hemacrypt.batches import random_network


@pytest.fixture(scope="module")
def layouts(bundle: Bundle) -> Layouts:
    return plan_bundle_layouts(bundle)


def test_all_plans_need_the_same_keys_and_these_fit_the_budget(layouts: Layouts) -> None:
    assert layouts.batch is not None
    publics = [*(plan.public for plan in layouts.plans), layouts.batch.public]
    assert len({public.requirements_id for public in publics}) == 1
    assert len({public.plan_id for public in publics}) == len(publics)
    assert len({largest_key_set(public) for public in publics}) == 1
    assert key_bytes(layouts.batch.parameters, layouts.batch.public.keys) <= KEY_BUDGET


def test_the_keys_have_a_relinearisation_key_wherever_a_batch_needs_one() -> None:
    for squares in (1, 2):
        layouts = plan_layouts(random_network(1, squares))
        assert layouts.batch is not None
        assert layouts.batch.relinearisation_levels
        groups = {group.level: group for group in layouts.plans[0].public.keys}
        assert all(groups[level].relinearise for level in layouts.batch.relinearisation_levels)


def test_a_tight_budget_makes_room_or_leaves_batches_out(bundle: Bundle) -> None:
    (smallest, *_) = plan_bundle(bundle)
    for budget in (34_000_000, 20_000_000, 12_000_000):
        try:
            layouts = plan_bundle_layouts(bundle, budget)
        except PlanError:
            continue
        assert key_bytes(smallest.parameters, layouts.plans[0].public.keys) <= budget
        assert (layouts.batch is None) == bool(layouts.no_batch)


def test_a_network_that_cannot_be_batched_is_planned_all_the_same() -> None:
    weight = np.ones((3, 8))
    weight[1] = 0
    network = CollapsedNetwork((1, 2, 4), (Dense(weight, np.ones(3)), Dense(np.ones((2, 3)), np.zeros(2))))
    layouts = plan_layouts(network)
    assert layouts.batch is None
    assert "zero weights" in layouts.no_batch
    assert layouts.break_even is None
    assert layouts.plans[0].public.images == 1
    with pytest.raises(PlanError, match="zero weights"):
        describe_comparison(layouts, 100)


def test_the_cheapest_plan_for_few_images_is_compared(layouts: Layouts) -> None:
    assert layouts.batch is not None
    single = layouts.plans[0]
    dearer = replace(single, steps=single.steps * 2)
    both, alone = (compare_layouts(given, layouts.batch, 1000) for given in ((dearer, single), single))
    assert both == alone
    assert layouts.break_even == compare_layouts(layouts.plans, layouts.batch, 1).break_even
    assert layouts.break_even is not None
    # Two images in one request are cheaper than one each, so batches pay later.
    assert alone.break_even is not None
    assert (layouts.break_even > alone.break_even) == (len(layouts.plans) > 1)


def test_nothing_in_a_public_batch_plan_is_beyond_what_it_may_be(layouts: Layouts) -> None:
    assert layouts.batch is not None
    assert all(prime < PRIME_LIMIT for prime in layouts.batch.parameters.data_primes)


def test_the_command_explains_which_layout_suits(layouts: Layouts) -> None:
    runner = CliRunner()
    for images, better in ((3, "latency"), (4096, "batch"), (100_000, "batch")):
        done = runner.invoke(application(), ["plan", "--images", str(images), "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["layout"], told["images"], told["break_even"]) == (better, images, layouts.break_even)
        assert told["batch"]["ciphertexts"] == {"input": 3072, "output": 2}
    done = runner.invoke(application(), ["plan", "--images", "4096"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "better sent in batches" in done.stdout
    assert f"from {layouts.break_even} images on" in done.stdout
