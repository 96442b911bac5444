"""Layers that commute with the eight symmetries, and networks that these do not change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from hemacrypt.model.network import Convolution, Dense
from training.collapse import collapse, largest_difference
from training.models import squares, symmetric
from training.ordinary import multiply_adds, ordinary_network
from training.study.learners import SQUARES
from training.symmetry import (
    ORDER,
    PRODUCTS,
    SYMMETRIES,
    OrbitMean,
    SymmetricConv2D,
    SymmetricNormalization,
    SymmetricQuadratic,
    transformed,
)

Array = np.ndarray[Any, np.dtype[Any]]
EVERY = pytest.mark.parametrize("symmetry", range(ORDER))


def randomised(model: Any, seed: int = 0) -> Any:
    """Give all weights of a network values, also those that start as zeros and ones."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, SymmetricNormalization):
            sizes = layer.gamma.shape
            moments = rng.normal(size=sizes) / 4, rng.uniform(0.1, 0.3, sizes)
            layer.set_weights([rng.uniform(0.5, 1.5, sizes), rng.normal(size=sizes), *moments])
        elif isinstance(layer, SymmetricQuadratic):
            layer.set_weights([numbers + rng.normal(size=numbers.shape) / 20 for numbers in layer.get_weights()])
    return model


def maps(channels: int, side: int = 8, n: int = 2) -> Array:
    return np.random.default_rng(1).normal(size=(n, side, side, channels)).astype(np.float32)


def moved(values: Array, symmetry: int, lifted: bool = True) -> Array:
    """Return what a symmetry of the image makes of a map: turned, and the channels of each orbit permuted."""
    turned = transformed(values, symmetry, (1, 2))
    if not lifted:
        return turned
    orbits = turned.reshape(*turned.shape[:-1], -1, ORDER)
    out = np.empty_like(orbits)
    out[..., PRODUCTS[symmetry]] = orbits
    return out.reshape(turned.shape)


def of(layer: Any, values: Array) -> Array:
    return np.asarray(layer(values))


def answers_alike(model: Any, images: Array) -> Array:
    """Check that the logits of turned images differ by next to nothing beside those of different images."""
    logits = np.asarray(model.predict(images, verbose=0))
    spread = np.ptp(logits, axis=0).min()
    assert spread > 1e-3
    for symmetry in range(1, ORDER):
        turned = np.ascontiguousarray(transformed(images, symmetry, (1, 2)))
        np.testing.assert_allclose(model.predict(turned, verbose=0), logits, rtol=1e-5, atol=1e-3 * spread)
    return logits


def test_the_table_is_that_of_a_group() -> None:
    every = range(ORDER)
    assert len(set(SYMMETRIES)) == ORDER
    assert (PRODUCTS[0] == every).all()
    assert (PRODUCTS[:, 0] == every).all()
    for row in (*PRODUCTS, *PRODUCTS.T):
        assert sorted(row) == list(every)  # every element has an inverse
    for a, b, c in itertools.product(every, repeat=3):
        assert PRODUCTS[PRODUCTS[a, b], c] == PRODUCTS[a, PRODUCTS[b, c]]
    assert (PRODUCTS != PRODUCTS.T).any()  # turning and mirroring do not commute


def test_the_table_says_what_two_symmetries_do_to_an_array() -> None:
    probe = np.arange(25).reshape(5, 5)
    for h, g in itertools.product(range(ORDER), repeat=2):
        np.testing.assert_array_equal(transformed(transformed(probe, g), h), transformed(probe, PRODUCTS[h, g]))


@EVERY
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (1, 1, 0), (5, 3, 0), (8, 1, 0)])
def test_convolutions_commute_with_every_symmetry(symmetry: int, kernel: int, stride: int, padding: int) -> None:
    for lifted, channels in ((False, 3), (True, 16)):
        layer = SymmetricConv2D(2, kernel, stride, padding, lifted)
        values = maps(channels)
        wanted = moved(of(layer, values), symmetry)
        np.testing.assert_allclose(of(layer, moved(values, symmetry, lifted)), wanted, atol=1e-5)


