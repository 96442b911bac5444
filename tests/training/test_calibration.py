"""Temperature scaling: what it finds, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from training.calibration import LARGEST, SMALLEST, Calibration, calibrate, cross_fitted, fit_temperature, scaled
from training.errors import DataError
from training.evaluate import figures


def overconfident(factor: float, n: int = 4000, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return logits that are ``factor`` times what the labels were drawn from, and these labels."""
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 2, n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(np.uint8)
    return factor * np.stack([-score / 2, score / 2], axis=1), labels


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 40.0])
def test_the_temperature_is_the_factor_that_logits_were_too_large_by(factor: float) -> None:
    logits, labels = overconfident(factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.05)
    # Minus log likelihood, on both sides of the temperature found, is larger.
    found = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        odds = logits / temperature
        return float((np.logaddexp(odds[:, 0], odds[:, 1]) - odds[np.arange(len(labels)), labels]).mean())

    assert loss(found) < min(loss(found * 1.001), loss(found / 1.001))


def test_constants_and_huge_logits_do_no_harm() -> None:
    logits, labels = overconfident(3.0)
    assert fit_temperature(logits + 1e4, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)
    assert fit_temperature(logits * 1e5, labels) == pytest.approx(LARGEST)


def test_one_answer_far_beyond_all_others_does_not_decide() -> None:
    logits, labels = overconfident(2.0, 1000)
    usual = fit_temperature(logits, labels)
    labels[0] = 1
    logits[0] = [2000.0, -2000.0]
    assert fit_temperature(logits, labels) == pytest.approx(usual, rel=0.2)
    # Shown apart, it counts.
    assert fit_temperature(logits[:2], labels[:2]) == pytest.approx(LARGEST)


def test_models_that_are_always_or_never_right_get_the_temperature_at_the_end_of_the_range() -> None:
    logits = np.array([[0.0, 2.0], [3.0, 0.0]])
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(SMALLEST)
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(LARGEST)


def test_three_labels_and_weights() -> None:
    rng = np.random.default_rng(1)
    true = rng.normal(0, 1.5, (5000, 3))
    chances = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    labels = (rng.random((5000, 1)) > chances.cumsum(axis=1)).sum(axis=1)
    assert fit_temperature(2 * true, labels) == pytest.approx(2, rel=0.06)
    # Cells of weight nothing have no say, those of weight two count as if they stood there twice.
    logits, labels = overconfident(2.0, 60)
    weights = np.array([0, 1, 2] * 20)
    assert fit_temperature(logits, labels, weights) == pytest.approx(
        fit_temperature(np.repeat(logits, weights, axis=0), np.repeat(labels, weights))
    )


def test_each_fold_has_the_temperature_of_the_others() -> None:
    logits, labels = overconfident(2.0, 300)
    folds = np.arange(300) % 3
    found = cross_fitted(logits, labels, folds)
    for fold in range(3):
        others = folds != fold
        assert set(found[folds == fold]) == {fit_temperature(logits[others], labels[others])}
    changed = logits.copy()
    changed[folds == 1] *= 10
    assert (cross_fitted(changed, labels, folds)[folds == 1] == found[folds == 1]).all()
    assert (cross_fitted(changed, labels, folds)[folds != 1] > found[folds != 1]).all()


def test_the_calibration_error_falls_while_labels_and_auroc_stay() -> None:
    logits, labels = overconfident(4.0)
    record = calibrate(logits, labels, np.arange(len(labels)) % 4, "drawn numbers")
    assert record.ece_before > 0.1
    assert record.ece_after < 0.03
    assert (record.n, record.fitted_on) == (4000, "drawn numbers")
    assert Calibration.model_validate(record.model_dump()) == record
    after = logits / record.temperature
    assert (after.argmax(axis=1) == logits.argmax(axis=1)).all()
    scores = [values[:, 1] - values[:, 0] for values in (logits, after)]
    assert roc_auc_score(labels, scores[0]) == roc_auc_score(labels, scores[1])
    subjects = np.array([f"{n % 40}-{label}" for n, label in enumerate(labels)])
    one, other = (figures(values, labels, subjects, "w") for values in (logits, after))
    assert (one.auroc, one.accuracy, one.subject_accuracy) == (other.auroc, other.accuracy, other.subject_accuracy)
    assert other.ece < one.ece


def test_what_cannot_be_fitted_is_refused() -> None:
    logits, labels = overconfident(1.0, 10)
    with pytest.raises(DataError, match="at least one cell"):
        fit_temperature(logits[:0], labels[:0])
    with pytest.raises(DataError, match="at least one cell"):
        fit_temperature(logits, labels[:5])
    with pytest.raises(DataError, match="not finite"):
        fit_temperature(np.full((10, 2), np.inf), labels)
    with pytest.raises(DataError, match="no weight is positive"):
        fit_temperature(logits, labels, np.zeros(10))
    with pytest.raises(DataError, match="expected 0 to 1"):
        fit_temperature(logits, labels + 1)
    with pytest.raises(DataError, match="two or more"):
        cross_fitted(logits, labels, np.zeros(10))


NETWORKS = {
    "dense": CollapsedNetwork(
        (1, 2, 2), (Dense(np.arange(12.0).reshape(3, 4), np.ones(3)), Dense(np.eye(2, 3), np.array([0.5, -1.0])))
    ),
    "convolution": CollapsedNetwork((1, 2, 2), (Convolution(np.ones((2, 1, 2, 2)), np.ones(2), (1, 2, 2)),)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_scaled_network_gives_scaled_logits(name: str) -> None:
    images = np.random.default_rng(0).random((5, 1, 2, 2))
    network = NETWORKS[name].calibrated(images)
    cooler = scaled(network, 2.5)
    np.testing.assert_allclose(cooler(images), network(images) / 2.5, rtol=1e-12)
    for found, expected in zip(cooler.peaks, cooler.calibrated(images).peaks, strict=True):
        np.testing.assert_allclose(found, expected)
    assert scaled(NETWORKS[name], 2.5).magnitudes is None


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(DataError, match="expected a positive number"):
        scaled(NETWORKS["dense"], temperature)
