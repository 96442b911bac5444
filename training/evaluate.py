"""Figures: what a set of logits is worth, with the number of cells and of persons behind it.

Every metric here is a function of sums over cells, or over pairs of cells, that can be taken group by group once. A
bootstrap resample is then nothing but a row of weights, one for each group, so that a thousand resamples are a few
matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from training.errors import DataError

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint8]
Strings = npt.NDArray[np.str_]
Interval = tuple[float, float]

BINS = 15


class Figures(BaseModel):
    """Figures of one model on one part of the data; leukaemic counts as positive.

    ``intervals`` holds, by name of the metric, 95 % percentile intervals of a bootstrap that resamples groups of
    subjects, not cells: cells of one person resemble each other, so intervals by cell would be far too narrow. Groups
    are drawn within each label, see `figures`.

    ``weighted_f1`` is the mean of both labels' F1, weighed by their numbers of cells. ``ece`` is the expected
    calibration error, see `calibration_error`. ``subject_auroc`` and ``subject_accuracy`` count every subject once, by
    the mean difference of logits over the subject's cells, see `subject_scores`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str
    n: int
    n_leukaemic: int
    n_subjects: int
    n_leukaemic_subjects: int
    n_normal_subjects: int
    n_groups: int
    accuracy: float
    balanced_accuracy: float
    weighted_f1: float
    auroc: float
    sensitivity: float
    specificity: float
    ece: float
    subject_auroc: float
    subject_accuracy: float
    intervals: dict[str, Interval]
    largest_logit: float


class Difference(BaseModel):
    """By how much one model is better than another on the same cells, by name of the metric.

    ``values`` are figures of the first model minus those of the second; of ``ece`` less is better. ``intervals`` are
    95 % percentile intervals over resamples that both models share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    n_groups: int
    values: dict[str, float]
    intervals: dict[str, Interval]

    @property
    def auroc(self) -> float:
        """Difference of the areas under the curve."""
        return self.values["auroc"]

    @property
    def accuracy(self) -> float:
        """Difference of the accuracies."""
        return self.values["accuracy"]


class SubjectScore(BaseModel):
    """What a model says of one subject.

    Attributes
    ----------
    subject:
        Name in the release.
    label:
        1 leukaemic, 0 normal.
    cells:
        How many cells of the subject were looked at.
    mean_difference:
        Mean over these cells of the logit of leukaemic minus that of normal; above zero means called leukaemic.
    share_leukaemic:
        Share of these cells that are called leukaemic.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    label: int
    cells: int
    mean_difference: float
    share_leukaemic: float


def figures(
    logits: Floats,
    labels: Labels,
    subjects: Strings,
    protocol: str,
    groups: Strings | None = None,
    resamples: int = 1000,
) -> Figures:
    """Compute the figures of one part.

    Parameters
    ----------
    logits:
        Shape (n, 2), order normal, leukaemic.
    labels:
        Shape (n,): 1 leukaemic, 0 normal.
    subjects, groups:
        Shape (n,). Intervals resample groups where given, else subjects.
    protocol:
        How the data was divided, in words; travels with the figures.
    resamples:
        Number of bootstrap resamples, drawn with a fixed seed.

    Raises
    ------
    DataError
        If shapes disagree, a logit is not finite, or only one label occurs.

    Notes
    -----
    The bootstrap is stratified by the label of the group: as many groups of normal donors and as many of patients are
    drawn, with replacement, as there are. Normal donors are few here, and a resample without any would have no curve.
    Percentile intervals: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. That of ``ece``
    lies high: a resample is noisier than the sample, and noise counts as miscalibration.
    """
    subjects = np.asarray(subjects)
    groups = subjects if groups is None else np.asarray(groups)
    _check(logits, labels, subjects, groups)
    grouping = _Grouping.of(groups, labels)
    per_cell = _Cells(logits, labels, grouping)
    score, first, _ = _by_subject(logits, labels, subjects)
    per_subject = _Scores(score, labels[first], grouping.index[first], len(grouping.names))
    everything = np.ones((1, len(grouping.names)))
    drawn = grouping.resampled(resamples)
    values, spread = (per_cell.metrics(weights) | per_subject.metrics(weights) for weights in (everything, drawn))
    subject_labels = labels[first]
    return Figures(
        protocol=protocol,
        n=len(labels),
        n_leukaemic=int(labels.sum()),
        n_subjects=len(np.unique(subjects)),
        n_leukaemic_subjects=int(subject_labels.sum()),
        n_normal_subjects=int((subject_labels == 0).sum()),
        n_groups=len(grouping.names),
        **{name: float(value[0]) for name, value in values.items()},
        intervals={name: _interval(value) for name, value in spread.items()},
        largest_logit=float(np.abs(logits).max()),
    )


