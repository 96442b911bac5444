"""Keras files: what folds is read, and nothing that the file names is loaded beyond that."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from hemacrypt.errors import InteropError
from hemacrypt.model.network import CollapsedNetwork
from training.interop import read_keras
from training.models import Quadratic, Square


def stack() -> list[Any]:
    return [
        layers.Rescaling(0.5, name="half"),
        layers.Conv2D(3, 3, padding="same", name="conv"),
        layers.BatchNormalization(name="norm"),
        Quadratic(name="poly"),
        layers.AveragePooling2D(2, name="pool"),
        layers.Flatten(name="flat"),
        layers.Dropout(0.5, name="drop"),
        layers.Dense(5, name="inner"),
        Square(name="square"),
        layers.Dense(2, name="logits"),
    ]


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((6, 8, 2)), *stack()])


def functional() -> keras.Model:
    start = value = keras.Input((6, 8, 2))
    for layer in stack():
        value = layer(value)
    return keras.Model(start, value)


@pytest.mark.parametrize("make", [sequential, functional])
def test_a_saved_model_is_the_network_that_it_was(tmp_path: Path, make: Callable[[], keras.Model]) -> None:
    keras.utils.set_random_seed(1)
    model = make()
    model.get_layer("poly").set_weights(np.random.default_rng(1).normal(size=(3, 3)))
    model.save(tmp_path / "model.keras")
    found = read_keras(tmp_path / "model.keras")
    assert found.input_shape == (2, 6, 8)
    images = np.random.default_rng(2).random((4, 6, 8, 2), dtype=np.float32)
    got = CollapsedNetwork(found.input_shape, found.linears)(np.moveaxis(images, -1, 1))
    np.testing.assert_allclose(got, model.predict(images, verbose=0), rtol=1e-5, atol=1e-5)


def test_layers_that_do_not_fold_are_refused_before_keras_sees_them(tmp_path: Path) -> None:
    for layer, words in (
        (layers.ReLU(name="act"), r"'act' is ReLU.*use Square"),
        (layers.Lambda(lambda x: x + 1, name="code"), r"'code' is Lambda"),
        (layers.MaxPooling2D(2, name="most"), r"'most' is MaxPooling2D.*AveragePooling2D"),
        (keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(1, 1)], name="nest"), r"'nest' is Sequential"),
    ):
        model = keras.Sequential([keras.Input((6, 6, 1)), layer, layers.Flatten(), layers.Dense(2)])
        model.save(tmp_path / "model.keras")
        with pytest.raises(InteropError, match=words):
            read_keras(tmp_path / "model.keras")


def test_an_activation_inside_a_layer_is_refused(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(2, "softmax", name="out")])
    model.save(tmp_path / "model.keras")
    with pytest.raises(InteropError, match=r"'out' has the activation 'softmax'.*no softmax"):
        read_keras(tmp_path / "model.keras")


def test_branches_are_refused(tmp_path: Path) -> None:
    start = keras.Input((6, 6, 1))
    one = layers.Conv2D(1, 3, name="one")(start)
    layers.Conv2D(1, 3, name="two")(start)
    model = keras.Model(start, [layers.Flatten(name="flat")(one), layers.Conv2D(1, 3, name="two")(start)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(InteropError, match="chain without branches"):
        read_keras(tmp_path / "model.keras")


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the description inside a saved model."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    change(config)
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def test_code_from_elsewhere_is_not_loaded(tmp_path: Path) -> None:
    sequential().save(tmp_path / "model.keras")
    foreign = {"module": "os", "class_name": "system", "config": {"command": "true"}, "registered_name": None}

    def plant(config: dict[str, Any]) -> None:
        next(part for part in config["config"]["layers"] if part["class_name"] == "Dense")["config"][
            "kernel_initializer"
        ] = foreign

    with pytest.raises(InteropError, match="wants code of the module 'os'"):
        read_keras(rewritten(tmp_path / "model.keras", plant))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    with pytest.raises(InteropError, match="No such file"):
        read_keras(path)
    path.write_bytes(b"\x89HDF")
    with pytest.raises(InteropError, match=r"is no \.keras file"):
        read_keras(path)
    sequential().save(path)
    with pytest.raises(InteropError, match="is a Model; expected"):
        read_keras(rewritten(path, lambda config: config.update(class_name="Model")))
    with pytest.raises(InteropError, match=r"is no \.keras file"):
        read_keras(rewritten(path, lambda config: config.update(config=[])))
    sequential().save(path)
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
    with pytest.raises(InteropError, match="cannot be loaded"):
        read_keras(path)
