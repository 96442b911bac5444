"""Ordinary networks: shapes, sizes, what they start from."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from training.errors import RunError
from training.ordinary import FEATURES, NETWORKS, multiply_adds, ordinary_network


@pytest.mark.parametrize("architecture", NETWORKS)
def test_every_network_gives_two_logits_and_has_features(architecture: str) -> None:
    network, words = ordinary_network(architecture, 32, 0.05)
    images = np.random.default_rng(0).random((3, 32, 32, 3), dtype=np.float32)
    logits = network.predict(images, verbose=0)
    assert logits.shape == (3, 2)
    assert np.isfinite(logits).all()
    assert network.get_layer(FEATURES).output.shape[0] is None
    assert words == "from scratch"


@pytest.mark.parametrize(
    ("architecture", "convolutions"), [("vgg16", 13), ("vgg19", 16), ("resnet50", 53), ("alexnet", 5)]
)
def test_depths_and_channels_are_the_published_ones(architecture: str, convolutions: int) -> None:
    network, _ = ordinary_network(architecture, 64, 1.0)
    layers = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(layers) == convolutions
    assert (layers[0].filters, max(layer.filters for layer in layers)) == {
        "vgg16": (64, 512),
        "vgg19": (64, 512),
        "resnet50": (64, 2048),
        "alexnet": (96, 384),
    }[architecture]


def test_multiplications_by_hand() -> None:
    network = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(5, 3, strides=2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    assert multiply_adds(network) == 4 * 4 * 3 * 3 * 3 * 5 + 80 * 2


def test_two_logits_have_the_sigmoid_as_softmax_and_are_read_back(tmp_path: Path) -> None:
    network, _ = ordinary_network("cryptonet-relu", 32, 0.1)
    images = np.random.default_rng(0).random((4, 32, 32, 3), dtype=np.float32)
    logits = network.predict(images, verbose=0)
    np.testing.assert_array_equal(logits[:, 0], -logits[:, 1])
    network.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    np.testing.assert_array_equal(again.predict(images, verbose=0), logits)


def test_the_words_say_when_imagenet_weights_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ordinary_network("plain", 32, 1.0, "imagenet")[1] == "from scratch (Keras has no ImageNet weights for it)"
    assert "width 1 only" in ordinary_network("vgg16", 32, 0.1, "imagenet")[1]

    def offline(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("keras.applications.VGG16", offline)
    network, words = ordinary_network("vgg16", 32, 1.0, "imagenet")
    assert words == "from scratch (ImageNet weights could not be obtained: OSError)"
    assert network.output_shape == (None, 2)


def test_unknown_networks_and_options_are_refused() -> None:
    with pytest.raises(RunError, match="no ordinary network 'lenet'; choose one of plain"):
        ordinary_network("lenet", 32, 1.0)
    with pytest.raises(RunError, match="'plain' does not take the options"):
        ordinary_network("plain", 32, 1.0, depth=3)
