"""Temperature scaling: one number that makes probabilities mean what they say.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, section 4.2: all logits are divided
by one temperature T > 0. No order of two logits changes, so neither does a label or the AUROC.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense, Linear
from training.errors import DataError
from training.evaluate import calibration_error

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[Any]

# A model that is never wrong on the cells at hand wants no temperature at all, one worse than chance an infinite one.
SMALLEST, LARGEST = 1 / 64, 64.0
# A polynomial network's logits grow without bound on an image that is unlike all others. One such cell that is wrong
# would flatten the probabilities of thousands, and under encryption the guard refuses it: differences count up to this
# many times their 99.5th percentile.
_FARTHEST = 4.0


class Calibration(BaseModel):
    """What a bundle's manifest keeps under ``metrics["calibration"]``.

    Attributes
    ----------
    temperature:
        What the last layer was divided by.
    fitted_on:
        Which cells it was fitted on, in words.
    ece_before, ece_after:
        `training.evaluate.calibration_error` of these cells with temperature 1, and with temperatures that each were
        fitted without the cell's own fold.
    n:
        Number of cells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(gt=0)
    fitted_on: str
    ece_before: float
    ece_after: float
    n: int


def fit_temperature(logits: Floats, labels: Labels, weights: Floats | None = None) -> float:
    """Return the temperature with the smallest negative log likelihood.

    Parameters
    ----------
    logits:
        Shape (n, labels): of cells that the model was not trained on, or it only learns how well they are remembered.
    labels:
        Shape (n,), numbers of the true labels.
    weights:
        How much each cell counts, shape (n,), none negative; by default all the same.

    Returns
    -------
    float
        Between `SMALLEST` and `LARGEST`.

    Raises
    ------
    DataError
        If there is no cell, shapes disagree, or a number is not finite.

    Notes
    -----
    The likelihood is convex in 1/T, so its slope, the weighted mean of expected minus true logit, changes its sign
    once. Halving an interval of log T until it is down to rounding finds the place whatever the scale of the logits.

    Differences beyond four times the 99.5th percentile of their absolute values are taken for that.
    """
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    _check(logits, labels, weights)
    # Only differences of logits matter; relative to the true one, none is lost beside a large constant.
    relative = logits - np.take_along_axis(logits, np.asarray(labels, dtype=np.intp)[:, None], axis=1)
    limit = _FARTHEST * np.quantile(np.abs(relative).max(axis=1), 0.995, method="higher")
    relative = np.clip(relative, -limit, limit)
    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(relative, weights, math.exp(-middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def usual_cells(logits: Floats) -> npt.NDArray[np.bool_]:
    """Tell which cells a polynomial network answers as it answers others, shape (n,).

    Parameters
    ----------
    logits:
        Shape (n, labels).

    Returns
    -------
    bool array, shape (n,)
        False where logits lie more than four times as far apart as their 99.5th percentile: in most of these images
        something is left of another cell. Magnitudes measured on them would make the guard let everything pass.
    """
    apart = np.ptp(logits, axis=1)
    usual: npt.NDArray[np.bool_] = apart <= _FARTHEST * np.quantile(apart, 0.995, method="higher")
    return usual


def cross_fitted(logits: Floats, labels: Labels, folds: npt.NDArray[Any], weights: Floats | None = None) -> Floats:
    """Return a temperature for each cell that was fitted on all other folds.

    Parameters
    ----------
    logits:
        Out of fold: those of a cell come from a model that did not see its fold; shape (n, labels).
    labels, folds, weights:
        Shape (n,); at least two folds.

    Returns
    -------
    float64 array, shape (n,)
        The same number for all cells of a fold.

    Raises
    ------
    DataError
        As `fit_temperature`, or if there is only one fold.
    """
    folds = np.asarray(folds)
    names = np.unique(folds)
    if folds.shape != labels.shape or len(names) < 2:
        raise DataError(f"got folds of shape {folds.shape}, {len(names)} distinct; expected one per cell, two or more")
    temperatures = np.empty(len(labels))
    for name in names:
        others = folds != name
        temperatures[~others] = fit_temperature(
            logits[others], labels[others], None if weights is None else weights[others]
        )
    return temperatures


def calibrate(
    logits: Floats, labels: Labels, folds: npt.NDArray[Any], fitted_on: str, weights: Floats | None = None
) -> Calibration:
    """Fit a temperature on out-of-fold logits and say honestly what it is worth.

    The temperature is fitted on all cells. The error after scaling is measured with those of `cross_fitted`, so that
    no cell has a say in its own temperature.

    Parameters
    ----------
    logits, labels, folds, weights:
        As in `cross_fitted`.
    fitted_on:
        Which cells these are, in words.

    Raises
    ------
    DataError
        As `cross_fitted`.
    """
    temperatures = cross_fitted(logits, labels, folds, weights)
    return Calibration(
        temperature=fit_temperature(logits, labels, weights),
        fitted_on=fitted_on,
        ece_before=calibration_error(logits, labels),
        ece_after=calibration_error(logits / temperatures[:, None], labels),
        n=len(labels),
    )


def scaled(network: CollapsedNetwork, temperature: float) -> CollapsedNetwork:
    """Return the network with its last layer, and that layer's magnitudes, divided by a temperature.

    The softmax of decrypted logits is calibrated then as it stands: clients learn of no temperature, nothing new is on
    the wire, no step is added under encryption, and bundles without calibration are read as before. An error bound of
    the logits is one of the scaled ones.

    Raises
    ------
    DataError
        If the temperature is not a positive finite number.
    """
    if not 0 < temperature < math.inf:
        raise DataError(f"the temperature is {temperature}; expected a positive number")
    *before, last = network.linears
    magnitudes = network.magnitudes
    if magnitudes is not None:
        magnitudes = (*magnitudes[:-1], magnitudes[-1] / temperature)
    return replace(network, linears=(*before, _divided(last, temperature)), magnitudes=magnitudes)


def _divided(layer: Linear, temperature: float) -> Linear:
    if isinstance(layer, Convolution):
        return replace(layer, kernel=layer.kernel / temperature, bias=layer.bias / temperature)
    return Dense(layer.weight / temperature, layer.bias / temperature)


def _slope(relative: Floats, weights: Floats, inverse: float) -> float:
    """Return the slope of the negative log likelihood by 1/T; ``relative`` are logits minus that of the true label."""
    odds = relative * inverse
    probabilities = np.exp(odds - odds.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return float(weights @ (probabilities * relative).sum(axis=1))


def _check(logits: Floats, labels: Labels, weights: Floats) -> None:
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[:1] != labels.shape or weights.shape != labels.shape:
        raise DataError(
            f"got logits of shape {logits.shape}, labels {labels.shape}, weights {weights.shape}; "
            "expected (n, labels), (n,) and (n,) with at least one cell"
        )
    if not np.isfinite(logits).all() or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise DataError("a logit or weight is not finite, or no weight is positive; expected finite numbers")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(f"labels reach from {labels.min()} to {labels.max()}; expected 0 to {logits.shape[1] - 1}")
