"""Bad requests: each is refused with a sentence that says what to change, before anything large is computed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk._crypto import KeyHolder
from hemacrypt.errors import BundleError, NetworkError, PlanError
from hemacrypt.model.bundle import MANIFEST, TENSORS, Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.model.preprocess import Preprocessing
from hemacrypt.planner import limits, plan_layouts, plan_model, plan_network
from hemacrypt.planner.limits import LARGEST_WEIGHT, MOST_ENTRIES, MOST_PARAMETERS
from tests.hemacrypt.model.test_bundle import replace_tensors, reseal
from tests.hemacrypt.setups import Setup

Layers = list[Dense | Convolution]


def dense(outputs: int, inputs: int, weight: float = 1e-3) -> Dense:
    return Dense(np.full((outputs, inputs), weight), np.zeros(outputs))


def convolution(channels: int, side: int, shape: tuple[int, int, int], weight: float = 1e-3) -> Convolution:
    return Convolution(np.full((channels, shape[0], side, side), weight), np.zeros(channels), shape)


def network(*layers: Dense | Convolution) -> CollapsedNetwork:
    first = layers[0]
    shape = first.input_shape if isinstance(first, Convolution) else (1, 1, first.inputs)
    return CollapsedNetwork(shape, layers)


@pytest.mark.parametrize("plan", [plan_network, plan_model, plan_layouts])
@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([dense(4, 4, 0.25)] * 13, "12 squares need relinearisation keys of 456 MB .* use fewer squares"),
        ([dense(4, 4, 0.25)] * 40, "39 squares need .* modulus bits; .* use fewer squares"),
        ([dense(2, 4, 1e12)], r"layer 0 \(dense 4→2\) has weights or biases up to 1e\+12; .* divide them by a factor"),
        ([dense(2, 4), dense(2, 2, -1e12)], r"layer 1 \(dense 2→2\) has weights or biases up to 1e\+12"),
        ([convolution(1, 2, (1, 4, 4), 1e12)], r"layer 0 \(conv 2×2/1 1→1\) has weights .* divide them by a factor"),
        ([Dense(np.ones((1, 4)), np.full(1, 1e12))], "biases up to 1e.12"),
        ([dense(3300, 3072)], "10,140,900 parameters, at most 8,388,608 .* make dense 3072→3300 smaller, or convolve"),
        ([dense(400, 96 * 96 * 3), dense(2, 400)], "11,060,402 parameters, .* make dense 27648→400 smaller"),
        (
            [convolution(30, 5, (3, 96, 96)), dense(1, 30 * 92 * 92)],
            r"layer 0 \(conv 5×5/1 3→30\) takes 19,044,000 products .* use a larger stride, fewer channels",
        ),
        ([dense(2, 200_000)], "a layer of 200000 values needs over 64 ciphertexts .* use a smaller image"),
        ([dense(4, 4), dense(2, 4, 0.0)], r"layer 1 \(dense 4→2\) has only zero weights; train or remove it"),
    ],
    ids=[
        "12-squares",
        "39-squares",
        "weights-of-1e12",
        "negative-weights-of-1e12",
        "kernel-of-1e12",
        "bias-of-1e12",
        "ten-million-parameters",
        "ten-million-parameters-of-a-large-image",
        "nineteen-million-products",
        "two-hundred-thousand-inputs",
        "zero-layer",
    ],
)
def test_a_network_beyond_reason_is_refused_before_its_matrices_are_built(
    plan: Callable[[CollapsedNetwork], object], layers: Layers, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = network(*layers)

    def never(self: Dense | Convolution) -> None:
        raise AssertionError(f"the matrix of {self.describe()} was built")

    monkeypatch.setattr(Dense, "entries", never)
    monkeypatch.setattr(Convolution, "entries", never)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError, match=said):
            plan(asked)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_encoded_weights_that_would_fill_a_worker_are_refused_before_they_are_laid_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MOST_ENCODED_BYTES", 1_000_000)
    with pytest.raises(PlanError, match=r"3 diagonals of dense 20→3; at most 0.0 GB .* larger stride, fewer channels"):
        limits.check_encoded(4096, [("dense 9→20", 3, 20), ("dense 20→3", 40, 3)])
    limits.check_encoded(4096, [("dense 20→3", 1, 3)])


def test_what_is_just_within_the_limits_is_not_refused_for_its_size() -> None:
    limits.check_network(network(dense(2048, 4095)))
    with pytest.raises(PlanError, match="parameters"):
        limits.check_network(network(dense(2048, 4096)))
    assert 2048 * 4096 <= MOST_PARAMETERS < 2048 * 4097
    limits.check_network(network(dense(1, 4, LARGEST_WEIGHT)))
    assert MOST_ENTRIES >= 16 * 92 * 92 * 75  # a 5×5 convolution to 16 maps over an image of 96 × 96 × 3


def test_values_beyond_float64_are_refused_with_the_layer_that_writes_them() -> None:
    with pytest.raises(PlanError, match=r"layer 5 \(dense 4→4\) writes values up to .* scale the layers before"):
        plan_network(network(*[dense(4, 4, 1e3)] * 8))
    with pytest.raises(PlanError, match=r"layer 3 .* writes values up to 1.07e.144"):
        plan_network(network(*[dense(4, 4, 1e9)] * 8))
    with pytest.raises(PlanError, match=r"layer 0 .* writes values up to (inf|nan)"):
        plan_network(CollapsedNetwork((1, 1, 4), (dense(4, 4, 4.0),), (-1.7e308, 1.7e308)))


def test_a_layer_that_reads_its_padding_alone_is_refused() -> None:
    kernel = np.zeros((1, 1, 3, 3))
    kernel[0, 0, 0] = 1.0
    layer = Convolution(kernel, np.ones(1), (1, 1, 4), 1, ((1, 1), (1, 1)))
    with pytest.raises(PlanError, match=r"layer 0 \(conv 3×3/1 1→1\) reads nothing but its padding"):
        plan_network(network(layer))


def test_values_too_far_apart_are_refused() -> None:
    """Of a channel's two values one is a million times as large as the other, which alone reaches the logits."""
    apart = Dense(np.diag([1.0, 1e-6]), np.zeros(2))
    both = Convolution(np.ones((1, 1, 1, 1)), np.zeros(1), (1, 1, 2))
    smaller = Dense(np.array([[0.0, 4e9]]), np.zeros(1))
    with pytest.raises(PlanError, match=r"leaves errors .* times as large as its values.* of about one size"):
        plan_network(network(apart, both, smaller, dense(1, 1, 4e9)))


