"""The collapsed network: its maps, their matrices, worst-case bounds and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hemacrypt.errors import NetworkError
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear

FUZZ = settings(deadline=None, derandomize=True, database=None, max_examples=60)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    small = st.integers(1, 3)
    into, out = draw(small), draw(small)
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    kernel_height, kernel_width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    (top, bottom), (left, right) = ((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(2))
    assume(height + top + bottom >= kernel_height)
    assume(width + left + right >= kernel_width)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kernel = rng.normal(size=(out, into, kernel_height, kernel_width)) * (
        rng.random((out, into, kernel_height, kernel_width)) < 0.8
    )
    padding = ((top, bottom), (left, right))
    layer = Convolution(kernel, rng.normal(size=out), (into, height, width), draw(small), padding)
    return replace(layer, bias=rng.normal(size=layer.output_shape)) if draw(st.booleans()) else layer


def matrix(layer: Linear) -> Array:
    rows, columns, values = layer.entries()
    dense = np.zeros((layer.outputs, layer.inputs))
    np.add.at(dense, (rows, columns), values)
    return dense


def naive_convolution(layer: Convolution, image: Array) -> list[float]:
    (top, _), (left, _) = layer.padding
    channels, height, width = layer.input_shape
    out: list[float] = []
    for filter_number, y, x in itertools.product(*map(range, layer.output_shape)):
        total = float(layer.bias[filter_number] if layer.bias.ndim == 1 else layer.bias[filter_number, y, x])
        for channel in range(channels):
            for i, j in itertools.product(range(layer.kernel.shape[2]), range(layer.kernel.shape[3])):
                row, column = y * layer.stride + i - top, x * layer.stride + j - left
                if 0 <= row < height and 0 <= column < width:
                    total += layer.kernel[filter_number, channel, i, j] * image[channel, row, column]
        out.append(total)
    return out


@FUZZ
@given(convolutions(), st.integers(0, 2**16))
def test_convolution_equals_naive_loops(layer: Convolution, seed: int) -> None:
    images = np.random.default_rng(seed).normal(size=(2, *layer.input_shape))
    expected = np.array([naive_convolution(layer, image) for image in images])
    np.testing.assert_allclose(layer(images.reshape(2, -1)), expected, rtol=1e-12, atol=1e-12)


@FUZZ
@given(convolutions(), st.integers(0, 2**16))
def test_convolution_equals_its_matrix(layer: Convolution, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, layer.inputs))
    np.testing.assert_allclose(layer(x), x @ matrix(layer).T + layer.offset(), rtol=1e-12, atol=1e-12)


@FUZZ
@given(convolutions())
def test_convolution_entries_are_distinct_and_not_zero(layer: Convolution) -> None:
    rows, columns, values = layer.entries()
    assert (values != 0).all()
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(values)


def test_dense_equals_its_matrix_and_leaves_zero_weights_out() -> None:
    layer = Dense([[1.0, 0.0, -2.0], [0.0, 0.0, 3.0]], [0.5, -0.5])
    rows, columns, values = layer.entries()
    assert list(zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)) == [
        (0, 0, 1.0),
        (0, 2, -2.0),
        (1, 2, 3.0),
    ]
    np.testing.assert_array_equal(layer(np.array([[1.0, 10.0, 100.0]])), [[-198.5, 299.5]])


def test_keras_same_padding_of_an_even_image_keeps_half_of_it() -> None:
    layer = Convolution(np.ones((16, 3, 5, 5)), np.zeros(16), (3, 32, 32), 2, ((1, 2), (1, 2)))
    assert layer.output_shape == (16, 16, 16)
    assert (layer.inputs, layer.outputs) == (3072, 4096)


def dense(outputs: int, inputs: int) -> Dense:
    return Dense(np.ones((outputs, inputs)), np.zeros(outputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(np.ones((2, 3)), np.zeros(3)), "2 rows but 3 biases"),
        (lambda: Dense(np.ones(3), np.zeros(3)), r"dense weight has shape \(3,\)"),
        (lambda: Dense(np.ones((0, 3)), np.zeros(0)), "non-empty"),
        (lambda: Dense(np.ones((2, 0)), np.zeros(2)), "non-empty"),
        (lambda: Dense([[np.nan, 1.0]], [0.0]), "1 values that are not finite"),
        (lambda: Dense([[1.0, 1.0]], [np.inf]), "dense bias holds 1 values"),
        (lambda: Convolution(np.ones((1, 1, 2)), np.zeros(1), (1, 4, 4)), "convolution kernel has shape"),
        (lambda: Convolution(np.ones((2, 1, 2, 2)), np.zeros(1), (1, 4, 4)), "2 filters but 1 biases"),
        (lambda: Convolution(np.ones((1, 2, 2, 2)), np.zeros(1), (1, 4, 4)), "reads 2 channels but its input has 1"),
        (lambda: Convolution(np.ones((1, 1, 2, 2)), np.zeros(1), (1, 4, 4), 0), "stride 0"),
        (
            lambda: Convolution(np.ones((1, 1, 2, 2)), np.zeros(1), (1, 4, 4), 1, ((0, -1), (0, 0))),
            "padding ≥ 0",
        ),
        (lambda: Convolution(np.ones((1, 1, 5, 2)), np.zeros(1), (1, 4, 4)), "empty map"),
        (lambda: Convolution(np.ones((1, 1, 2, 2)), np.zeros(1), (1, 0, 4)), "input shape"),
        (
            lambda: Convolution(np.full((1, 1, 1, 1), -np.inf), np.zeros(1), (1, 4, 4)),
            "convolution kernel holds 1 values that are not finite",
        ),
        (lambda: CollapsedNetwork((1, 2, 2), ()), "no affine map"),
        (lambda: CollapsedNetwork((1, 2, 2), (dense(2, 5),)), r"layer 0 \(dense 5→2\) reads 5 values but gets 4"),
        (lambda: CollapsedNetwork((1, 2, 2), (dense(3, 4), dense(2, 4))), "layer 1 .* reads 4 values but gets 3"),
        (
            lambda: CollapsedNetwork((1, 2, 2), (dense(3, 4),), magnitudes=(np.ones(2),)),
            r"magnitudes have sizes \[2\]; expected one per output: \[3\]",
        ),
        (
            lambda: CollapsedNetwork((1, 2, 2), (dense(1, 4),), magnitudes=(np.array([np.nan]),)),
            "magnitudes of layer 0",
        ),
        (lambda: CollapsedNetwork((1, 2, 2), (dense(1, 4),), (0.0, float("nan"))), "range"),
        (lambda: CollapsedNetwork((1, 2, 2), (dense(1, 4),), (0.0, float("inf"))), "range"),
        (lambda: CollapsedNetwork((1, 2, 2), (dense(1, 4),), (1.0, 0.0)), "range"),
    ],
)
def test_impossible_layers_and_networks_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        make()


def test_layers_keep_their_own_read_only_copy() -> None:
    weight = np.ones((1, 2))
    layer = Dense(weight, [0.0])
    weight[:] = 7
    np.testing.assert_array_equal(layer.weight, [[1.0, 1.0]])
    with pytest.raises(ValueError, match="read-only"):
        layer.weight[0, 0] = 3


@st.composite
def networks(draw: st.DrawFn) -> CollapsedNetwork:
    first = draw(convolutions())
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    layers: list[Linear] = [first]
    for _ in range(draw(st.integers(0, 2))):
        outputs = draw(st.integers(1, 5))
        layers.append(Dense(rng.normal(size=(outputs, layers[-1].outputs)), rng.normal(size=outputs)))
    low = draw(st.floats(-2, 2))
    return CollapsedNetwork(first.input_shape, tuple(layers), (low, low + draw(st.floats(0, 3))))


@FUZZ
@given(networks(), st.integers(0, 2**16))
def test_no_input_in_range_exceeds_the_worst_case(network: CollapsedNetwork, seed: int) -> None:
    low, high = network.input_range
    rng = np.random.default_rng(seed)
    inside = rng.uniform(low, high, (20, network.inputs))
    corners = rng.choice([low, high], (20, network.inputs))
    written = network.trace(np.concatenate([inside, corners, np.full((1, network.inputs), high)]))
    for values, bound in zip(written, network.worst_case, strict=True):
        assert (np.abs(values).max(axis=0) <= bound * (1 + 1e-12) + 1e-12).all()


@FUZZ
@given(convolutions())
def test_the_worst_case_of_the_first_map_is_reached(layer: Convolution) -> None:
    network = CollapsedNetwork(layer.input_shape, (layer,), (-1.0, 2.0))
    highest = np.where(matrix(layer) > 0, 2.0, -1.0)
    lowest = np.where(matrix(layer) > 0, -1.0, 2.0)
    extremes = np.concatenate([highest, lowest])
    reached = np.abs(
        layer(extremes).reshape(2, layer.outputs, layer.outputs)[:, range(layer.outputs), range(layer.outputs)]
    )
    np.testing.assert_allclose(reached.max(axis=0), network.worst_case[0], rtol=1e-12, atol=1e-12)


def small_network() -> CollapsedNetwork:
    rng = np.random.default_rng(3)
    layers = (Dense(rng.normal(size=(5, 8)), rng.normal(size=5)), Dense(rng.normal(size=(2, 5)), rng.normal(size=2)))
    return CollapsedNetwork((2, 2, 2), layers)


def test_squares_stand_between_maps_and_nowhere_else() -> None:
    network = small_network()
    x = np.random.default_rng(4).normal(size=(6, 2, 2, 2))
    first, second = network.linears
    assert isinstance(first, Dense)
    assert isinstance(second, Dense)
    hidden = x.reshape(6, 8) @ first.weight.T + first.bias
    np.testing.assert_allclose(network(x), hidden**2 @ second.weight.T + second.bias, rtol=1e-12)
    np.testing.assert_allclose(network.trace(x)[0], hidden, rtol=1e-12)
    assert network.squares == 1


def test_calibration_measures_the_largest_absolute_value_of_every_output() -> None:
    network = small_network()
    x = np.random.default_rng(5).normal(size=(7, 8))
    calibrated = network.calibrated(x)
    expected: list[npt.NDArray[np.float64]] = [
        np.array([max(abs(float(row[i])) for row in written) for i in range(written.shape[1])])
        for written in network.trace(x)
    ]
    assert calibrated.magnitudes is not None
    for got, want in zip(calibrated.magnitudes, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert calibrated.peaks is calibrated.magnitudes
    np.testing.assert_array_equal(calibrated(x), network(x))


def test_an_uncalibrated_network_is_planned_with_its_worst_case() -> None:
    network = small_network()
    assert network.magnitudes is None
    assert network.peaks is network.worst_case
