"""Figures: what a set of logits is worth, with the number of cells and of persons behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import roc_auc_score

from training.errors import DataError


class Figures(BaseModel):
    """Figures of one model on one part of the data; leukaemic counts as positive.

    ``accuracy_interval`` and ``auroc_interval`` are 95 % intervals by resampling groups of subjects, not cells: cells
    of one person resemble each other, so intervals by cell would be far too narrow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str
    n: int
    n_subjects: int
    accuracy: float
    balanced_accuracy: float
    auroc: float
    sensitivity: float
    specificity: float
    accuracy_interval: tuple[float, float]
    auroc_interval: tuple[float, float]
    largest_logit: float


def figures(
    logits: npt.NDArray[np.float64],
    labels: npt.NDArray[np.uint8],
    subjects: npt.NDArray[np.str_],
    protocol: str,
    groups: npt.NDArray[np.str_] | None = None,
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
    """
    if logits.shape != (len(labels), 2) or len(subjects) != len(labels) or not np.isfinite(logits).all():
        raise DataError(
            f"got logits of shape {logits.shape} (finite: {bool(np.isfinite(logits).all())}) for {len(labels)} labels "
            f"and {len(subjects)} subjects; expected two finite logits per cell"
        )
    if set(np.unique(labels)) != {0, 1}:
        raise DataError(f"only the labels {np.unique(labels).tolist()} occur; figures need normal and leukaemic cells")
    score = logits[:, 1] - logits[:, 0]
    right = (score > 0) == (labels == 1)
    sensitivity, specificity = float(right[labels == 1].mean()), float(right[labels == 0].mean())
    accuracies, areas = _resampled(score, labels, right, subjects if groups is None else groups, resamples)
    return Figures(
        protocol=protocol,
        n=len(labels),
        n_subjects=len(np.unique(subjects)),
        accuracy=float(right.mean()),
        balanced_accuracy=(sensitivity + specificity) / 2,
        auroc=float(roc_auc_score(labels, score)),
        sensitivity=sensitivity,
        specificity=specificity,
        accuracy_interval=_interval(accuracies),
        auroc_interval=_interval(areas),
        largest_logit=float(np.abs(logits).max()),
    )


def _resampled(
    score: npt.NDArray[np.float64],
    labels: npt.NDArray[np.uint8],
    right: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.str_],
    resamples: int,
) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    accuracies: list[float] = []
    areas: list[float] = []
    for _ in range(resamples):
        drawn = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        accuracies.append(float(right[drawn].mean()))
        if 0 < labels[drawn].sum() < len(drawn):  # without both labels there is no curve
            areas.append(float(roc_auc_score(labels[drawn], score[drawn])))
    return accuracies, areas


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5]) if values else (0.0, 1.0)
    return float(low), float(high)


def disagreements(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    """Return for how many cells two sets of logits, shape (n, 2) each, name different labels."""
    return int((one.argmax(axis=1) != other.argmax(axis=1)).sum())