def paired_difference(one: Floats, other: Floats, labels: Labels, groups: Strings, resamples: int = 1000) -> Difference:
    """Compare two models on the same cells.

    Both are measured on the same resamples, so what is hard for both does not widen the interval of their difference.

    Parameters
    ----------
    one, other:
        Logits of the same cells, shape (n, 2), order normal, leukaemic. The difference is ``one`` minus ``other``.
    labels, groups:
        Shape (n,).
    resamples:
        As in `figures`, and drawn alike.

    Raises
    ------
    DataError
        As `figures`.
    """
    groups = np.asarray(groups)
    for logits in (one, other):
        _check(logits, labels, groups, groups)
    grouping = _Grouping.of(groups, labels)
    sides = [_Cells(logits, labels, grouping) for logits in (one, other)]
    weights = np.concatenate([np.ones((1, len(grouping.names))), grouping.resampled(resamples)])
    better, worse = (side.metrics(weights) for side in sides)
    differences = {name: better[name] - worse[name] for name in better}
    return Difference(
        n=len(labels),
        n_groups=len(grouping.names),
        values={name: float(value[0]) for name, value in differences.items()},
        intervals={name: _interval(value[1:]) for name, value in differences.items()},
    )


def subject_scores(logits: Floats, labels: Labels, subjects: Strings) -> list[SubjectScore]:
    """Return what a model says of every subject, in the order of their names.

    Parameters
    ----------
    logits, labels, subjects:
        As in `figures`; here one label may be alone.

    Raises
    ------
    DataError
        If shapes disagree, a logit is not finite, or a subject has cells of both labels.
    """
    subjects = np.asarray(subjects)
    _check_shapes(logits, labels, subjects)
    score, first, of_subject = _by_subject(logits, labels, subjects)
    if len(np.unique(subjects[first])) != len(first):
        raise DataError("a subject has cells of both labels; expected one label for all cells of a person")
    cells = np.bincount(of_subject)
    called = np.bincount(of_subject, logits[:, 1] > logits[:, 0]) / cells
    return [
        SubjectScore(
            subject=str(subjects[row]),
            label=int(labels[row]),
            cells=int(cells[i]),
            mean_difference=float(score[i]),
            share_leukaemic=float(called[i]),
        )
        for i, row in enumerate(first)
    ]


def calibration_error(logits: Floats, labels: npt.NDArray[Any], bins: int = BINS) -> float:
    r"""Return the expected calibration error of the label that is named.

    With B_m the cells whose confidence, the largest softmax probability, lies in ((m-1)/M, m/M]:

    .. math:: ECE = \sum_{m=1}^{M} \frac{|B_m|}{n} \left| acc(B_m) - conf(B_m) \right|

    Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, section 2, equation 3.

    Parameters
    ----------
    logits:
        Shape (n, labels).
    labels:
        Shape (n,), numbers of the true labels.
    bins:
        M, of equal width between 0 and 1.

    Returns
    -------
    float
        Between 0 and 1; 0 for no cells.
    """
    bin_of, gap = _confidence_gaps(logits, labels, bins)
    return float(np.abs(np.bincount(bin_of, gap, bins)).sum() / max(len(labels), 1))


def disagreements(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    """Return for how many cells two sets of logits, shape (n, 2) each, name different labels."""
    return int((one.argmax(axis=1) != other.argmax(axis=1)).sum())


# ---------------------------------------------------------------------------------------------- checks


def _check(logits: Floats, labels: Labels, subjects: Strings, groups: Strings) -> None:
    _check_shapes(logits, labels, subjects)
    if groups.shape != labels.shape:
        raise DataError(f"got {len(groups)} groups for {len(labels)} labels; expected one for each cell")
    if set(np.unique(labels)) != {0, 1}:
        raise DataError(f"only the labels {np.unique(labels).tolist()} occur; figures need normal and leukaemic cells")


def _check_shapes(logits: Floats, labels: Labels, subjects: Strings) -> None:
    if logits.shape != (len(labels), 2) or len(subjects) != len(labels) or not np.isfinite(logits).all():
        raise DataError(
            f"got logits of shape {logits.shape} (finite: {bool(np.isfinite(logits).all())}) for {len(labels)} labels "
            f"and {len(subjects)} subjects; expected two finite logits per cell"
        )


# ---------------------------------------------------------------------------------------------- resampling


@dataclass(frozen=True)
class _Grouping:
    """Groups of subjects, and which of them are drawn together.

    Attributes
    ----------
    names:
        The groups.
    index:
        For each cell the number of its group.
    stratum:
        For each group 0 when its cells are normal, 2 when they are leukaemic, 1 when it has both.
    """

    names: Strings
    index: npt.NDArray[np.intp]
    stratum: npt.NDArray[np.intp]

    @classmethod
    def of(cls, groups: Strings, labels: Labels) -> _Grouping:
        names, index = np.unique(groups, return_inverse=True)
        cells, leukaemic = np.bincount(index), np.bincount(index, labels)
        return cls(names, index, (leukaemic > 0).astype(np.intp) + (leukaemic == cells))

    def resampled(self, count: int) -> Floats:
        """Return how often each group is drawn, shape (count, groups), with replacement within each stratum."""
        rng = np.random.default_rng(0)
        weights = np.zeros((count, len(self.names)))
        for stratum in np.unique(self.stratum):
            members = np.flatnonzero(self.stratum == stratum)
            weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=count)
        return weights


