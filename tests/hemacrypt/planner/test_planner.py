"""From a network to a plan: parameters, scales, layouts, diagonals and rotations that really compute the network."""

from __future__ import annotations

import math
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.engines.clear.ckks import ClearEngine
from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear, Shape
from hemacrypt.plan.plan import Copy, Layout, LinearStep, Plan, SquareStep, Turn, key_groups
from hemacrypt.plan.security import LARGEST_MODULUS_BITS
from hemacrypt.planner import plan_network
from hemacrypt.planner.latency.diagonals import forms, image_grid
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


def images_for(plan: Plan, network: CollapsedNetwork, seed: int) -> Array:
    return np.random.default_rng(seed).random((plan.public.images, *network.input_shape))


def check_it_computes(plan: Plan, network: CollapsedNetwork, seed: int) -> None:
    """Walk a plan in the clear: logits in their slots, for a pair of both images, and nothing anywhere else."""
    public, engine, images = plan.public, ClearEngine(plan), images_for(plan, network, seed)
    logits = network(images)
    np.testing.assert_allclose(engine.predict(images), logits, rtol=0, atol=1e-9)
    slots = engine.run(public.input_layout.pack(images))[0]
    assert slots.shape == (public.output_layout.ciphertexts, plan.parameters.slots)
    # Not just any logits: exactly the slots that none lies in are zero, so no partial sum is told.
    np.testing.assert_allclose(
        slots, public.output_layout.pack(logits), rtol=0, atol=1e-9 * public.output_layout.factor
    )
    if public.images == 1:
        allowed = np.append(logits, 0.0)
        assert np.abs(slots[..., None] - allowed).min(axis=-1).max() <= 1e-9
    else:
        # Real parts hold one image, imaginary parts the other one times the factor.
        for part, own in ((slots.real, logits[0]), (slots.imag / public.output_layout.factor, logits[1])):
            assert np.abs(part[..., None] - np.append(own, 0.0)).min(axis=-1).max() <= 1e-9


KINDS: dict[str, dict[str, Any]] = {"real": {"slots": "real"}, "complex": {"slots": "complex"}, "pair": {"images": 2}}


@pytest.mark.parametrize("kind", list(KINDS))
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(st.integers(0, 2**20), st.integers(0, 3), st.sampled_from([1, 2, 3, 10]), shapes, st.booleans())
def test_the_planned_rotations_and_diagonals_compute_the_network(
    kind: str, seed: int, squares: int, outputs: int, shape: Shape, sparse: bool
) -> None:
    network = random_network(seed, squares, outputs, shape, sparse)
    plan = plan_network(network, **KINDS[kind])
    check_it_computes(plan, network, seed)
    check_the_structure(plan, kind)


def check_the_structure(plan: Plan, kind: str) -> None:
    """Compare what a plan says with what its steps do."""
    layout, inputs = plan.public.input_layout, plan.public.input_layout.ciphertexts
    assert layout.images == plan.public.output_layout.images == (2 if kind == "pair" else 1)
    if kind != "complex":
        assert not layout.mixes
    for step in plan.steps:
        assert step.inputs == inputs
        if isinstance(step, SquareStep):
            complex_kind = "joined" if inputs > 1 else "plain"
            assert step.kind == {"real": "plain", "pair": "parted", "complex": complex_kind}[kind]
        inputs = step.outputs
    assert inputs == plan.public.output_layout.ciphertexts


