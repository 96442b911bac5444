"""The loss with teachers, and the mean over symmetries."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from training.study.config import ModelConfig
from training.study.learners import learn_network
from training.study.teaching import Doubles, Lesson, TaughtLoss, network_input, optimizer_of, over_symmetries, targets

RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 1, 0, 1], dtype=np.uint8)
FOUND, SOFT = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 2)) * 3


def softmax(values: Doubles) -> Doubles:
    powers = np.exp(values)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 2.0), (0.7, 2.0), (1.0, 4.0)])
def test_the_loss_is_that_of_hinton_by_hand(alpha: float, temperature: float) -> None:
    hard = -np.log(softmax(FOUND)[np.arange(5), LABELS])
    p, q = softmax(SOFT / temperature), softmax(FOUND / temperature)
    expected = (1 - alpha) * hard + alpha * temperature**2 * (p * np.log(p / q)).sum(axis=1)
    loss = TaughtLoss(alpha, temperature, 0.0).call(targets(LABELS, SOFT), FOUND.astype(np.float32))
    np.testing.assert_allclose(np.asarray(loss), expected, rtol=1e-4)  # of float32


def test_labels_are_smoothed() -> None:
    logs = np.log(softmax(FOUND))
    wanted = np.eye(2)[LABELS] * 0.9 + 0.05
    loss = TaughtLoss(0.0, 1.0, 0.1).call(targets(LABELS, None), FOUND.astype(np.float32))
    np.testing.assert_allclose(np.asarray(loss), -(wanted * logs).sum(axis=1), rtol=1e-5)


def test_the_mean_over_symmetries_takes_each_of_the_eight_once() -> None:
    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    image[0, 0, 1] = 1  # of no symmetry: eight different places
    seen: list[tuple[int, int]] = []

    def predict(images: np.ndarray) -> Doubles:  # type: ignore[type-arg]
        row, column = np.argwhere(images[0, :, :, 0])[0]
        seen.append((int(row), int(column)))
        return np.array([[row, column]], dtype=np.float64)

    mean = over_symmetries(predict)(image)
    assert len(set(seen)) == len(seen) == 8
    np.testing.assert_allclose(mean, [[1.5, 1.5]])


def test_networks_see_what_bundles_see() -> None:
    images = RNG.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(network_input(images), images / 255, rtol=1e-6)


@pytest.mark.parametrize(("optimizer", "orthogonal"), [("muon", True), ("adamw", False)])
def test_muon_makes_the_updates_of_matrices_orthogonal_and_leaves_logits_to_adam(
    optimizer: str, orthogonal: bool
) -> None:
    model = ModelConfig.model_validate(
        {"name": "a", "family": "square", "architecture": "symmetric", "optimizer": optimizer, "weight_decay": 0.0}
    )
    network = keras.Sequential([keras.Input((12,)), keras.layers.Dense(6), keras.layers.Dense(2, name="logits")])
    chosen = optimizer_of(model, 0.1)
    before = [np.asarray(weight) for weight in network.trainable_weights]
    gradients = [RNG.normal(size=weight.shape).astype(np.float32) for weight in network.trainable_weights]
    chosen.apply(list(map(keras.ops.convert_to_tensor, gradients)), network.trainable_weights)
    steps = [np.asarray(weight) - old for weight, old in zip(network.trainable_weights, before, strict=True)]
    values = np.linalg.svd(steps[0], compute_uv=False)
    wanted = np.linalg.svd(gradients[0], compute_uv=False)
    assert wanted[0] / wanted[-1] > 2
    assert (values[0] / values[-1] < 1.8) == orthogonal
    for step in steps[1:]:  # Adam's first step is the learning rate along every sign
        np.testing.assert_allclose(np.abs(step), 0.1, rtol=1e-3)


def test_a_network_that_can_be_whitened_is_whitened_with_its_own_training_cells() -> None:
    model = ModelConfig.model_validate(
        {
            "name": "a",
            "family": "square",
            "architecture": "symmetric",
            "size": 32,
            "epochs": 1,
            "optimizer": "muon",
            "options": {"first_maps": 8, "hidden": 8, "activation": "quadratic", "whitened": True},
        }
    )
    images = RNG.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    images[::2] //= 4
    labels = (np.arange(40) % 2).astype(np.uint8)
    weights = np.ones(40, dtype=np.float32)
    learned = learn_network(Lesson(model, images, labels, weights, None, None, None, None, seed=0))
    matrix = np.asarray(learned.network.layers[0].whitening)  # type: ignore[union-attr]
    assert np.abs(matrix - np.diag(np.diag(matrix))).max() > 1e-3
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-4 * np.abs(matrix).max())
    assert np.isfinite(learned.logits(images)).all()
