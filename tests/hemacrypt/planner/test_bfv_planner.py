"""Exact plans: walked in the clear they give the quantised network's integers; what cannot be planned is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hemacrypt.embedded import bundle_path, sample
from hemacrypt.engines.clear.bfv import ClearBfvEngine, combine
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan
from hemacrypt.planner import plan_model
from hemacrypt.planner.bfv_noise import BfvNoiseModel
from hemacrypt.planner.latency.bfv import plan_bfv, plan_bfv_bundle, quantised_for

PAPER_MODULI = (957181001729, 957181034497)
# The next prime of the kind: quadratics' logits need a little more than the paper's two hold.
THREE_MODULI = (*PAPER_MODULI, 957181526017)


def random_network(seed: int, squares: int, shape: tuple[int, int, int], decades: float = 0.0) -> CollapsedNetwork:
    """Make a network: a convolution, then dense layers with a square between each two."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-decades, decades)
    kernel = scale * rng.normal(size=(int(rng.integers(1, 4)), shape[0], 2, 2))
    layers: list[Linear] = [Convolution(kernel, scale * rng.normal(size=len(kernel)), shape, int(rng.integers(1, 3)))]
    for number in range(squares):
        outputs = int(rng.integers(1, 9 if number < squares - 1 else 4))
        weight = rng.normal(size=(outputs, layers[-1].outputs)) / layers[-1].outputs
        layers.append(Dense(weight, rng.normal(size=outputs)))
    network = CollapsedNetwork(shape, tuple(layers))
    return network.calibrated(rng.random((20, *shape)))


def assert_exact(network: CollapsedNetwork, plan: BfvPlan, seed: int = 0) -> None:
    assert_exact_on(network, plan, np.random.default_rng(seed).random((plan.public.images, *network.input_shape)))


def assert_exact_on(network: CollapsedNetwork, plan: BfvPlan, images: Array) -> None:
    integers = quantised_for(network, plan).integers(images)
    found = ClearBfvEngine(plan).predict_integers(images)
    assert found.tolist() == integers.astype(object).tolist()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.read(bundle_path())


@pytest.fixture(scope="module")
def cell(bundle: Bundle) -> Array:
    """One sample cell, shape (1, 3, size, size)."""
    return bundle.manifest.preprocessing(sample()[0].path)[None]


@pytest.fixture(scope="module")
def embedded(bundle: Bundle) -> BfvPlan:
    return plan_bfv_bundle(bundle)


def test_the_embedded_network_is_planned_on_the_ring_of_ckks_and_is_exact(bundle: Bundle, embedded: BfvPlan) -> None:
    public = embedded.public
    assert public.parameters == plan_model(bundle.network)[0].parameters
    assert public.proven
    assert min(embedded.noise_budgets) > 0
    registered = {group.level: group for group in plan_model(bundle.network)[0].public.keys}
    for group in public.keys:
        # The last map of CKKS has a row more, the guard, and other turns.
        assert set(group.elements) <= set(registered[group.level].elements) or group.level == 1
        assert group.relinearise <= registered[group.level].relinearise
    assert 2 * public.largest_logit < math.prod(public.plain_moduli)
    assert_exact(bundle.network, embedded)


def test_measured_magnitudes_need_fewer_moduli_and_only_levels_of_ckks(
    bundle: Bundle, embedded: BfvPlan, cell: Array
) -> None:
    plan = plan_bfv_bundle(bundle, magnitudes="measured")
    assert len(plan.public.plain_moduli) < len(embedded.public.plain_moduli)
    assert not plan.public.proven
    assert [step.level for step in plan.steps] == [5, 4, 3, 2, 1]
    assert plan.public.output_level == 0
    assert plan.step_measured is not None
    assert plan.public.largest_logit == 16 * plan.step_measured[-1]
    # Measured magnitudes hold for images like those trained on: noise exceeds them.
    assert_exact_on(bundle.network, plan, cell)


