"""Area and colour alone: what is measured, and that it is learned."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hemacrypt.model.preprocess import Pixels
from training.baselines import Kind, area, fit_baseline, mean_colour
from training.errors import DataError


def squares(sides: list[int], colours: list[tuple[int, int, int]]) -> Pixels:
    """Return one square of a side and a colour on black for each."""
    images = np.zeros((len(sides), 16, 16, 3), dtype=np.uint8)
    for image, side, colour in zip(images, sides, colours, strict=True):
        image[:side, :side] = colour
    return images


def drawn(n: int, by_size: bool, by_colour: bool) -> tuple[Pixels, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    rng = np.random.default_rng(0)
    labels = (np.arange(n) % 2).astype(np.uint8)
    sides = [int(rng.integers(6, 12) + 2 * by_size * label) for label in labels]
    colours = [(100, int(rng.integers(80, 140) + 30 * by_colour * label), 200) for label in labels]
    return squares(sides, colours), labels


def test_area_and_colour_by_hand() -> None:
    images = squares([3, 5, 0], [(10, 0, 30), (1, 2, 3), (9, 9, 9)])
    images[1, 15, 15] = (27, 0, 0)
    assert area(images).tolist() == [[9.0], [26.0], [0.0]]
    np.testing.assert_allclose(mean_colour(images), [[10, 0, 30], [52 / 26, 50 / 26, 75 / 26], [0, 0, 0]])


@pytest.mark.parametrize("kind", ["area", "colour"])
def test_each_baseline_sees_its_own_cue_and_no_other(kind: Kind) -> None:
    for by_size, by_colour in ((True, False), (False, True)):
        images, labels = drawn(400, by_size, by_colour)
        logits = fit_baseline(kind, images[:200], labels[:200]).logits(images[200:])
        accuracy = (logits.argmax(axis=1) == labels[200:]).mean()
        assert (accuracy > 0.65) == ((kind == "area") == by_size)


def test_logits_are_those_of_a_standardised_logistic_regression() -> None:
    images, labels = drawn(200, True, True)
    weights = np.random.default_rng(1).uniform(0.5, 2, 200)
    found = fit_baseline("colour", images, labels, weights).logits(images)
    assert found.shape == (200, 2)
    assert found.dtype == np.float64
    assert (found[:, 0] == 0).all()
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(
        mean_colour(images),
        labels,
        standardscaler__sample_weight=weights,
        logisticregression__sample_weight=weights,
    )
    chances = 1 / (1 + np.exp(-found[:, 1]))
    np.testing.assert_allclose(chances, model.predict_proba(mean_colour(images))[:, 1], atol=1e-3)


def test_what_never_differs_is_no_division_by_nothing() -> None:
    images = squares([4] * 6, [(9, 9, 9)] * 6)
    found = fit_baseline("area", images, np.array([0, 1, 0, 1, 0, 1], dtype=np.uint8)).logits(images)
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_one_label_or_unequal_lengths_are_refused() -> None:
    images, labels = drawn(10, True, False)
    with pytest.raises(DataError, match="and both labels"):
        fit_baseline("area", images, np.zeros(10, dtype=np.uint8))
    with pytest.raises(DataError, match="expected as many of each"):
        fit_baseline("area", images[:5], labels)
    with pytest.raises(DataError, match="expected as many of each"):
        fit_baseline("area", images, labels, np.ones(3))