@EVERY
def test_normalisation_and_mean_commute_with_every_symmetry(symmetry: int) -> None:
    values = maps(16)
    stack = randomised(keras.Sequential([keras.Input(values.shape[1:]), SymmetricNormalization()]))
    np.testing.assert_allclose(of(stack, moved(values, symmetry)), moved(of(stack, values), symmetry), atol=1e-6)
    pooled = values.mean(axis=(1, 2))
    again = moved(values, symmetry).mean(axis=(1, 2))
    np.testing.assert_allclose(of(OrbitMean(), again), of(OrbitMean(), pooled), atol=1e-6)
    assert np.abs(again - pooled).max() > 1e-3 or symmetry == 0


def test_the_normalisation_of_an_orbit_is_tied_and_its_moments_are_those_of_all_eight_channels() -> None:
    values = maps(16, n=5) * 3 + np.arange(16, dtype=np.float32)
    layer = SymmetricNormalization(momentum=0.0)
    out = np.asarray(layer(values, training=True)).reshape(-1, 2, ORDER)
    assert [tuple(weight.shape) for weight in layer.weights] == [(2,)] * 4
    orbits = values.reshape(-1, 2, ORDER)
    np.testing.assert_allclose(np.asarray(layer.mean), orbits.mean(axis=(0, 2)), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(layer.variance), orbits.var(axis=(0, 2)), rtol=1e-4)
    np.testing.assert_allclose(out.mean(axis=(0, 2)), 0, atol=1e-4)
    # After training, the moments that were kept are used: those of one batch, here.
    np.testing.assert_allclose(np.asarray(layer(values)).reshape(out.shape), out, atol=1e-4)


def test_training_moves_the_moments_of_both_kinds_of_batches_alike() -> None:
    values = maps(16, n=4)
    one, other = SymmetricNormalization(), SymmetricNormalization()
    one(values, training=True)
    other(moved(values, 5), training=True)
    np.testing.assert_allclose(np.asarray(one.mean), np.asarray(other.mean), atol=1e-6)
    np.testing.assert_allclose(np.asarray(one.variance), np.asarray(other.variance), atol=1e-6)


def test_only_values_beyond_four_deviations_are_penalised_and_only_while_training() -> None:
    values = np.random.default_rng(3).uniform(-1, 1, (64, ORDER)).astype(np.float32)
    layer = SymmetricNormalization(range_penalty=2.0)
    layer(values, training=True)
    assert [float(loss) for loss in layer.losses] == [0.0]
    values[0, 0] = 20
    layer(values)
    assert layer.losses == []
    layer(values, training=True)
    beyond = (20 - values.mean()) / np.sqrt(values.var() + layer.epsilon) - 4
    assert float(layer.losses[0]) == pytest.approx(2 * beyond**2 / values.size, rel=1e-3)
    free = SymmetricNormalization()
    free(values, training=True)
    assert free.losses == []


def test_the_penalty_keeps_logits_of_unlike_images_smaller() -> None:
    images = np.random.default_rng(4).random((256, 16, 16, 3), dtype=np.float32)
    images[:8] *= 6
    wanted = np.eye(2, dtype=np.float32)[np.arange(256) % 2]
    largest = {}
    for weight in (0.0, 10.0):
        keras.utils.set_random_seed(0)
        model = symmetric(16, first_maps=8, hidden=8, activation="quadratic", range_penalty=weight)
        model.compile(keras.optimizers.Adam(1e-2), keras.losses.CategoricalCrossentropy(from_logits=True))
        model.fit(images, wanted, epochs=20, verbose=0)
        largest[weight] = float(np.abs(model.predict(2 * images[:8], verbose=0)).max())
    assert largest[10.0] < 0.5 * largest[0.0]


def test_quadratics_begin_centred_and_close_to_the_rectifier() -> None:
    layer = SymmetricQuadratic()
    values = np.random.default_rng(0).normal(size=(50_000, ORDER)).astype(np.float32)
    out = of(layer, values)
    assert abs(out.mean()) < 0.01
    rectified = np.maximum(values, 0)
    # Of the rectifier's variance no quadratic leaves less than 0.0062 unexplained: (1 - 1/pi) / 2 - 1/4 - 1/(4 pi).
    assert np.var(rectified - out) < 0.02
    np.testing.assert_allclose(out, 0.2 * values**2 + 0.5 * values - 0.2, atol=1e-5)
    assert [tuple(weight.shape) for weight in layer.weights] == [(1,)] * 3