def test_two_images_lie_in_the_two_rows(bundle: Bundle) -> None:
    plan = plan_bfv_bundle(bundle, images=2)
    assert plan.public.images == 2
    assert not any(
        turn.conjugate for step in plan.steps if isinstance(step, BfvLinear) for g in step.turns for turn in g
    )
    assert_exact(bundle.network, plan)


def test_the_papers_parameters_are_checked_and_serve(bundle: Bundle, cell: Array) -> None:
    plan = plan_bfv_bundle(bundle, degree=16384, plain_moduli=THREE_MODULI, magnitudes="measured")
    assert plan.public.plain_moduli == THREE_MODULI
    assert plan.parameters.degree == 16384
    assert min(plan.noise_budgets) > 0
    assert_exact_on(bundle.network, plan, cell)
    with pytest.raises(PlanError, match=r"need 1.. bits.*hold 79.*dense 4096→64.*measured magnitudes"):
        plan_bfv_bundle(bundle, degree=16384, plain_moduli=PAPER_MODULI)
    with pytest.raises(PlanError, match=r"noise budget for plaintext moduli of 40 bits is used up by step . "):
        plan_bfv_bundle(bundle, degree=8192, plain_moduli=THREE_MODULI, magnitudes="measured")


@pytest.mark.parametrize(
    ("moduli", "reason"),
    [
        ((957181001731, 957181034497), "957181001731 is no prime"),
        ((1073479681, 957181001729), "1073479681 also stands in the modulus chain"),
        ((957181001729, 957181001729), "all different"),
    ],
)
def test_unusable_plaintext_moduli_are_refused(bundle: Bundle, moduli: tuple[int, ...], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan_bfv_bundle(bundle, degree=8192, plain_moduli=moduli)


def test_the_parameters_of_a_ckks_plan_can_be_used(bundle: Bundle) -> None:
    parameters = plan_model(bundle.network)[0].parameters
    assert plan_bfv_bundle(bundle, parameters=parameters).parameters == parameters
    with pytest.raises(PlanError, match="degree 4096 was asked for, and parameters of degree 8192"):
        plan_bfv_bundle(bundle, parameters=parameters, degree=4096)


def networks() -> Iterator[tuple[str, CollapsedNetwork]]:
    rng = np.random.default_rng(30)
    yield "regression", CollapsedNetwork((1, 4, 4), (Dense(rng.normal(size=(3, 16)), rng.normal(size=3)),))
    yield "one value", CollapsedNetwork((1, 1, 1), (Dense(np.array([[3.7]]), np.array([-1e-3])),))
    wide = Dense(rng.normal(size=(5000, 4)) / 2, rng.normal(size=5000) / 4)
    yield (
        "two ciphertexts",
        CollapsedNetwork((1, 2, 2), (wide, Dense(rng.normal(size=(2, 5000)) / 500, rng.normal(size=2)))),
    )
    yield "large image", CollapsedNetwork((6, 32, 64), (Dense(rng.normal(size=(3, 12288)) / 60, rng.normal(size=3)),))
    yield "many logits", CollapsedNetwork((1, 4, 4), (Dense(rng.normal(size=(5000, 16)) / 4, rng.normal(size=5000)),))
    yield "negative inputs", CollapsedNetwork((1, 2, 2), (wide, Dense(wide.weight.T / 99, np.ones(4))), (-1.0, 1.0))
    yield "four squares", random_network(31, 4, (1, 5, 5))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("name", "network"), [pytest.param(*pair, id=pair[0]) for pair in networks()])
def test_the_clear_engine_gives_the_integers_of_the_quantised_network(
    name: str, network: CollapsedNetwork, images: int
) -> None:
    plan = plan_bfv(network, name, images=images)
    assert min(plan.noise_budgets) > 0
    assert_exact(network, plan)


@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 30), squares=st.integers(0, 3), channels=st.integers(1, 3), images=st.integers(1, 2))
def test_random_networks_are_exact(seed: int, squares: int, channels: int, images: int) -> None:
    network = random_network(seed, squares, (channels, 6, 5), decades=3.0)
    assert_exact(network, plan_bfv(network, images=images), seed)


