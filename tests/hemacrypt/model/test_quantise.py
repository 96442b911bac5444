"""The integer network: exact at any size, bounds that hold, and a deviation that was predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.embedded import bundle_path, sample
from hemacrypt.errors import NetworkError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense
from hemacrypt.model.quantise import INPUT_STEPS, QuantisedNetwork, at_scales, quantise


def python_integers(quantised: QuantisedNetwork, image: Array) -> list[list[int]]:
    """Evaluate an image with nothing but Python's integers and the layers' matrices; what every map writes."""
    value = [round(float(x) * quantised.input_scale) for x in image.ravel()]
    written: list[list[int]] = []
    for number, (layer, bias) in enumerate(zip(quantised.layers, quantised.biases, strict=True)):
        if number:
            value = [x * x for x in value]
        total = [int(b) for b in bias]
        for row, column, weight in zip(*layer.entries(), strict=True):
            assert float(weight).is_integer()
            total[row] += int(weight) * value[column]
        value = total
        written.append(value)
    return written


def network_of(seed: int, squares: int, scale: float = 1.0) -> CollapsedNetwork:
    rng = np.random.default_rng(seed)
    layers: list[Convolution | Dense] = [
        Convolution(scale * rng.normal(size=(2, 2, 2, 2)), rng.normal(size=2), (2, 4, 3), 1, ((1, 0), (0, 1)))
    ]
    for _ in range(squares):
        layers.append(Dense(rng.normal(size=(5, layers[-1].outputs)), rng.normal(size=5)))
    return CollapsedNetwork((2, 4, 3), tuple(layers))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1 << 30),
    squares=st.integers(0, 4),
    bits=st.integers(2, 40),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_integers_are_those_of_python(seed: int, squares: int, bits: int, scale: float) -> None:
    network = network_of(seed, squares, scale)
    rng = np.random.default_rng(seed)
    try:
        quantised = at_scales(network, 255.0, [2.0**bits] * len(network.linears))
    except NetworkError:
        # Only absurd scales are refused: single integers, or those that the logits are multiples of.
        logits = math.log2(255) + bits
        for _ in range(squares):
            logits = 2 * logits + bits
        assert bits + math.log2(scale) > 30 or logits > 1000
        return
    images = rng.random((2, *network.input_shape))
    expected = [python_integers(quantised, image) for image in images]
    for number, written in enumerate(quantised.trace(images)):
        assert written.astype(object).tolist() == [trace[number] for trace in expected]


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1 << 30), squares=st.integers(0, 3), low=st.sampled_from([0.0, -1.0, 0.25]))
def test_no_input_exceeds_the_worst_case_and_one_layer_reaches_it(seed: int, squares: int, low: float) -> None:
    plain = network_of(seed, squares)
    network = CollapsedNetwork(plain.input_shape, plain.linears, (low, 1.0))
    quantised = quantise(network)
    rng = np.random.default_rng(seed)
    corners = rng.choice([low, 1.0], (20, *network.input_shape))
    for written, bound in zip(quantised.trace(corners), quantised.worst_case, strict=True):
        assert (np.abs(written).max(axis=0) <= bound).all()
    layer, bias = quantised.layers[0], quantised.biases[0]
    weights = np.zeros((layer.outputs, layer.inputs))
    rows, columns, values = layer.entries()
    weights[rows, columns] = values
    best = np.where(weights > 0, 255, round(low * 255)), np.where(weights > 0, round(low * 255), 255)
    reached = [(weights * inputs).sum(axis=1).astype(np.int64).astype(object) + bias for inputs in best]
    assert np.maximum(np.abs(reached[0]), np.abs(reached[1])).tolist() == list(quantised.worst_case[0])


def test_squares_stand_between_the_maps_in_the_dry_run() -> None:
    quantised = quantise(network_of(1, 2).calibrated(np.random.default_rng(1).random((9, 2, 4, 3))))
    largest, measured = quantised.largest, quantised.measured
    assert measured is not None
    assert len(largest) == len(measured) == 5
    assert largest[1] == largest[0] ** 2
    assert measured[3] == measured[2] ** 2
    assert all(seen <= bound for seen, bound in zip(measured, largest, strict=True))
    assert quantise(network_of(1, 2)).measured is None


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.read(bundle_path())


@pytest.fixture(scope="module")
def cells(bundle: Bundle) -> Array:
    return np.stack([bundle.manifest.preprocessing(cell.path) for cell in sample()[::3]]).astype(np.float64)


def test_pixels_are_exact(bundle: Bundle, cells: Array) -> None:
    quantised = quantise(bundle.network)
    assert quantised.input_scale == INPUT_STEPS
    assert np.abs(quantised.input_integers(cells) / 255 - cells.reshape(len(cells), -1)).max() < 1e-7


def test_the_embedded_network_deviates_by_no_more_than_is_predicted(bundle: Bundle, cells: Array) -> None:
    expected, before = bundle.network(cells), math.inf
    for precision in (2.0**-7, 2.0**-9, 2.0**-11):
        quantised = quantise(bundle.network, precision)
        deviation = float(np.sqrt(np.mean((quantised(cells) - expected) ** 2)))
        # Cells of subjects that the magnitudes were not measured on.
        typical = precision * float(bundle.network.peaks[-1].max()) / 4
        print(f"precision {precision}: {deviation:.2e}, asked for {typical:.2e}, at peaks {quantised.deviation:.2e}")
        assert typical / 3 < deviation < 3 * typical
        assert np.abs(quantised(cells) - expected).max() < quantised.deviation
        assert deviation < before / 2
        before = deviation


def test_measured_magnitudes_are_those_of_the_integers(bundle: Bundle, cells: Array) -> None:
    quantised = quantise(bundle.network)
    measured = quantised.measured
    assert measured is not None
    for number, written in enumerate(quantised.trace(cells)):
        # Held-out cells reach about as far as those that were measured; far beyond would be another scale.
        assert 0.1 * measured[2 * number] < int(np.abs(written).max()) < 2 * measured[2 * number]


def test_more_precision_costs_bits_and_the_last_layer_costs_fewest(bundle: Bundle) -> None:
    coarse, fine = quantise(bundle.network, 2.0**-6), quantise(bundle.network, 2.0**-8)
    steps = [math.log2(f / c) for f, c in zip(fine.weight_scales, coarse.weight_scales, strict=True)]
    assert steps == pytest.approx([2, 2, 2], abs=0.2)
    assert math.log2(fine.output_scale / coarse.output_scale) == pytest.approx(2 * (4 + 2 + 1), abs=0.7)


def test_neighbouring_weights_cancel_each_others_rounding(bundle: Bundle) -> None:
    quantised = quantise(bundle.network)
    dense, scale = bundle.network.linears[1], quantised.weight_scales[1]
    assert isinstance(dense, Dense)
    assert isinstance(quantised.layers[1], Dense)
    errors = np.cumsum(quantised.layers[1].weight - scale * dense.weight, axis=1)
    assert np.abs(errors).max() <= 0.5 + 1e-6


def test_zero_weights_stay_zero() -> None:
    rng = np.random.default_rng(4)
    kernel, weight = rng.normal(size=(3, 2, 2, 2)), rng.normal(size=(4, 12))
    kernel[rng.random(kernel.shape) < 0.5] = 0
    weight[rng.random(weight.shape) < 0.5] = 0
    layers = (Convolution(kernel, np.zeros(3), (2, 3, 3)), Dense(weight, np.zeros(4)))
    quantised = at_scales(CollapsedNetwork((2, 3, 3), layers), 255.0, (10.0, 10.0))
    first, second = quantised.layers
    assert isinstance(first, Convolution)
    assert isinstance(second, Dense)
    assert not first.kernel[kernel == 0].any()
    assert not second.weight[weight == 0].any()


def test_inputs_out_of_range_are_refused(bundle: Bundle) -> None:
    quantised = quantise(bundle.network)
    for value in (-0.01, 1.01, math.nan):
        with pytest.raises(NetworkError, match="preprocess them"):
            quantised.integers(np.full(bundle.network.input_shape, value))


def test_absurd_requests_are_refused() -> None:
    network = network_of(5, 1)
    with pytest.raises(NetworkError, match="expected positive numbers"):
        quantise(network, 0.0)
    with pytest.raises(NetworkError, match="ask for less precision"):
        quantise(network, 2.0**-60)
    with pytest.raises(NetworkError, match="one each"):
        at_scales(network, 255.0, (1.0,))
    with pytest.raises(NetworkError, match="use fewer squares"):
        quantise(network_of(5, 12))
    with pytest.raises(NetworkError, match="over 1000 bits; use fewer squares"):
        at_scales(network_of(5, 9), 255.0, (2.0**20,) * 10)