def test_whitened_kernels_see_patches_without_correlation() -> None:
    rng = np.random.default_rng(0)
    # Smooth grey images with a little colour, as cells are: patches are far from white.
    coarse = rng.normal(size=(40, 6, 6, 1)).repeat(4, 1).repeat(4, 2) + rng.normal(size=(40, 24, 24, 3)) / 20
    images = np.concatenate([transformed(coarse, g, (1, 2)) for g in range(ORDER)]).astype(np.float32)
    layer = SymmetricConv2D(1, 4, 2, lifted=False, whitened=True)
    layer(images[:1])

    def condition() -> float:
        # The responses of one kernel for each direction: the identity as weights, of the first symmetry.
        matrix = np.asarray(layer.whitening)
        windows = np.lib.stride_tricks.sliding_window_view(images, (4, 4), axis=(1, 2))[:, ::2, ::2]
        responses = np.moveaxis(windows, 3, -1).reshape(-1, 48) @ matrix.T
        variances = np.linalg.eigvalsh(np.cov(responses, rowvar=False))
        return float(variances[-1] / variances[0])

    before = condition()
    plain = of(layer, images)
    layer.whiten(images)
    assert before > 1000
    assert condition() < before / 100
    assert np.abs(of(layer, images) - plain).max() > 0.1
    for symmetry in range(ORDER):
        wanted = moved(of(layer, images[:3]), symmetry)
        np.testing.assert_allclose(of(layer, moved(images[:3], symmetry, lifted=False)), wanted, atol=2e-4)


@pytest.mark.parametrize("options", [{"lifted": False}, {"lifted": True, "whitened": True}])
def test_only_first_layers_that_are_told_so_whiten(options: dict[str, bool]) -> None:
    layer = SymmetricConv2D(1, 3, padding=1, **options)
    layer(maps(8))
    with pytest.raises(ValueError, match="built with whitened=True whitens"):
        layer.whiten(maps(8))


@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), [(8, 3, 2, 1), (9, 4, 2, 1), (8, 3, 3, 0)])
def test_maps_whose_borders_are_not_reached_alike_are_refused(
    side: int, kernel: int, stride: int, padding: int
) -> None:
    with pytest.raises(ValueError, match=r"expected a square map whose both borders are reached alike"):
        SymmetricConv2D(1, kernel, stride, padding, lifted=False)(maps(3, side))


def test_maps_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="on a map of 8x6; expected a square map"):
        SymmetricConv2D(1, 2, lifted=False)(np.zeros((1, 8, 6, 3), dtype=np.float32))


NETWORKS: dict[str, dict[str, Any]] = {
    "two squares": {"first_maps": 8, "hidden": 16},
    "two squares, pooled": {"first_maps": 16, "hidden": 8, "pool": 4},
    "two squares, large steps": {"first_maps": 8, "hidden": 16, "kernel": 8, "stride": 4},
    "three squares": {"first_maps": 8, "inner_maps": 16, "hidden": 8},
    "three squares, pooled": {
        "first_maps": 8,
        "inner_maps": 8,
        "hidden": 8,
        "inner_kernel": 3,
        "inner_stride": 1,
        "pool": 2,
    },
}
# What there is of symmetric networks only.
QUADRATIC: dict[str, dict[str, Any]] = {
    "two quadratics": {"first_maps": 16, "hidden": 8, "activation": "quadratic"},
    "three quadratics, whitened": {
        "first_maps": 8,
        "inner_maps": 16,
        "hidden": 8,
        "activation": "quadratic",
        "whitened": True,
    },
    "four quadratics": {
        "first_maps": 8,
        "inner_maps": 8,
        "inner_kernel": 3,
        "inner_stride": 1,
        "inner_pool": 2,
        "third_maps": 16,
        "pool": 2,
        "hidden": 8,
        "activation": "quadratic",
    },
}