NOT_A_NUMBER = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", NOT_A_NUMBER)
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weight = np.ones((2, 4))
    weight[1, 2] = value
    with pytest.raises(NetworkError, match="dense weight holds 1 values that are not finite numbers"):
        Dense(weight, np.zeros(2))
    with pytest.raises(NetworkError, match="dense bias holds 2 values that are not finite numbers"):
        Dense(np.ones((2, 4)), np.full(2, value))
    with pytest.raises(NetworkError, match="convolution kernel holds 4 values that are not finite numbers"):
        convolution(1, 2, (1, 4, 4), value)
    with pytest.raises(NetworkError, match="magnitudes of layer 0 holds 2 values"):
        CollapsedNetwork((1, 2, 2), (dense(2, 4),), magnitudes=(np.full(2, value),))
    with pytest.raises(NetworkError, match=r"input range is .* expected two finite numbers"):
        CollapsedNetwork((1, 2, 2), (dense(2, 4),), (0.0, value))


@pytest.mark.parametrize("value", NOT_A_NUMBER)
def test_a_bundle_whose_weights_are_no_numbers_is_refused(value: float, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    preprocessing = Preprocessing(image_size=4, crop=4, block=2)
    asked = CollapsedNetwork((3, 2, 2), (dense(2, 12),), preprocessing.input_range)
    Bundle.create(asked, name="bad", labels=("a", "b"), preprocessing=preprocessing).write(directory)
    changes: dict[str, Any] = {"layers__0__weight": np.full((2, 12), value, dtype=np.float32)}
    replace_tensors(directory, **changes)
    reseal(directory)
    assert (directory / TENSORS).is_file()
    assert (directory / MANIFEST).is_file()
    with pytest.raises(BundleError, match=r"dense weight holds 24 values that are not finite.*export the model again"):
        Bundle.read(directory)


@pytest.mark.parametrize("value", NOT_A_NUMBER)
def test_an_image_that_holds_no_numbers_is_refused(regression: Setup, value: float) -> None:
    image = np.zeros(16)
    image[3] = value
    with pytest.raises(PlanError, match="no finite numbers of moderate size; preprocess it first"):
        KeyHolder(regression.plan.public).encrypt(image)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Dense(np.zeros((0, 4)), np.zeros(0)), r"dense weight has shape \(0, 4\); expected 2 non-empty"),
        (lambda: Dense(np.zeros((2, 0)), np.zeros(2)), r"dense weight has shape \(2, 0\); expected 2 non-empty"),
        (lambda: convolution(0, 2, (1, 4, 4)), r"convolution kernel has shape .* expected 4 non-empty"),
        (lambda: convolution(1, 5, (1, 4, 4)), "leaves an empty map .* use a smaller kernel"),
        (lambda: CollapsedNetwork((1, 2, 2), ()), "no affine map; expected at least one dense or convolution layer"),
    ],
    ids=["no-outputs", "no-inputs", "no-channels", "kernel-too-large", "no-layers"],
)
def test_an_empty_layer_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(NetworkError, match=said):
        make()
