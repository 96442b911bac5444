"""The loss with teachers, and the mean over symmetries."""

from __future__ import annotations

import numpy as np
import pytest

from training.study.teaching import Doubles, TaughtLoss, network_input, over_symmetries, targets

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
