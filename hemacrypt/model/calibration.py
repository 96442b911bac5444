"""How far apart a model's answers are, and how exact logits need be for that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hemacrypt.model.network import Array, CollapsedNetwork

# Quantiles that a bundle keeps of its margins on training data.
_KEPT: Final = (0.001, 0.01, 0.05, 0.1, 0.5)
# The share of images whose label may depend on errors within the bound.
_DOUBTFUL: Final = "0.01"
# Smaller margins are as good as none: no plan resolves them.
_SMALLEST: Final = 2.0**-40


def margin_quantiles(logits: Array) -> dict[str, float]:
    """Return quantiles of the margins of a model's answers.

    Parameters
    ----------
    logits:
        Of training images, shape (images, labels). The margin of an image is how far its two largest logits are apart;
        with a single logit, how far that is from zero, twice.

    Returns
    -------
    dict
        Quantile (as text, for JSON) -> margin.
    """
    ordered = np.sort(logits, axis=1)
    margins = 2 * np.abs(ordered[:, 0]) if ordered.shape[1] == 1 else ordered[:, -1] - ordered[:, -2]
    return {f"{share:g}": float(np.quantile(margins, share)) for share in _KEPT}


def calibrated_on(
    network: CollapsedNetwork, batches: Iterable[npt.ArrayLike]
) -> tuple[CollapsedNetwork, dict[str, float]]:
    """Measure magnitudes and margins on training images that need not be in memory together.

    Parameters
    ----------
    network:
        Any network.
    batches:
        Network input, at least one batch; see `CollapsedNetwork.trace`.

    Returns
    -------
    network, margins
        The network with its magnitudes, as `CollapsedNetwork.calibrated` gives it for one batch, and what
        `margin_quantiles` says of the logits.
    """
    peaks: list[Any] = [0.0] * len(network.linears)
    logits: list[Array] = []
    for batch in batches:
        written = network.trace(batch)
        peaks = [np.maximum(peak, np.abs(values).max(axis=0)) for peak, values in zip(peaks, written, strict=True)]
        logits.append(written[-1])
    return replace(network, magnitudes=tuple(peaks)), margin_quantiles(np.concatenate(logits))


def default_precision(margins: Mapping[str, float]) -> int:
    """Choose how exact logits should be from a model's margins.

    Parameters
    ----------
    margins:
        What `margin_quantiles` returned.

    Returns
    -------
    int
        The smallest k such that errors of 2^-k leave the labels of 99 in 100 images as they are.
    """
    return max(math.ceil(-math.log2(max(float(margins[_DOUBTFUL]), _SMALLEST) / 2)), 0)