def _interval(values: Floats) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------- weighted groups


class _Cells:
    """Sums over the cells of each group, from which every metric of weighted groups follows."""

    def __init__(self, logits: Floats, labels: Labels, grouping: _Grouping) -> None:
        groups, index = len(grouping.names), grouping.index
        positive = labels == 1
        called = logits[:, 1] > logits[:, 0]
        # Columns: true and false calls of leukaemic cells, then of normal ones.
        kinds = [positive & called, positive & ~called, ~positive & ~called, ~positive & called]
        self._counts = np.stack([np.bincount(index, kind, groups) for kind in kinds], axis=1)
        bin_of, gap = _confidence_gaps(logits, labels, BINS)
        self._gaps = np.bincount(index * BINS + bin_of, gap, groups * BINS).reshape(groups, BINS)
        self._areas = _Areas(logits[:, 1] - logits[:, 0], labels, index, groups)

    def metrics(self, weights: Floats) -> dict[str, Floats]:
        """Return each metric for each row of weights, shape (rows,)."""
        hits, misses, rejections, alarms = (weights @ self._counts).T
        leukaemic, normal = hits + misses, rejections + alarms
        n = leukaemic + normal
        sensitivity, specificity = hits / leukaemic, rejections / normal
        f1 = 2 * hits / (2 * hits + misses + alarms), 2 * rejections / (2 * rejections + misses + alarms)
        return {
            "accuracy": (hits + rejections) / n,
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "weighted_f1": (leukaemic * f1[0] + normal * f1[1]) / n,
            "auroc": self._areas(weights),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ece": np.abs(weights @ self._gaps).sum(axis=1) / n,
        }


class _Scores:
    """The same for one score per subject."""

    def __init__(self, scores: Floats, labels: Labels, index: npt.NDArray[np.intp], groups: int) -> None:
        self._right = np.bincount(index, (scores > 0) == (labels == 1), groups)
        self._subjects = np.bincount(index, minlength=groups)
        self._areas = _Areas(scores, labels, index, groups)

    def metrics(self, weights: Floats) -> dict[str, Floats]:
        return {
            "subject_auroc": self._areas(weights),
            "subject_accuracy": weights @ self._right / (weights @ self._subjects),
        }


class _Areas:
    """The area under the ROC curve as the share of pairs in the right order, counted once for each pair of groups.

    Mann and Whitney (1947); Hanley and McNeil, Radiology 143 (1982). A tie counts half.
    """

    def __init__(self, scores: Floats, labels: Labels, index: npt.NDArray[np.intp], groups: int) -> None:
        leukaemic, normal = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        self._rows, row = np.unique(index[leukaemic], return_inverse=True)
        self._columns, column = np.unique(index[normal], return_inverse=True)
        self._leukaemic = np.bincount(index[leukaemic], minlength=groups)
        self._normal = np.bincount(index[normal], minlength=groups)
        self._wins = np.empty((len(self._rows), len(self._columns)))
        for j in range(len(self._columns)):
            below = np.sort(scores[normal[column == j]])
            won = sum(np.searchsorted(below, scores[leukaemic], side) for side in ("left", "right")) / 2
            self._wins[:, j] = np.bincount(row, won, len(self._rows))

    def __call__(self, weights: Floats) -> Floats:
        """Return the area for each row of weights, shape (rows,)."""
        won = ((weights[:, self._rows] @ self._wins) * weights[:, self._columns]).sum(axis=1)
        area: Floats = won / ((weights @ self._leukaemic) * (weights @ self._normal))
        return area


def _confidence_gaps(logits: Floats, labels: npt.NDArray[Any], bins: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """Return for each cell the bin of its confidence, and right (1 or 0) minus confidence."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = 1 / shifted.sum(axis=1)
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)
    return bin_of, (logits.argmax(axis=1) == labels) - confidence


def _by_subject(
    logits: Floats, labels: Labels, subjects: Strings
) -> tuple[Floats, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return each subject's mean difference of logits, one of its rows, and for each cell the number of its subject."""
    keys = np.stack([np.unique(subjects, return_inverse=True)[1], labels.astype(np.intp)], axis=1)
    _, first, of_subject = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    of_subject = of_subject.reshape(-1)
    score = np.bincount(of_subject, logits[:, 1] - logits[:, 0]) / np.bincount(of_subject)
    return score, first, of_subject