@pytest.mark.parametrize("options", (NETWORKS | QUADRATIC).values(), ids=NETWORKS | QUADRATIC)
def test_networks_answer_alike_for_all_symmetries_and_collapse(options: dict[str, Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = randomised(symmetric(16, **options))
    images = np.random.default_rng(2).random((6, 16, 16, 3), dtype=np.float32)
    if options.get("whitened"):
        model.layers[0].whiten(images)
    logits = answers_alike(model, images)

    network = collapse(model)
    assert largest_difference(network, model, [images]) < 1e-5
    squares = 2 + ("inner_maps" in options) + ("third_maps" in options)
    assert network.squares == squares
    assert [type(layer) for layer in network.linears] == [Convolution] * (squares - 1) + [Dense] * 2

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    np.testing.assert_array_equal(again.predict(images, verbose=0), logits)


def test_a_symmetric_network_collapses_to_the_sizes_of_an_ordinary_one() -> None:
    network = collapse(symmetric(32))
    ordinary = collapse(SQUARES["cryptonet"](32, 1.0))
    assert [layer.describe() for layer in network.linears] == [layer.describe() for layer in ordinary.linears]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_maps": 12}, "first_maps is 12; channels come in orbits of 8, so give a multiple of 8"),
        ({"first_maps": 0}, "first_maps is 0"),
        ({"inner_maps": 20}, "inner_maps is 20"),
        ({"hidden": 50}, "hidden is 50"),
        ({"inner_maps": 8, "third_maps": 4}, "third_maps is 4"),
        ({"third_maps": 8}, "third_maps is 8 and inner_maps 0; give inner_maps first"),
        ({"activation": "relu"}, "activation is 'relu'; choose one of square, quadratic"),
        ({"pool": 3}, "pool is 3 on a map of 8x8; give a divisor of 8"),
        ({"kernel": 3}, "both borders are reached alike"),
    ],
)
def test_sizes_that_break_the_symmetry_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        symmetric(16, **options)


def test_width_multiplies_the_channels_in_whole_orbits() -> None:
    def channels(width: float, **options: Any) -> list[int]:
        model = SQUARES["symmetric"](16, width, **options)
        return [layer.orbits * ORDER for layer in model.layers if isinstance(layer, SymmetricConv2D)]

    assert channels(1) == [16, 64]
    assert channels(0.1) == [8, 8]
    assert channels(1.5, inner_maps=16, first_maps=8) == [16, 24, 96]  # 12 rounds to 16: halves go to the even orbit


def test_ordinary_symmetric_networks_answer_alike_for_all_symmetries() -> None:
    network, _ = ordinary_network("symmetric-plain", 32, 0.25)
    randomised(network)
    images = np.random.default_rng(2).random((4, 32, 32, 3), dtype=np.float32)
    answers_alike(network, images)


def test_multiplications_are_those_of_the_convolution_that_it_is() -> None:
    entry = keras.Input((8, 8, 3))
    values = SymmetricConv2D(2, 4, 2, 1, lifted=False)(entry)
    network = keras.Model(entry, layers.Dense(2)(layers.Flatten()(values)))
    assert multiply_adds(network) == 4 * 4 * (4 * 4 * 3) * 16 + 4 * 4 * 16 * 2


def test_the_network_without_symmetry_has_the_same_sizes_and_collapses() -> None:
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(2).random((4, 16, 16, 3), dtype=np.float32)
    for options in NETWORKS.values():
        model = squares(16, **options)
        network = collapse(model)
        twin = collapse(symmetric(16, **options))
        assert [layer.describe() for layer in network.linears] == [layer.describe() for layer in twin.linears]
        assert largest_difference(network, model, [images]) < 1e-5
    turned = np.ascontiguousarray(transformed(images, 1, (1, 2)))
    assert np.abs(model.predict(turned, verbose=0) - model.predict(images, verbose=0)).max() > 1e-6
    with pytest.raises(ValueError, match="pool is 3 on a map of 8x8"):
        squares(16, pool=3)
    assert [layer.outputs for layer in collapse(SQUARES["squares"](16, 0.5, first_maps=6)).linears] == [192, 32, 2]
