"""Figures against values worked out by hand, and against scikit-learn on every resample."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from training import evaluate
from training.errors import DataError
from training.evaluate import calibration_error, disagreements, figures, paired_difference, subject_scores
from training.report import figures_table

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
    assert found.intervals["accuracy"][0] < found.accuracy < found.intervals["accuracy"][1]


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
    wide = figures(logits, labels, persons, "w").intervals["accuracy"]
    narrow = figures(logits, labels, np.arange(600).astype(str), "w").intervals["accuracy"]
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


def clustered(seed: int, ties: bool = False) -> tuple[npt.NDArray[Any], ...]:
    """Return logits, labels and groups of cells that resemble each other within a group."""
    rng = np.random.default_rng(seed)
    index = np.concatenate([np.arange(12), rng.integers(0, 12, 200)])
    labels = (index < 8).astype(np.uint8)
    score = labels + rng.normal(size=12)[index] + rng.normal(size=len(index))
    score = score.round() if ties else score
    return np.stack([-score / 2, score / 2], axis=1), labels, np.array([f"g{i:02}" for i in index])


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_weighted_groups_are_those_of_scikit_learn_on_the_cells_drawn(ties: bool) -> None:
    logits, labels, groups = clustered(1, ties)
    grouping = evaluate._Grouping.of(groups, labels)
    weights = grouping.resampled(20)
    found = evaluate._Cells(logits, labels, grouping).metrics(weights)
    for i, row in enumerate(weights):
        drawn = np.repeat(np.arange(len(labels)), row[grouping.index].astype(int))
        truth, score = labels[drawn], logits[drawn, 1] - logits[drawn, 0]
        called = score > 0
        expected = {
            "accuracy": accuracy_score(truth, called),
            "balanced_accuracy": balanced_accuracy_score(truth, called),
            "weighted_f1": f1_score(truth, called, average="weighted"),
            "auroc": roc_auc_score(truth, score),
            "sensitivity": called[truth == 1].mean(),
            "specificity": (~called)[truth == 0].mean(),
            "ece": calibration_error(logits[drawn], truth),
        }
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value), name


def test_both_labels_are_in_every_resample_however_few_donors_there_are() -> None:
    labels = np.array([1] * 20 + [0], dtype=np.uint8)
    groups = np.array([f"{i}" for i in range(20)] + ["H1"])
    drawn = evaluate._Grouping.of(groups, labels).resampled(200)
    assert (drawn.sum(axis=1) == 21).all()
    assert (drawn[:, list(np.unique(groups)).index("H1")] == 1).all()
    # A group with cells of both labels is no donor and no patient: it is drawn among its like.
    mixed = evaluate._Grouping.of(np.array(["a", "a", "b", "c", "c"]), np.array([0, 1, 0, 1, 1], dtype=np.uint8))
    assert mixed.stratum.tolist() == [1, 0, 2]


def test_intervals_surround_the_figure_and_are_the_same_every_time() -> None:
    logits, labels, groups = clustered(2)
    found = figures(logits, labels, groups, "w")
    for name in ("accuracy", "balanced_accuracy", "weighted_f1", "auroc", "sensitivity", "subject_auroc"):
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high
    assert set(found.intervals) == {name for name in type(found).model_fields if name in found.intervals}
    assert len(found.intervals) == 9
    assert figures(logits, labels, groups, "w") == found
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_subjects_count_once_whatever_their_number_of_cells() -> None:
    score = np.array([1.0, 1.0, 1.0, -4.0, 2.0, -1.0, 0.5])
    logits = np.stack([np.zeros(7), score], axis=1)
    labels = np.array([1, 1, 1, 1, 1, 0, 0], dtype=np.uint8)
    subjects = np.array(["9", "9", "9", "9", "2", "H1", "H3"])
    found = figures(logits, labels, subjects, "w", groups=np.array(["2+9"] * 5 + ["H1", "H3"]))
    assert (found.n_subjects, found.n_leukaemic_subjects, found.n_normal_subjects, found.n_groups) == (4, 2, 2, 3)
    assert (found.n, found.n_leukaemic) == (7, 5)
    assert found.subject_auroc == pytest.approx(3 / 4)  # means: 9 -0.25, 2 2, H1 -1, H3 0.5
    assert found.subject_accuracy == pytest.approx(2 / 4)
    scores = {score.subject: score for score in subject_scores(logits, labels, subjects)}
    assert [s.subject for s in subject_scores(logits, labels, subjects)] == ["2", "9", "H1", "H3"]
    assert (scores["9"].label, scores["9"].cells) == (1, 4)
    assert scores["9"].mean_difference == pytest.approx(-0.25)
    assert scores["9"].share_leukaemic == pytest.approx(0.75)
    assert (scores["H3"].label, scores["H3"].share_leukaemic) == (0, 1.0)
    labels[0] = 0
    with pytest.raises(DataError, match="cells of both labels"):
        subject_scores(logits, labels, subjects)


def test_calibration_error_by_hand() -> None:
    # Confidence 0.7 (bin 11 of 15), right in one of two; confidence 0.9 (bin 14), right in both.
    odds = np.log(np.array([0.7, 0.7, 0.9, 0.9]) / np.array([0.3, 0.3, 0.1, 0.1]))
    logits = np.stack([np.zeros(4), odds * np.array([1, 1, 1, -1])], axis=1)
    labels = np.array([1, 0, 1, 0])
    assert calibration_error(logits, labels) == pytest.approx(2 / 4 * 0.2 + 2 / 4 * 0.1)
    assert calibration_error(logits + 7.5, labels) == pytest.approx(0.15)  # a softmax knows no constant
    assert calibration_error(np.array([[0.0, 800.0]]), np.array([1])) == 0
    assert calibration_error(np.array([[0.0, 0.0, 0.0]]), np.array([0])) == pytest.approx(2 / 3)
    assert calibration_error(np.zeros((0, 2)), np.zeros(0)) == 0


def test_calibrated_answers_have_little_error_and_boasting_ones_much() -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(0, 2, 20_000)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-score))).astype(np.uint8)
    logits = np.stack([np.zeros(20_000), score], axis=1)
    assert calibration_error(logits, labels) < 0.015
    assert calibration_error(4 * logits, labels) > 0.1


def test_the_difference_of_a_model_from_itself_is_nothing() -> None:
    logits, labels, groups = clustered(3)
    same = paired_difference(logits, logits, labels, groups)
    assert set(same.values.values()) == {0.0}
    assert set(same.intervals.values()) == {(0.0, 0.0)}
    assert (same.n, same.n_groups) == (212, 12)


def test_differences_are_those_of_the_figures_and_narrower_than_unpaired_ones() -> None:
    logits, labels, groups = clustered(4)
    noisy = logits + np.random.default_rng(5).normal(0, 0.5, logits.shape)
    found = paired_difference(logits, noisy, labels, groups)
    one, other = (figures(side, labels, groups, "w") for side in (logits, noisy))
    assert found.auroc == pytest.approx(one.auroc - other.auroc)
    assert found.accuracy == pytest.approx(one.accuracy - other.accuracy)
    low, high = found.intervals["auroc"]
    assert low <= found.auroc <= high
    assert high - low < 0.7 * (one.intervals["auroc"][1] - one.intervals["auroc"][0])
    back = paired_difference(noisy, logits, labels, groups)
    assert back.auroc == pytest.approx(-found.auroc)
    assert back.intervals["auroc"] == pytest.approx((-high, -low))


def test_differences_of_other_cells_are_refused() -> None:
    with pytest.raises(DataError, match="two finite logits"):
        paired_difference(LOGITS, LOGITS[:5], LABELS, SUBJECTS)
    with pytest.raises(DataError, match="only the labels"):
        paired_difference(LOGITS[:3], LOGITS[:3], LABELS[:3], SUBJECTS[:3])
    with pytest.raises(DataError, match="got 5 groups for 6 labels"):
        figures(LOGITS, LABELS, SUBJECTS, "w", SUBJECTS[:5])


def test_the_table_shows_every_metric_with_its_interval_and_the_protocol() -> None:
    found = figures(*clustered(6)[:2], clustered(6)[2], "by the moon")
    table = figures_table({"runs/one": found, "two": found})
    assert [column.header for column in table.columns] == ["", "one", "two"]
    assert table.row_count == 2 + len(found.intervals)
    assert "two: by the moon" in str(table.caption)
    low, high = found.intervals["auroc"]
    assert f"{found.auroc:.3f} ({low:.3f}-{high:.3f})" in list(table.columns[1].cells)
