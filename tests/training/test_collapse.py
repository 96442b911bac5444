"""The collapsed network computes what Keras computes, and whatever cannot fold is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from hemacrypt.model.network import Convolution, Dense
from training.collapse import collapse, largest_difference
from training.errors import CollapseError
from training.models import Quadratic, Square, cryptonet
from training.settings import Settings

Layers = Callable[[], list[Any]]


def model_of(*stack: Any, shape: tuple[int, int, int] = (12, 12, 3), seed: int = 0) -> keras.Sequential:
    """Build a model with random weights everywhere, also where training would start from zeros and ones."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), *stack])
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights(
                [rng.uniform(0.5, 1.5, w.shape) if "var" in w.name or "gamma" in w.name else rng.normal(size=w.shape)
                 for w in layer.weights]
            )  # fmt: skip
        elif layer.weights and getattr(layer, "use_bias", False):
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel, rng.normal(size=bias.shape) / 4])
    return model


def cells(shape: tuple[int, int, int] = (12, 12, 3), n: int = 20) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).random((n, *shape), dtype=np.float32)


def head() -> list[Any]:
    return [layers.Flatten(), layers.Dense(2)]


EXACT: dict[str, tuple[Layers, type]] = {
    # what stands before the first square, and as what it folds
    "convolution": (lambda: [layers.Conv2D(4, 3)], Convolution),
    "without bias": (lambda: [layers.Conv2D(4, 3, use_bias=False)], Convolution),
    "stride": (lambda: [layers.Conv2D(4, 3, strides=2)], Convolution),
    "same, even kernel": (lambda: [layers.Conv2D(4, 4, strides=2, padding="same")], Convolution),
    "same, asymmetric": (lambda: [layers.Conv2D(4, 3, strides=2, padding="same")], Convolution),
    "same, kernel not square": (lambda: [layers.Conv2D(4, (5, 2), padding="same")], Convolution),
    "normalised": (lambda: [layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()], Convolution),
    "normalised, bare": (
        lambda: [layers.Conv2D(4, 3), layers.BatchNormalization(center=False, scale=False)],
        Convolution,
    ),
    "pooled": (lambda: [layers.Conv2D(4, 3, padding="same"), layers.AveragePooling2D(2)], Convolution),
    "pooled, overlapping": (
        lambda: [layers.Conv2D(4, 3, strides=2, padding="same"), layers.AveragePooling2D(3, strides=1)],
        Convolution,
    ),
    "pooled, rest cut off": (
        lambda: [layers.Conv2D(4, 4, padding="same"), layers.AveragePooling2D((5, 4), strides=5)],
        Convolution,
    ),
    "pooled and normalised": (
        lambda: [
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.AveragePooling2D(2),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
        ],
        Convolution,
    ),
    "two unpadded": (lambda: [layers.Conv2D(4, 3, strides=2, padding="same"), layers.Conv2D(5, 2)], Convolution),
    "pooling first": (lambda: [layers.AveragePooling2D(2), layers.Conv2D(4, 3)], Convolution),
    "normalisation first": (lambda: [layers.BatchNormalization(), layers.Conv2D(4, 3)], Convolution),
    # Zeros of the padding are not normalised zeros: at the border the bias is another.
    "normalisation before padding": (
        lambda: [layers.BatchNormalization(), layers.Conv2D(4, 3, padding="same")],
        Convolution,
    ),
    "rescaled": (lambda: [layers.Rescaling(2.0, offset=-1.0), layers.Conv2D(4, 3, padding="same")], Convolution),
    "two padded": (lambda: [layers.Conv2D(4, 3, padding="same"), layers.Conv2D(5, 3, padding="same")], Dense),
    "dense": (lambda: [layers.Flatten(), layers.Dense(8)], Dense),
    "convolution and dense": (
        lambda: [
            layers.Conv2D(4, 3, padding="same"),
            layers.AveragePooling2D(2),
            layers.Conv2D(4, 3, padding="same"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(8, use_bias=False),
            layers.BatchNormalization(),
            layers.Dense(5),
        ],
        Dense,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_collapsed_network_equals_keras(name: str) -> None:
    stack, kind = EXACT[name]
    first = stack()
    rest = [layers.Dense(2)] if any(isinstance(layer, layers.Flatten) for layer in first) else head()
    model = model_of(*first, Square(), *rest)
    network = collapse(model)
    assert len(network.linears) == 2
    assert isinstance(network.linears[0], kind)
    assert largest_difference(network, model, [cells()]) < 1e-5


@pytest.mark.parametrize("shape", [(11, 13, 1), (9, 9, 2)])
def test_odd_maps_fold_too(shape: tuple[int, int, int]) -> None:
    model = model_of(layers.Conv2D(3, 4, strides=3, padding="same"), Square(), *head(), shape=shape)
    assert largest_difference(collapse(model), model, [cells(shape)]) < 1e-5


def test_a_square_between_flatten_and_dense_keeps_the_order_of_values() -> None:
    model = model_of(layers.Conv2D(3, 3), layers.Flatten(), Square(), layers.Dense(2))
    assert largest_difference(collapse(model), model, [cells()]) < 1e-5


QUADRATIC: dict[str, Layers] = {
    "on a map": lambda: [layers.Conv2D(3, 3), Quadratic(), *head()],
    "before padding": lambda: [
        layers.Conv2D(3, 3),
        Quadratic(),
        layers.Conv2D(4, 3, padding="same"),
        Square(),
        *head(),
    ],
    "after a dense layer": lambda: [layers.Flatten(), layers.Dense(7), Quadratic(), layers.Dense(2)],
    "twice": lambda: [layers.Conv2D(3, 4, strides=3), Quadratic(), Quadratic(), *head()],
    "on the image itself": lambda: [Quadratic(), *head()],
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_quadratic_activation_folds_into_the_maps_around_its_square(name: str) -> None:
    model = model_of(*QUADRATIC[name]())
    rng = np.random.default_rng(3)
    quadratics = [layer for layer in model.layers if isinstance(layer, Quadratic)]
    for layer in quadratics:
        layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    network = collapse(model)
    assert network.squares == len(quadratics) + sum(isinstance(layer, Square) for layer in model.layers)
    assert largest_difference(network, model, [cells()]) < 1e-5


def test_a_quadratic_activation_begins_as_a_square_and_survives_saving(tmp_path: Path) -> None:
    model = model_of(layers.Conv2D(3, 3), Quadratic(), *head())
    twin = model_of(layers.Conv2D(3, 3), Square(), *head())
    twin.set_weights([w for w, v in zip(model.get_weights(), model.weights, strict=True) if "quadratic" not in v.path])
    np.testing.assert_allclose(model.predict(cells(), verbose=0), twin.predict(cells(), verbose=0), rtol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    np.testing.assert_array_equal(again.predict(cells(), verbose=0), model.predict(cells(), verbose=0))


def test_the_shipped_network_folds_to_convolution_square_dense_square_dense() -> None:
    model = cryptonet(Settings())
    network = collapse(model)
    first, second, third = network.linears
    assert isinstance(first, Convolution)
    assert first.kernel.shape == (16, 3, 4, 4)
    assert first.output_shape == (16, 16, 16)
    assert [(layer.inputs, layer.outputs) for layer in (second, third)] == [(4096, 64), (64, 2)]
    assert largest_difference(network, model, [cells((32, 32, 3))]) < 1e-5


def test_the_check_sees_a_wrong_network() -> None:
    model = model_of(layers.Conv2D(4, 3), Square(), *head())
    other = model_of(layers.Conv2D(4, 3), Square(), *head(), seed=1)
    assert largest_difference(collapse(other), model, [cells()]) > 1e-2


REFUSED: dict[str, tuple[Layers, str]] = {
    "relu layer": (lambda: [layers.Conv2D(4, 3), layers.ReLU(name="act"), *head()], "'act' is ReLU.*use Square"),
    "relu inside": (lambda: [layers.Conv2D(4, 3, activation="relu", name="c"), *head()], "'c' has.*'relu'.*Square"),
    "activation layer": (lambda: [layers.Activation("tanh", name="t"), *head()], "'t' is Activation.*use Square"),
    "softmax": (lambda: [layers.Flatten(), layers.Dense(2, activation="softmax")], "softmax.*no softmax"),
    "softmax layer": (lambda: [*head(), layers.Softmax()], "is Softmax.*no layer at all"),
    "max pooling": (lambda: [layers.MaxPooling2D(2), *head()], "MaxPooling2D.*use AveragePooling2D"),
    "padded pooling": (lambda: [layers.AveragePooling2D(5, padding="same"), *head()], "pads its windows"),
    "dilated": (lambda: [layers.Conv2D(4, 3, dilation_rate=2), *head()], "grouped or dilated"),
    "uneven stride": (lambda: [layers.Conv2D(4, 3, strides=(1, 2)), *head()], "same in both directions"),
    "dense on a map": (lambda: [layers.Dense(4, name="d"), *head()], "'d' reads a feature map; put Flatten"),
    "normalised after flatten": (
        lambda: [layers.Flatten(), layers.BatchNormalization(), layers.Dense(2)],
        "put it before Flatten",
    ),
    "two squares": (lambda: [layers.Conv2D(4, 3), Square(), Square(name="s"), *head()], "nothing linear.*'s'"),
    "square at the end": (lambda: [*head(), Square()], "ends in a Square"),
    "attention": (lambda: [layers.LayerNormalization(), *head()], "use BatchNormalization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fold_is_refused_by_name(name: str) -> None:
    stack, message = REFUSED[name]
    with pytest.raises(CollapseError, match=message):
        collapse(model_of(*stack()))


def test_a_functional_model_is_refused() -> None:
    cell = keras.Input((4, 4, 3))
    with pytest.raises(CollapseError, match=r"expected keras\.Sequential"):
        collapse(keras.Model(cell, layers.Flatten()(cell)))
