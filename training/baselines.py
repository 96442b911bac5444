"""What a model has to beat: how large a cell is, or which colour it has, and nothing else.

Donors differ in staining and their cells in size, so both tell the labels of C-NMC 2019 apart to some degree without a
look at the cell. A network that is not clearly better has learned no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from hemacrypt.model.preprocess import Pixels
from training.errors import DataError

Floats = npt.NDArray[np.float64]
Kind = Literal["area", "colour"]


def area(images: Pixels) -> Floats:
    """Return the number of pixels that are not black, float64, shape (n, 1).

    Parameters
    ----------
    images:
        uint8, shape (n, size, size, 3), segmented cells on black as `Preprocessing.reduce` gives them.
    """
    pixels: Floats = images.any(axis=3).sum(axis=(1, 2), dtype=np.float64)
    return pixels[:, None]


def mean_colour(images: Pixels) -> Floats:
    """Return the mean level of each colour over the pixels that are not black, float64, shape (n, 3).

    Zeros where an image has none. Black pixels add nothing to the sums, so only the division leaves them out.

    Parameters
    ----------
    images:
        As for `area`.
    """
    sums = images.sum(axis=(1, 2), dtype=np.float64)
    colour: Floats = sums / np.maximum(area(images), 1)
    return colour


_MEASURES = {"area": area, "colour": mean_colour}


@dataclass(frozen=True)
class Baseline:
    """A logistic regression on standardised measures of a cell.

    Attributes
    ----------
    kind:
        ``area`` or ``colour``.
    centre, spread:
        Mean and standard deviation of each measure on the training cells, shape (measures,).
    slope:
        Shape (measures,), of the standardised measures.
    intercept:
        Log odds of an average cell.
    """

    kind: Kind
    centre: Floats
    spread: Floats
    slope: Floats
    intercept: float

    def logits(self, images: Pixels) -> Floats:
        """Return zero and the log odds of leukaemic, so that the softmax is the probability; float64, shape (n, 2)."""
        standardised = (_MEASURES[self.kind](images) - self.centre) / self.spread
        odds = standardised @ self.slope + self.intercept
        return np.stack([np.zeros(len(odds)), odds], axis=1)


def fit_baseline(
    kind: Kind, images: Pixels, labels: npt.NDArray[np.uint8], weights: npt.ArrayLike | None = None
) -> Baseline:
    """Fit one of the baselines.

    Parameters
    ----------
    kind:
        ``area`` or ``colour``.
    images:
        uint8, shape (n, size, size, 3); training cells only.
    labels:
        Shape (n,): 1 leukaemic, 0 normal.
    weights:
        How much each cell counts, shape (n,), see `training.fit.weigh`; by default all the same.

    Raises
    ------
    DataError
        If lengths disagree or only one label occurs.
    """
    counts = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(images) == len(labels) == len(counts) or set(np.unique(labels)) != {0, 1}:
        raise DataError(
            f"got {len(images)} images, {len(labels)} labels ({np.unique(labels).tolist()}), {len(counts)} weights; "
            "expected as many of each, and both labels"
        )
    measures = _MEASURES[kind](images)
    centre = np.average(measures, axis=0, weights=counts)
    spread = np.sqrt(np.average((measures - centre) ** 2, axis=0, weights=counts))
    spread[spread == 0] = 1.0  # what never differs tells nothing, and is not divided by nothing
    model = LogisticRegression().fit((measures - centre) / spread, labels, sample_weight=counts)
    return Baseline(kind, centre, spread, np.asarray(model.coef_[0]), float(model.intercept_[0]))