@pytest.mark.parametrize("kind", list(KINDS))
@settings(deadline=None, derandomize=True, database=None, max_examples=8)
@given(st.integers(0, 2**20), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(40, 90), st.integers(33, 128))
def test_inputs_over_several_ciphertexts_are_computed(
    kind: str, seed: int, outputs: int, channels: int, height: int, width: int
) -> None:
    """At degree 4096 a ciphertext has 2048 slots; images of other sides than powers of two may have no grid."""
    rng = np.random.default_rng(seed)
    shape = (channels, height, width)
    layer = Dense(rng.normal(size=(outputs, math.prod(shape))), rng.normal(size=outputs) / 4)
    network = CollapsedNetwork(shape, (_scaled_first(shape, layer),))
    plan = plan_network(network, **KINDS[kind])
    blocks = -(-math.prod(shape) // 2048)
    assert plan.parameters.degree == 4096
    assert plan.public.input_layout.ciphertexts >= (-(-blocks // 2) if kind == "complex" else blocks)
    check_it_computes(plan, network, seed)
    check_the_structure(plan, kind)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", range(3))
def test_a_convolution_over_several_ciphertexts_is_computed(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = ((3, 32, 64), (5, 30, 40), (2, 40, 40))[seed]
    kernel = Convolution(
        rng.normal(size=(2, shape[0], 3, 2)), rng.normal(size=2), shape, 1 + seed % 2, ((1, 1), (0, 1))
    )
    network = CollapsedNetwork(shape, (_scaled_first(shape, kernel),))
    plan = plan_network(network, **KINDS[kind])
    # Two maps of 40 x 40 lie in one ciphertext when one of them is imaginary.
    assert plan.public.input_layout.ciphertexts > (1 if (kind, seed) != ("complex", 2) else 0)
    check_it_computes(plan, network, seed)
    check_the_structure(plan, kind)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(deadline=None, derandomize=True, database=None, max_examples=6)
@given(st.integers(0, 2**20), st.integers(4097, 20_000), st.integers(1, 6), st.sampled_from([1, 2, 5]))
def test_a_wide_layer_lies_in_two_to_five_ciphertexts(
    kind: str, seed: int, width: int, inputs: int, outputs: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (1, 1, inputs)
    first = _scaled_first(shape, Dense(rng.normal(size=(width, inputs)), rng.normal(size=width) / 4))
    last = Dense(rng.normal(size=(outputs, width)), rng.normal(size=outputs))
    network = CollapsedNetwork(shape, (first, _with_peak(CollapsedNetwork(shape, (first,)), last)))
    plan = plan_network(network, **KINDS[kind])
    count = -(-width // 4096)
    assert 2 <= count <= 5
    assert plan.steps[1].inputs == count
    assert plan.steps[1].outputs == (-(-count // 2) if kind == "complex" else count)
    check_it_computes(plan, network, seed)
    check_the_structure(plan, kind)


def test_two_wide_layers_after_each_other_join_twice() -> None:
    rng = np.random.default_rng(7)
    shape, layers = (1, 1, 3), list[Linear]()
    for outputs, inputs in ((9000, 3), (3, 9000), (9000, 3), (2, 9000)):
        weight = rng.normal(size=(outputs, inputs)) * (rng.random((outputs, inputs)) < (1 if inputs == 3 else 0.02))
        layer = Dense(weight, rng.normal(size=outputs) / 4)
        prefix = CollapsedNetwork(shape, tuple(layers)) if layers else None
        layers.append(_with_peak(prefix, layer) if prefix else _scaled_first(shape, layer))
    network = CollapsedNetwork(shape, tuple(layers))
    for kind, kinds in (("complex", ["joined", "plain", "joined"]), ("pair", ["parted"] * 3), ("real", ["plain"] * 3)):
        plan = plan_network(network, **KINDS[kind])
        assert [step.kind for step in plan.steps if isinstance(step, SquareStep)] == kinds
        check_it_computes(plan, network, 7)


@cache
def sample_plan(seed: int) -> Plan:
    shape: Shape = [(3, 8, 8), (1, 5, 7), (2, 4, 9), (1, 1, 6), (3, 6, 3)][seed % 5]
    network = random_network(seed, seed % 4, [1, 3, 10][seed % 3], shape, seed % 2 == 0)
    return plan_network(network, **KINDS[list(KINDS)[seed // 4 % 3]])


SHARED = ("cell", "pair", "spread", "large_image")


@pytest.fixture(params=range(24 + len(SHARED)))
def plan(request: pytest.FixtureRequest) -> Plan:
    """Return each of many plans; the last ones are those of networks that other tests evaluate."""
    if request.param < 24:
        return sample_plan(request.param)
    setup: Setup = request.getfixturevalue(SHARED[request.param - 24])
    return setup.plan


def test_every_rescale_lands_on_the_scale_that_the_next_step_expects(plan: Plan) -> None:
    scale, level = plan.public.input_scale, plan.parameters.top_level
    for step in plan.steps:
        assert step.level == level
        assert step.input_scale == scale
        # Parting doubles both parts, so that their squares are four times as large.
        gain = 1.0 if isinstance(step, LinearStep) else 4.0 if step.kind == "parted" else 1.0
        product = gain * scale * (step.weight_scale if isinstance(step, LinearStep) else scale)
        assert product / plan.parameters.data_primes[level] == pytest.approx(step.output_scale, rel=1e-15)
        scale, level = step.output_scale, level - 1
    assert level == 0
    assert scale == plan.public.output_scale
    assert [type(step) for step in plan.steps] == [LinearStep, SquareStep] * (len(plan.steps) // 2) + [LinearStep]


def test_every_intermediate_value_fits_its_modulus_with_headroom(plan: Plan) -> None:
    for step, peak in zip(plan.steps, plan.step_peaks, strict=True):
        product = step.input_scale * (step.weight_scale if isinstance(step, LinearStep) else step.input_scale)
        if isinstance(step, SquareStep):
            product *= SquareStep.gain(step.kind)
        assert math.log2(peak * product) + 1 + 4 <= plan.parameters.bits_at(step.level) + 1e-6
        assert math.log2(peak * step.output_scale) + 1 <= plan.parameters.bits_at(step.level - 1)


def test_logits_of_sixteen_times_the_magnitude_fit_the_last_prime(plan: Plan) -> None:
    public = plan.public
    assert plan.step_peaks[-1] * 2**4 * public.output_scale <= plan.parameters.data_primes[0] / 2
    other = public.output_layout.factor if public.images == 2 else 0.0
    limit = plan.parameters.data_primes[0] / 2 / public.output_scale / math.hypot(1, other)
    assert public.logit_limit == pytest.approx(limit)
    # Peaks of a pair are of both its parts together.
    assert public.logit_limit >= 16 * plan.step_peaks[-1] / math.hypot(1, other) * (1 - 1e-9)


def test_the_keys_are_exactly_those_that_the_steps_use_highest_level_first(plan: Plan) -> None:
    used: dict[int, tuple[bool, set[int]]] = {}
    for step in plan.steps:
        turns: set[Turn] = set()
        if isinstance(step, LinearStep):
            turns |= {Turn(copy.step) for copy in step.copies[step.inputs :]}
            turns |= {turn for group in step.turns for turn in group}
            if any(len(giants) > 1 for giants in step.giants):
                turns.add(Turn(step.giant_step))
        elif step.kind == "parted":
            turns.add(Turn(0, True))
        if turns or isinstance(step, SquareStep):
            degree = plan.parameters.degree
            elements = {pow(3, turn.step, 2 * degree) * (-1 if turn.conjugate else 1) % (2 * degree) for turn in turns}
            used[step.level] = (isinstance(step, SquareStep), elements)
    assert {group.level: (group.relinearise, set(group.elements)) for group in plan.public.keys} == used
    levels = [group.level for group in plan.public.keys]
    assert levels == sorted(levels, reverse=True)
    assert plan.public.keys == key_groups(plan.parameters, plan.steps)


def test_turns_are_doublings_or_a_conjugation(plan: Plan) -> None:
    """Sums of groups of up to three turns: each group with "no turn" is the products of one or two of them."""
    for step in plan.steps:
        if isinstance(step, LinearStep):
            for group in step.turns:
                assert len(group) in (1, 3)
                if len(group) == 3:
                    first, second, both = group
                    assert both == Turn(first.step + second.step, first.conjugate != second.conjugate)
                assert all(0 <= turn.step < plan.parameters.slots and turn != Turn(0) for turn in group)
            # At most one conjugation, and it comes last.
            conjugating = [any(turn.conjugate for turn in group) for group in step.turns]
            assert not any(conjugating[:-1])


def test_no_diagonal_is_zero_and_every_one_is_used_once(plan: Plan) -> None:
    for step in plan.steps:
        if isinstance(step, LinearStep):
            assert np.abs(step.diagonals).max(axis=1).min() > 0
            used = sorted(term.diagonal for output in step.giants for terms in output for term in terms)
            assert used == list(range(len(step.diagonals)))
            assert all(
                0 <= term.copy < len(step.copies) for output in step.giants for terms in output for term in terms
            )
            # The highest inner sum starts Horner's rule.
            assert step.giant_step > 0 or all(len(output) == 1 for output in step.giants)
            assert step.diagonals.shape == (step.multiplications, plan.parameters.slots)
            assert step.bias.shape == (step.outputs, plan.parameters.slots)


def test_parents_stand_before_their_children_which_stand_side_by_side(plan: Plan) -> None:
    for step in plan.steps:
        if isinstance(step, LinearStep):
            assert step.copies[: step.inputs] == tuple(Copy(number, 0) for number in range(step.inputs))
            parents = [copy.parent for copy in step.copies[step.inputs :]]
            assert all(parent < number for number, parent in enumerate(parents, start=step.inputs))
            assert len([parent for parent, _ in groupby(parents)]) == len(set(parents))
            assert all(0 < copy.step < plan.parameters.slots for copy in step.copies[step.inputs :])
            offsets: list[tuple[int, int]] = []
            for number, copy in enumerate(step.copies):
                source, offset = (number, 0) if number < step.inputs else offsets[copy.parent]
                offsets.append((source, offset + copy.step))
            assert len(set(offsets)) == len(offsets)


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


def test_a_smaller_degree_is_rejected_for_bits_and_never_for_slots() -> None:
    wide = plan_network(CollapsedNetwork((3, 32, 32), (Dense(np.ones((2, 3072)) / 1000, np.zeros(2)),)), slots="real")
    assert wide.parameters.degree == 4096
    assert wide.public.input_layout.ciphertexts == 2
    assert not any(reason.startswith("degree") for reason in wide.reasons)
    deep = sample_plan(1)
    assert any("degree 4096 was rejected: it has room for primes of 22 bits" in reason for reason in deep.reasons)


def test_the_cell_network_runs_at_degree_8192_with_six_data_primes(cell: Setup) -> None:
    parameters = cell.plan.parameters
    assert (parameters.degree, len(parameters.data_primes), parameters.modulus_bits) == (8192, 6, 210)
    assert [step.level for step in cell.plan.steps] == [5, 4, 3, 2, 1]
    assert cell.plan.calibrated


def test_the_convolution_of_the_cell_network_has_144_diagonals_and_half_of_them_in_complex_slots(cell: Setup) -> None:
    real = plan_network(cell.network, slots="real").steps[0]
    convolution = cell.plan.steps[0]
    assert isinstance(real, LinearStep)
    assert isinstance(convolution, LinearStep)
    assert (real.multiplications, convolution.multiplications) == (144, 72)
    assert real.turns == ()
    assert convolution.turns == ((Turn(0, True),),)
    # 24 copies and 6 giant steps, or the like: far fewer rotations than diagonals.
    assert len(real.rotations) <= 28
    assert len(convolution.rotations) <= 18
    linear = cell.network.linears[0]
    grid = image_grid((3, 32, 32), 4096)
    assert grid is not None
    source = grid.layout((3, 32, 32), 4096, 4096)
    form = next(forms(linear, linear.entries(), source, grid))
    assert len(form.numbers) == 144


def test_dense_layers_of_the_cell_network_need_one_diagonal_per_row(cell: Setup) -> None:
    # Two logits and the guard make three rows of four.
    linears = [step for step in cell.plan.steps if isinstance(step, LinearStep)]
    assert [step.multiplications for step in linears] == [72, 64, 4]
    # Rotate-and-sums reach over all of the period, one doubling after another, whatever their groups.
    reached = [sorted(turn.step for group in step.turns for turn in group) for step in linears]
    for number, steps in ((1, (64, 128, 256, 512, 1024, 2048)), (2, (4, 8, 16, 32))):
        assert set(steps) <= set(reached[number])


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
            shape = {"period", "slots", "ciphertexts", "factor", "images"}
            assert set(vars(value)) == {"positions", "imaginary", *shape}
    assert len(numbers) == 7


def test_a_layer_of_one_value_is_planned() -> None:
    one = Dense(np.array([[2.0]]), np.array([0.5]))
    network = CollapsedNetwork((1, 1, 1), (one, one))
    assert ClearEngine(plan_network(network)).predict([0.5]) == pytest.approx(2 * 1.5**2 + 0.5)
    pair = plan_network(network, images=2)
    np.testing.assert_allclose(ClearEngine(pair).predict([0.5, 1.0]), [[2 * 1.5**2 + 0.5], [2 * 2.5**2 + 0.5]])


def chain_of(count: int, factor: float = 1.0) -> CollapsedNetwork:
    """Return a network with ``count`` squares whose values stay between 0 and 1."""
    layers = [Dense(np.eye(4) * factor, np.zeros(4)) for _ in range(count + 1)]
    return CollapsedNetwork((1, 2, 2), tuple(layers))


EYE = Dense(np.eye(4), np.zeros(4))


def one_dense(outputs: int, shape: Shape, weight: float = 1.0) -> CollapsedNetwork:
    return CollapsedNetwork(shape, (Dense(np.full((outputs, math.prod(shape)), weight), np.zeros(outputs)),))


def half_empty(rows: int) -> CollapsedNetwork:
    """Return a network of which a layer of that many outputs has weights for the first one only."""
    weight = np.zeros((rows, 4))
    weight[0] = 1.0
    return CollapsedNetwork((1, 2, 2), (Dense(weight, np.ones(rows)), Dense(np.ones((1, rows)) / rows, np.zeros(1))))


def squared(before: float, after: float) -> CollapsedNetwork:
    layers = (Dense(np.full((4, 4), before), np.zeros(4)), Dense(np.full((1, 4), after), np.zeros(1)))
    return CollapsedNetwork((1, 2, 2), layers)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (chain_of(14), "14 squares need 930 modulus bits; degree 32768 allows 881 bits"),
        (chain_of(12), "12 squares need relinearisation keys of 456 MB .* use fewer squares"),
        (chain_of(9, 30.0), r"layer 6 \(dense 4→4\) writes values up to .* scale the layers before it down"),
        (chain_of(9, 1e3), r"layer 5 \(dense 4→4\) writes values up to .* scale the layers before it down"),
        (one_dense(1, (3, 256, 256)), "a layer of 196608 values needs over 64 ciphertexts of 2048 slots"),
        (one_dense(140_000, (1, 2, 2)), "a layer of 140000 values needs over 64 ciphertexts of 2048 slots"),
        (
            CollapsedNetwork((1, 2, 2), (EYE, Dense(np.zeros((1, 4)), np.ones(1)))),
            r"layer 1 \(dense 4→1\) has only zero",
        ),
        (
            CollapsedNetwork((1, 2, 2), (Convolution(np.zeros((1, 1, 1, 1)), np.ones(1), (1, 2, 2)),)),
            "only zero weights",
        ),
        (one_dense(1, (1, 2, 2), 1e10), r"layer 0 \(dense 4→1\) has weights or biases up to 1e\+10; .* divide them"),
        (squared(1e300, 1e300), "layer 0 .* weights or biases up to 1e.300"),
    ],
    ids=[
        "14-squares",
        "12-squares",
        "9-growing-squares",
        "9-overflowing-squares",
        "image-too-large",
        "layer-too-wide",
        "zero-dense",
        "zero-conv",
        "huge-weights",
        "overflow",
    ],
)
def test_a_network_that_no_parameters_serve_is_refused_with_a_reason(network: CollapsedNetwork, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_network(network)


@pytest.mark.parametrize(
    "network",
    [one_dense(1, (1, 2, 2), 1e9), squared(1e7, 1e-15), squared(1e-9, 1e9), half_empty(5000)],
    ids=["huge-logits", "huge-activations", "tiny-activations", "empty-ciphertext"],
)
def test_unusual_magnitudes_and_empty_rows_are_planned(network: CollapsedNetwork) -> None:
    plan, image = plan_network(network), np.array([0.25, 0.5, 0.75, 1.0])
    logits = network(image)
    np.testing.assert_allclose(ClearEngine(plan).predict(image), logits, rtol=1e-12)
    assert plan.public.logit_error_bound < 1e-3 * max(1.0, np.abs(logits).max())


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
    with pytest.raises(PlanError, match="3 labels and 0 guards for 2 values"):
        plan_network(network, labels=("a", "b", "c"))
