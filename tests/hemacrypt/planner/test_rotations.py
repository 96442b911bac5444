"""Splits into copies and giant steps, turns that add up, budgets for keys, and variances of affine maps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk._crypto import KeyHolder
from hemacrypt.embedded import bundle_path
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense, Linear
from hemacrypt.plan.plan import Layout, LinearStep, Plan, Turn, united
from hemacrypt.planner import KEY_BUDGET, costs, noise, plan_model, plan_network
from hemacrypt.planner.latency.choices import WORTH_A_MEGABYTE, Chooser
from hemacrypt.planner.latency.diagonals import Grid, MatrixForm, forms, image_grid
from hemacrypt.planner.latency.rotations import Split, arrange, splits, turn_groups
from hemacrypt.seal import sizes
from tests.hemacrypt.planner.test_planner import SHARED, chain_of, sample_plan
from tests.hemacrypt.setups import Setup

FEW = settings(deadline=None, derandomize=True, database=None, max_examples=40)


@st.composite
def matrix_forms(draw: st.DrawFn) -> MatrixForm:
    """Draw a form of a dense layer or a convolution on any layout, real or complex, one ciphertext or several."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    slots = draw(st.sampled_from([64, 256]))
    shape = (draw(st.integers(1, 5)), draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    grid: Grid | None = image_grid(shape, slots)
    inputs = math.prod(shape)
    if draw(st.booleans()):
        kernel = rng.normal(size=(draw(st.integers(1, 4)), shape[0], 2, 2))
        padding = ((0, draw(st.integers(0, 1))), (draw(st.integers(0, 1)), 0))
        layer: Linear = Convolution(kernel, rng.normal(size=len(kernel)), shape, draw(st.integers(1, 2)), padding)
    else:
        outputs = draw(st.integers(1, 2 * slots))
        weight = rng.normal(size=(outputs, inputs)) * (rng.random((outputs, inputs)) < draw(st.sampled_from([0.05, 1])))
        weight[0, 0] = 1.0
        layer = Dense(weight, rng.normal(size=outputs))
    if grid is None:
        source = Layout(np.arange(inputs), slots, slots, -(-inputs // slots))
    else:
        period = min(1 << (grid.extent(shape) - 1).bit_length(), slots)
        source = grid.layout(shape, period, slots)
    folded = source.folded()
    if folded.mixes and draw(st.booleans()):
        source = folded
    found = list(forms(layer, layer.entries(), source, grid))
    return found[draw(st.integers(0, len(found) - 1))]


def check_split(form: MatrixForm, split: Split) -> None:
    """Carry a split out on offsets alone: every diagonal is met once, at its own distance."""
    moved = form.shifted(split.shift)
    copies, terms, moves = arrange(moved, split)
    inputs, outputs = form.source.ciphertexts, form.target.ciphertexts
    # The tree: the input first, parents before children, nothing reached twice.
    assert split.offsets[0] == split.parents[0] == 0
    assert len(set(split.offsets)) == len(split.offsets) == len(split.parents)
    assert all(parent < number for number, parent in enumerate(split.parents) if number)
    assert all(0 < step < form.source.slots for step in split.steps[1:])
    # The copies: of every input all offsets, children of one parent side by side.
    reached = [(number, 0) for number in range(inputs)]
    for copy in copies[inputs:]:
        source, offset = reached[copy.parent]
        reached.append((source, offset + copy.step))
    assert sorted(reached) == sorted((source, offset) for source in range(inputs) for offset in split.offsets)
    parents = [copy.parent for copy in copies[inputs:]]
    assert sum(parent != before for parent, before in zip(parents, [-1, *parents], strict=False)) == len(set(parents))
    # The terms: each diagonal once, where giant step and copy add up to its offset.
    assert len(terms) == outputs
    assert all(len(output) == split.giants for output in terms)
    seen: dict[int, tuple[int, int, int, int]] = {}
    for output, giants in enumerate(terms):
        for giant, each in enumerate(giants):
            for term in each:
                assert term.diagonal not in seen
                source, offset = reached[term.copy]
                seen[term.diagonal] = (output, source, giant * split.stride + offset, giant * split.stride)
    wanted = zip(*moved.pairs, moved.offsets.tolist(), moves, strict=True)
    assert [seen[number] for number in range(len(seen))] == [
        (int(output), int(source), offset, move) for output, source, offset, move in wanted
    ]
    assert len(seen) == len(moved.numbers) == len(form.numbers)
    keys = {copy.step for copy in copies[inputs:]} | ({split.stride} if split.giants > 1 else set())
    assert keys == split.keys


@FEW
@given(matrix_forms(), st.integers(0, 5), st.booleans())
def test_every_split_covers_all_diagonals_once(form: MatrixForm, level: int, quiet: bool) -> None:
    ways = splits(form, 8192, level, quiet=quiet)
    assert ways
    for cost, split in ways:
        check_split(form, split)
        assert cost == pytest.approx(
            costs.VECTOR.milliseconds(
                split.count(form.source.ciphertexts, form.target.ciphertexts, len(form.numbers), level), 8192
            )
        )


@FEW
@given(matrix_forms(), st.integers(0, 5))
def test_no_way_to_split_is_beaten_in_both_time_and_keys(form: MatrixForm, level: int) -> None:
    ways = [(cost, len(split.keys)) for cost, split in splits(form, 8192, level)]
    assert ways == sorted(ways)
    for (fast, many), (slow, few) in pairwise(ways):
        assert fast < slow
        assert many > few


def test_the_input_with_the_smallest_scale_is_rotated_only_where_sums_cannot_be() -> None:
    """Few diagonals rotate no input; diagonals far apart would take giant steps without end and rotate it after all."""
    grid = Grid(32, 64)
    source = grid.layout((1, 32, 64), 2048, 2048)
    near = Convolution(np.ones((1, 1, 1, 3)), np.zeros(1), (1, 32, 64), 1, ((0, 0), (1, 1)))
    far = Convolution(np.ones((1, 1, 3, 2)), np.zeros(1), (1, 32, 64), 1, ((1, 1), (0, 1)))
    for layer, rotated in ((near, False), (far, True)):
        form = next(forms(layer, layer.entries(), source, grid))
        for _, split in splits(form, 4096, 1, quiet=True):
            check_split(form, split)
            assert (len(split.offsets) > 1) == rotated


# Turns ----------------------------------------------------------------------------------------------------------------


def added(total: np.ndarray, groups: tuple[tuple[Turn, ...], ...]) -> np.ndarray:
    for group in groups:
        total = total + sum(turn(total) for turn in group)
    return total


@FEW
@given(st.integers(0, 6), st.integers(0, 6), st.booleans(), st.integers(0, 2**16))
def test_groups_of_one_and_of_two_doublings_give_the_same_sum(
    period: int, count: int, conjugate: bool, seed: int
) -> None:
    sums = tuple(1 << power for power in range(period, min(period + count, 8)))
    rng = np.random.default_rng(seed)
    total = rng.normal(size=256) + 1j * rng.normal(size=256)
    expected = total.copy()
    for step in sums:
        expected = expected + np.roll(expected, -step)
    # Twice the real part; the diagonals hold half of it.
    expected = 2 * expected.real if conjugate else expected
    singles, doubles = (turn_groups(sums, conjugate, doublings) for doublings in (1, 2))
    np.testing.assert_allclose(added(total, singles), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(added(total, doubles), expected, rtol=0, atol=1e-10)
    needed = len(sums) + conjugate
    assert [len(group) for group in singles] == [1] * needed
    assert [len(group) for group in doubles] == [3] * (needed // 2) + [1] * (needed % 2)


def test_turns_of_two_doublings_are_written_out() -> None:
    assert turn_groups((4, 8), True, 1) == ((Turn(4),), (Turn(8),), (Turn(0, True),))
    assert turn_groups((4, 8), True, 2) == ((Turn(4), Turn(8), Turn(12)), (Turn(0, True),))
    assert turn_groups((4,), True, 2) == ((Turn(4), Turn(0, True), Turn(4, True)),)
    assert turn_groups((), False, 2) == ()


# Budgets --------------------------------------------------------------------------------------------------------------


def needed(plan: Plan) -> float:
    return sizes.key_bytes(plan.parameters, plan.public.keys)


def test_a_smaller_budget_gives_fewer_keys_and_none_above_it(cell: Setup) -> None:
    budgets = (100_000_000, 25_000_000, 20_000_000, 12_000_000)
    plans = [plan_network(cell.network, key_budget=budget) for budget in budgets]
    sizes = [needed(plan) for plan in plans]
    assert all(size <= budget for size, budget in zip(sizes, budgets, strict=True))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2
    # Fewer keys are paid for with time.
    times = [costs.plan_ms(plan.parameters, plan.steps) for plan in plans]
    assert times == sorted(times)
    with pytest.raises(PlanError, match=r"the evaluation keys would take \d+\.\d MB, the budget is 1\.0 MB; raise"):
        plan_network(cell.network, key_budget=1_000_000)


def test_keys_that_are_made_keep_within_the_budget(one_square: Setup) -> None:
    smallest = plan_network(one_square.network, key_budget=3_000_000)
    assert len(KeyHolder(smallest.public).evaluation_keys().to_bytes()) <= 3_000_000
    assert needed(smallest) < needed(one_square.plan)
    for budget in (0, 1_000_000):
        with pytest.raises(PlanError, match="raise the budget or use a smaller network"):
            plan_network(one_square.network, key_budget=budget)
        with pytest.raises(PlanError, match="raise the budget or use a smaller network"):
            plan_model(one_square.network, key_budget=budget)


@pytest.mark.parametrize("squares", [6, 9])
def test_deep_networks_are_planned_without_a_budget_although_their_keys_are_large(squares: int) -> None:
    network = chain_of(squares, 0.9)
    plan = plan_network(network)
    assert len(plan.steps) == 2 * squares + 1
    assert needed(plan) > KEY_BUDGET
    with pytest.raises(PlanError, match="raise the budget"):
        plan_network(network, key_budget=KEY_BUDGET)
    assert plan_model(network)[0].public.images == 1


def test_the_usual_budget_bends_where_keeping_it_would_cost_ten_times_the_time() -> None:
    rng = np.random.default_rng(8)
    first = Convolution(rng.normal(size=(8, 3, 4, 4)) / 7, np.zeros(8), (3, 32, 32), 2, ((1, 1), (1, 1)))
    second = Convolution(rng.normal(size=(16, 8, 3, 3)) / 8, np.zeros(16), (8, 16, 16), 1, ((1, 1), (1, 1)))
    dense, last = rng.normal(size=(32, 4096)) / 64, rng.normal(size=(2, 32)) / 32
    layers = (first, second, Dense(dense, np.zeros(32)), Dense(last, np.zeros(2)))
    network = CollapsedNetwork((3, 32, 32), layers).calibrated(rng.random((20, 3, 32, 32)))
    plan = plan_network(network, margins={"0.01": 0.05})
    fewest = Chooser(network, "complex", 1, plan.parameters).choose(WORTH_A_MEGABYTE[-1])
    spared = needed(plan) - sizes.key_bytes(fewest.parameters, fewest.keys)
    assert KEY_BUDGET < needed(plan) < 1.5 * KEY_BUDGET
    assert 0 <= spared < 30_000_000
    assert fewest.milliseconds > 5 * costs.plan_ms(plan.parameters, plan.steps)


@pytest.mark.parametrize("budget", [None, 25_000_000, 12_000_000])
def test_the_plans_of_a_model_share_their_keys_within_the_budget(cell: Setup, budget: int | None) -> None:
    plans = plan_model(cell.network, "mine", ("no", "yes"), "f" * 64, key_budget=budget)
    assert [plan.public.images for plan in plans] == [1, 2][: len(plans)]
    assert len(plans) == (1 if budget == 12_000_000 else 2)
    assert len({plan.public.requirements_id for plan in plans}) == 1
    assert len({plan.public.plan_id for plan in plans}) == len(plans)
    assert all(needed(plan) <= (budget or KEY_BUDGET) for plan in plans)
    for plan in plans:
        assert (plan.public.model, plan.public.labels) == ("mine", ("no", "yes"))
        assert plan.public.preprocessing_digest == "f" * 64
        have = {group.level: group for group in plan.public.keys}
        for step in plan.steps:
            elements = {plan.parameters.galois_element(*turn) for turn in step.rotations}
            assert elements <= set(have[step.level].elements if elements else ())
    if len(plans) == 2:
        alone, both = (costs.plan_ms(plan.parameters, plan.steps) for plan in plans)
        assert both / 2 < alone


def test_a_plan_for_one_image_leaves_room_for_the_keys_of_a_pair() -> None:
    """One image alone would take so much of the budget that the rest is too little for a pair."""
    network = Bundle.read(bundle_path()).network
    single, pair = plan_network(network), plan_network(network, images=2)
    groups = united([single.public.keys, pair.public.keys])
    assert sizes.key_bytes(single.parameters, groups) > KEY_BUDGET
    plans = plan_model(network)
    assert [plan.public.images for plan in plans] == [1, 2]
    assert needed(plans[0]) <= KEY_BUDGET


# Variances ------------------------------------------------------------------------------------------------------------


def sampled() -> Iterator[Plan]:
    yield from (sample_plan(seed) for seed in range(24))


def check_transfer(plan: Plan, seed: int) -> None:
    model, rng = noise.NoiseModel(plan.parameters), np.random.default_rng(seed)
    for step in plan.steps:
        if isinstance(step, LinearStep):
            peak = rng.uniform(0.5, 2, (step.inputs, plan.parameters.slots))
            transfer = noise.Transfer.of(model, step, peak)
            for typical in (0.0, 1e-12, 1e-6):
                exact = noise.linear_error(model, step, np.full(peak.shape, typical), peak)
                # Only products of two errors are left out.
                np.testing.assert_allclose(transfer.variance(step, typical), exact, rtol=1e-4)


def test_a_transfer_gives_the_variance_of_a_map_where_that_of_its_input_is_constant() -> None:
    for seed, plan in enumerate(sampled()):
        check_transfer(plan, seed)


@pytest.mark.parametrize("name", SHARED)
def test_a_transfer_holds_for_networks_that_are_evaluated(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    check_transfer(setup.plan, 1)