def test_keys_are_exactly_those_that_the_steps_use(embedded: BfvPlan) -> None:
    needed: dict[int, set[int]] = {}
    for step in embedded.steps:
        found = needed.setdefault(step.level, set())
        if isinstance(step, BfvLinear):
            turns = [(copy.step, False) for copy in step.copies[step.inputs :]]
            turns += [(step.giant_step, False)] * any(len(giants) > 1 for giants in step.giants)
            turns += [tuple(turn) for group in step.turns for turn in group]
            found |= {embedded.parameters.galois_element(*turn) for turn in turns}
    assert {group.level: set(group.elements) for group in embedded.public.keys} == needed


def test_budgets_are_those_of_the_largest_modulus(embedded: BfvPlan) -> None:
    budgets = [
        BfvNoiseModel(embedded.parameters, modulus).budgets(embedded.steps, embedded.steps[0].inputs)[-1]
        for modulus in embedded.public.plain_moduli
    ]
    assert embedded.noise_budgets[-1] == min(budgets) == budgets[-1]


def test_a_refusal_names_the_layer_and_what_to_do() -> None:
    rng = np.random.default_rng(32)
    layers: list[Linear] = [Dense(rng.normal(size=(8, 4)), rng.normal(size=8))]
    layers += [Dense(rng.normal(size=(8, 8)), rng.normal(size=8)) for _ in range(12)]
    with pytest.raises(PlanError, match="12 squares need relinearisation keys"):
        plan_bfv(CollapsedNetwork((1, 2, 2), tuple(layers)))
    with pytest.raises(PlanError, match=r"step \d+ \(.*\).*grow most in layer \d+ \(dense 8→8\).*use fewer squares"):
        plan_bfv(CollapsedNetwork((1, 2, 2), tuple(layers[:4])), degree=8192)


def test_measured_magnitudes_must_have_been_measured() -> None:
    with pytest.raises(PlanError, match="calibrate it on training data or plan with the worst case"):
        plan_bfv(CollapsedNetwork((1, 1, 2), (Dense(np.ones((1, 2)), np.zeros(1)),)), magnitudes="measured")


def test_absurd_networks_are_refused() -> None:
    huge = CollapsedNetwork((1, 1, 2), (Dense(np.array([[1e300, 1e-300]]), np.zeros(1)), Dense(np.ones((1, 1)), [1e9])))
    with pytest.raises(PlanError):
        plan_bfv(huge)
    with pytest.raises(PlanError, match="only zero weights"):
        plan_bfv(CollapsedNetwork((1, 1, 2), (Dense(np.zeros((1, 2)), np.ones(1)),)))
    with pytest.raises(PlanError, match="3 images"):
        plan_bfv(CollapsedNetwork((1, 1, 2), (Dense(np.ones((1, 2)), np.ones(1)),)), images=3)


def test_a_key_budget_is_kept_or_refused(bundle: Bundle, embedded: BfvPlan) -> None:
    with pytest.raises(PlanError, match=r"the budget is 1\.0 MB"):
        plan_bfv_bundle(bundle, key_budget=1_000_000)


def test_a_plan_is_the_same_every_time(bundle: Bundle, embedded: BfvPlan) -> None:
    again = plan_bfv_bundle(bundle)
    assert again.public.plan_id == embedded.public.plan_id
    assert again.weight_scales == embedded.weight_scales


def test_another_networks_integers_are_not_given_for_a_plan(embedded: BfvPlan) -> None:
    other = random_network(3, 2, (3, 32, 32))
    with pytest.raises(PlanError, match="made for another network"):
        quantised_for(other, embedded)


def test_residues_are_put_together_around_zero() -> None:
    moduli = (65537, 114689, 957181001729)
    product = math.prod(moduli)
    numbers = [0, 1, -1, product // 2, -(product // 2), 123456789012345]
    residues = [np.array([number % modulus for number in numbers]) for modulus in moduli]
    assert combine(residues, moduli).tolist() == numbers
