"""From a network to a plan: parameters, scales, layouts, diagonals and rotations that really compute the network."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.engines.clear import ClearEngine
from hemacrypt.errors import PlanError
from hemacrypt.network import Array, CollapsedNetwork, Convolution, Dense, Linear, Shape
from hemacrypt.plan import Layout, LinearStep, Plan, SquareStep
from hemacrypt.planner import plan_network
from hemacrypt.planner.diagonals import forms, image_grid
from hemacrypt.planner.rotations import baby_tree, best_split, with_intermediates
from hemacrypt.security import LARGEST_MODULUS_BITS
from tests.hemacrypt.setups import Setup


def _with_peak(prefix: CollapsedNetwork, layer: Linear) -> Linear:
    """Scale a layer so that no input makes its outputs exceed 2."""
    peak = float(CollapsedNetwork(prefix.input_shape, (*prefix.linears, layer)).worst_case[-1].max())
    if isinstance(layer, Dense):
        return Dense(layer.weight * 2 / peak, layer.bias * 2 / peak)
    return Convolution(layer.kernel * 2 / peak, layer.bias * 2 / peak, layer.input_shape, layer.stride, layer.padding)


def _any_convolution(rng: np.random.Generator, shape: Shape) -> Convolution:
    padding = tuple((int(rng.integers(0, 3)), int(rng.integers(0, 3))) for _ in range(2))
    height = int(rng.integers(1, min(5, shape[1] + sum(padding[0])) + 1))
    width = int(rng.integers(1, min(5, shape[2] + sum(padding[1])) + 1))
    out = int(rng.integers(1, 6))
    return Convolution(
        rng.normal(size=(out, shape[0], height, width)),
        rng.normal(size=out) / 4,
        shape,
        int(rng.integers(1, 4)),
        (padding[0], padding[1]),
    )


def random_network(seed: int, squares: int, outputs: int, shape: Shape, sparse: bool = False) -> CollapsedNetwork:
    """Return a network of the family: convolutions first, then dense layers, values up to 2 everywhere."""
    rng = np.random.default_rng(seed)
    layers: list[Linear] = []
    current: Shape | None = shape
    width = math.prod(shape)
    for number in range(squares + 1):
        last = number == squares
        convolution = _any_convolution(rng, current) if current and not last and rng.random() < 0.6 else None
        # A convolution that reads nothing but its padding is no layer.
        if convolution is not None and convolution.entries()[2].size:
            layer: Linear = convolution
            current = convolution.output_shape
        else:
            count = outputs if last else int(rng.integers(1, 40))
            weight = rng.normal(size=(count, width))
            if sparse:
                weight *= rng.random(weight.shape) < 0.2
                weight[0, 0] = 1.0
            layer, current = Dense(weight, rng.normal(size=count) / 4), None
        prefix = CollapsedNetwork(shape, tuple(layers)) if layers else None
        first = prefix or CollapsedNetwork(shape, (layer,))
        layers.append(_with_peak(first, layer) if prefix else _scaled_first(shape, layer))
        width = layer.outputs
    return CollapsedNetwork(shape, tuple(layers))


def _scaled_first(shape: Shape, layer: Linear) -> Linear:
    peak = float(CollapsedNetwork(shape, (layer,)).worst_case[0].max())
    if isinstance(layer, Dense):
        return Dense(layer.weight * 2 / peak, layer.bias * 2 / peak)
    return Convolution(layer.kernel * 2 / peak, layer.bias * 2 / peak, layer.input_shape, layer.stride, layer.padding)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(st.integers(0, 2**20), st.integers(0, 3), st.sampled_from([1, 2, 3, 10]), shapes, st.booleans())
def test_the_planned_rotations_and_diagonals_compute_the_network(
    seed: int, squares: int, outputs: int, shape: Shape, sparse: bool
) -> None:
    network = random_network(seed, squares, outputs, shape, sparse)
    engine = ClearEngine(plan_network(network))
    images = np.random.default_rng(seed).random((2, *shape))
    for image, expected in zip(images, network(images), strict=True):
        np.testing.assert_allclose(engine.predict(image), expected, rtol=0, atol=1e-9)
        check_every_slot_is_a_logit_or_zero(engine, image, expected)


def check_every_slot_is_a_logit_or_zero(engine: ClearEngine, image: Array, logits: Array) -> None:
    public = engine.plan.public
    slots = engine.run(public.input_layout.pack(image))[0]
    allowed = np.append(logits, 0.0)
    assert np.abs(slots[:, None] - allowed[None, :]).min(axis=1).max() <= 1e-9
    # Not just any of them: exactly the slots that no logit lies in are zero.
    np.testing.assert_allclose(slots, public.output_layout.pack(logits), rtol=0, atol=1e-9)


@cache
def sample_plan(seed: int) -> Plan:
    shape: Shape = [(3, 8, 8), (1, 5, 7), (2, 4, 9), (1, 1, 6), (3, 6, 3)][seed % 5]
    return plan_network(random_network(seed, seed % 4, [1, 3, 10][seed % 3], shape, seed % 2 == 0))


@pytest.fixture(params=range(25))
def plan(request: pytest.FixtureRequest, cell: Setup) -> Plan:
    """Return each of many plans; the last one is that of the cell network."""
    return cell.plan if request.param == 24 else sample_plan(request.param)


def test_every_rescale_lands_on_the_scale_that_the_next_step_expects(plan: Plan) -> None:
    scale, level = plan.public.input_scale, plan.parameters.top_level
    for step in plan.steps:
        assert step.level == level
        assert step.input_scale == scale
        product = scale * (step.weight_scale if isinstance(step, LinearStep) else scale)
        assert product / plan.parameters.data_primes[level] == pytest.approx(step.output_scale, rel=1e-15)
        scale, level = step.output_scale, level - 1
    assert level == 0
    assert scale == plan.public.output_scale
    assert [type(step) for step in plan.steps] == [LinearStep, SquareStep] * (len(plan.steps) // 2) + [LinearStep]


def test_every_intermediate_value_fits_its_modulus_with_headroom(plan: Plan) -> None:
    for step, peak in zip(plan.steps, plan.step_peaks, strict=True):
        product = step.input_scale * (step.weight_scale if isinstance(step, LinearStep) else step.input_scale)
        assert math.log2(peak * product) + 1 + 4 <= plan.parameters.bits_at(step.level) + 1e-6
        assert math.log2(peak * step.output_scale) + 1 <= plan.parameters.bits_at(step.level - 1)


def test_logits_of_sixteen_times_the_magnitude_fit_the_last_prime(plan: Plan) -> None:
    public = plan.public
    assert plan.step_peaks[-1] * 2**4 * public.output_scale <= plan.parameters.data_primes[0] / 2
    assert public.logit_limit == pytest.approx(plan.parameters.data_primes[0] / 2 / public.output_scale)
    assert public.logit_limit >= 16 * plan.step_peaks[-1]


def test_the_rotation_steps_are_exactly_those_carried_out(plan: Plan) -> None:
    carried_out: set[int] = set()
    for step in plan.steps:
        if isinstance(step, LinearStep):
            carried_out |= {baby.step for baby in step.babies[1:]} | set(step.sums)
            if len(step.giants) > 1:
                carried_out.add(step.giant_step)
    assert set(plan.public.rotation_steps) == carried_out
    assert plan.public.needs_relinearisation == any(isinstance(step, SquareStep) for step in plan.steps)


def test_log2_of_the_slots_bounds_the_number_of_galois_keys(plan: Plan) -> None:
    assert len(plan.public.rotation_steps) <= math.log2(plan.parameters.slots)
    assert all(step & (step - 1) == 0 for step in plan.public.rotation_steps)


def test_no_diagonal_is_zero_and_every_one_is_used_once(plan: Plan) -> None:
    for step in plan.steps:
        if isinstance(step, LinearStep):
            assert np.abs(step.diagonals).max(axis=1).min() > 0
            used = sorted(term.diagonal for terms in step.giants for term in terms)
            assert used == list(range(len(step.diagonals)))
            assert step.babies[0].step == 0
            assert all(baby.parent < number for number, baby in enumerate(step.babies) if number)


def test_parameters_are_the_smallest_secure_ones(plan: Plan) -> None:
    squares = sum(isinstance(step, SquareStep) for step in plan.steps)
    assert len(plan.parameters.data_primes) == len(plan.steps) + 1
    assert plan.parameters.special_prime > max(plan.parameters.data_primes)
    assert plan.parameters.degree == {0: 4096, 1: 8192, 2: 8192, 3: 16384}[squares]
    assert plan.parameters.modulus_bits <= LARGEST_MODULUS_BITS[plan.parameters.degree]


def test_every_smaller_degree_is_rejected_with_a_reason(plan: Plan) -> None:
    for degree in (4096, 8192):
        said = any(f"degree {degree} was rejected" in reason for reason in plan.reasons)
        assert said == (degree < plan.parameters.degree)


def test_a_smaller_degree_is_rejected_for_bits_or_for_slots() -> None:
    wide = plan_network(CollapsedNetwork((3, 32, 32), (Dense(np.ones((2, 3072)) / 1000, np.zeros(2)),)))
    assert wide.parameters.degree == 8192
    assert any("degree 4096 was rejected: 4096 slots exceed its 2048" in reason for reason in wide.reasons)
    deep = sample_plan(1)
    assert any("degree 4096 was rejected: 150 bits exceed its 109" in reason for reason in deep.reasons)


def test_the_cell_network_runs_at_degree_8192_with_six_data_primes(cell: Setup) -> None:
    parameters = cell.plan.parameters
    assert (parameters.degree, len(parameters.data_primes), parameters.modulus_bits) == (8192, 6, 210)
    assert [step.level for step in cell.plan.steps] == [5, 4, 3, 2, 1]
    assert cell.plan.calibrated


def test_the_convolution_of_the_cell_network_has_144_diagonals_and_28_rotations(cell: Setup) -> None:
    convolution = cell.plan.steps[0]
    assert isinstance(convolution, LinearStep)
    assert convolution.multiplications == 144
    assert len(convolution.rotation_steps) == 28
    linear = cell.network.linears[0]
    grid = image_grid((3, 32, 32), 4096)
    assert grid is not None
    source = Layout(grid.positions((3, 32, 32), 4096), 4096, 4096)
    form = forms(linear, source, grid)[0]
    assert len(form.offsets) == 144
    split = best_split(form)
    assert split.rotations == 28
    assert len(baby_tree(split)) == len(split.babies)


def test_dense_layers_of_the_cell_network_need_one_diagonal_per_row(cell: Setup) -> None:
    assert [step.multiplications for step in cell.plan.steps if isinstance(step, LinearStep)] == [144, 64, 2]
    assert [step.sums for step in cell.plan.steps if isinstance(step, LinearStep)][1:] == [
        (64, 128, 256, 512, 1024, 2048),
        (2, 4, 8, 16, 32),
    ]


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.sets(st.integers(0, 4095), min_size=1, max_size=30))
def test_baby_steps_are_reached_by_powers_of_two_from_babies_that_exist(offsets: set[int]) -> None:
    reached = with_intermediates(np.array(sorted(offsets), dtype=np.int64))
    assert offsets | {0} <= set(reached)
    for offset in reached:
        if offset:
            parents = {offset - (1 << bit) for bit in range(12) if offset >> bit & 1}
            assert parents & set(reached)


def test_a_network_is_planned_the_same_way_every_time(cell: Setup) -> None:
    again = plan_network(cell.network)
    assert again.public.plan_id == cell.plan.public.plan_id
    for one, other in zip(again.steps, cell.plan.steps, strict=True):
        if isinstance(one, LinearStep) and isinstance(other, LinearStep):
            np.testing.assert_array_equal(one.diagonals, other.diagonals)


def test_the_public_half_holds_no_weights(cell: Setup) -> None:
    numbers: list[float] = []
    for value in vars(cell.plan.public).values():
        if isinstance(value, float):
            numbers.append(value)
        elif isinstance(value, Layout):
            assert set(vars(value)) == {"positions", "period", "slots"}
    assert len(numbers) == 4


def test_a_layer_of_one_value_is_planned() -> None:
    one = Dense(np.array([[2.0]]), np.array([0.5]))
    network = CollapsedNetwork((1, 1, 1), (one, one))
    assert ClearEngine(plan_network(network)).predict([0.5])[0] == pytest.approx(2 * 1.5**2 + 0.5)


def chain_of(count: int, factor: float = 1.0) -> CollapsedNetwork:
    """Return a network with ``count`` squares whose values stay between 0 and 1."""
    layers = [Dense(np.eye(4) * factor, np.zeros(4)) for _ in range(count + 1)]
    return CollapsedNetwork((1, 2, 2), tuple(layers))


EYE = Dense(np.eye(4), np.zeros(4))


def one_dense(outputs: int, shape: Shape, weight: float = 1.0) -> CollapsedNetwork:
    return CollapsedNetwork(shape, (Dense(np.full((outputs, math.prod(shape)), weight), np.zeros(outputs)),))


def squared(before: float, after: float) -> CollapsedNetwork:
    layers = (Dense(np.full((4, 4), before), np.zeros(4)), Dense(np.full((1, 4), after), np.zeros(1)))
    return CollapsedNetwork((1, 2, 2), layers)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (chain_of(14), "14 squares need 930 modulus bits .* degree 32768 allows 881 bits"),
        (chain_of(12, 30.0), "logits up to|values up to"),
        (chain_of(13, 1e3), "logits up to|values up to"),
        (one_dense(1, (3, 128, 128)), "the widest layer 65536 slots; degree 32768 allows .* and 16384 slots"),
        (one_dense(20_000, (1, 2, 2)), "the widest layer 32768 slots"),
        (
            CollapsedNetwork((1, 2, 2), (EYE, Dense(np.zeros((1, 4)), np.ones(1)))),
            r"layer 1 \(dense 4→1\) has only zero",
        ),
        (
            CollapsedNetwork((1, 2, 2), (Convolution(np.zeros((1, 1, 1, 1)), np.ones(1), (1, 2, 2)),)),
            "only zero weights",
        ),
        (one_dense(1, (1, 2, 2), 1e9), r"logits up to 4e\+09 .* scale the last layer down"),
        (squared(1e7, 1e-15), "values up to .* train with smaller activations"),
        (squared(1e300, 1e300), "logits up to|values up to"),
    ],
    ids=[
        "14-squares",
        "12-growing-squares",
        "13-overflowing-squares",
        "image-too-large",
        "layer-too-wide",
        "zero-dense",
        "zero-conv",
        "huge-logits",
        "huge-activations",
        "overflow",
    ],
)
def test_a_network_that_no_parameters_serve_is_refused_with_a_reason(network: CollapsedNetwork, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_network(network)


@pytest.mark.parametrize("magnitude", [2.0**-20, 0.01, 0.2, 0.5, 1.0, 30.0])
def test_calibrated_logits_of_any_moderate_magnitude_are_planned(magnitude: float) -> None:
    network = CollapsedNetwork((1, 2, 2), (Dense(np.full((1, 4), magnitude / 4), np.zeros(1)),), (0.0, 1.0))
    plan = plan_network(network.calibrated(np.ones((1, 4))))
    assert plan.step_peaks == (magnitude,)
    assert plan.public.logit_limit >= 16 * magnitude


def test_labels_and_name_reach_the_public_plan() -> None:
    network = CollapsedNetwork((1, 2, 2), (Dense(np.ones((2, 4)), np.zeros(2)),))
    public = plan_network(network, name="mine", labels=("no", "yes")).public
    assert (public.model, public.labels) == ("mine", ("no", "yes"))
    assert plan_network(network).public.labels == ("logit 0", "logit 1")
    with pytest.raises(PlanError, match="3 labels for 2 logits"):
        plan_network(network, labels=("a", "b", "c"))
