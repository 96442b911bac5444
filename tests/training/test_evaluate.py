"""Figures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from training.errors import DataError
from training.evaluate import disagreements, figures

SCORES = np.array([3.0, 1.0, -1.0, -2.0, 2.0, -3.0])
LOGITS = np.stack([np.zeros(6), SCORES], axis=1)
LABELS = np.array([1, 1, 1, 0, 0, 0], dtype=np.uint8)
SUBJECTS = np.array(["1", "1", "2", "H1", "H2", "H2"])


def test_figures_by_hand() -> None:
    found = figures(LOGITS, LABELS, SUBJECTS, "words")
    assert (found.n, found.n_subjects, found.protocol) == (6, 4, "words")
    assert found.sensitivity == pytest.approx(2 / 3)
    assert found.specificity == pytest.approx(2 / 3)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.auroc == pytest.approx(7 / 9)  # of nine pairs, the normal cell at 2 beats two leukaemic ones
    assert found.largest_logit == 3.0
    assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]


def test_balanced_accuracy_does_not_follow_the_larger_class() -> None:
    logits = np.tile([0.0, 1.0], (10, 1))
    labels = np.array([1] * 9 + [0], dtype=np.uint8)
    found = figures(logits, labels, np.arange(10).astype(str), "w")
    assert (found.accuracy, found.balanced_accuracy, found.auroc) == (0.9, 0.5, 0.5)


def test_intervals_resample_persons_not_cells() -> None:
    # Hundreds of cells, but the answer depends on which of few persons were drawn.
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300).astype(np.uint8)
    score = np.where(np.arange(600) % 300 < 150, 1.0, -1.0) * np.where(labels, 1, -1) + rng.normal(0, 0.1, 600)
    logits = np.stack([np.zeros(600), score], axis=1)
    persons = np.array([f"{'' if y else 'H'}{i % 300 // 75}" for i, y in enumerate(labels)])
    wide = figures(logits, labels, persons, "w").accuracy_interval
    narrow = figures(logits, labels, np.arange(600).astype(str), "w").accuracy_interval
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_figures_of_one_label_or_broken_logits_are_refused() -> None:
    with pytest.raises(DataError, match="only the labels"):
        figures(LOGITS[:3], LABELS[:3], SUBJECTS[:3], "w")
    with pytest.raises(DataError, match="two finite logits"):
        figures(np.full((6, 2), np.nan), LABELS, SUBJECTS, "w")
    with pytest.raises(DataError, match="two finite logits"):
        figures(LOGITS[:5], LABELS, SUBJECTS, "w")


def test_disagreements_count_labels_not_values() -> None:
    assert disagreements(LOGITS, LOGITS + 0.5) == 0
    assert disagreements(LOGITS, -LOGITS) == 6
