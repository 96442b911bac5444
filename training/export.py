"""From a trained Keras network to a bundle on disk: folded, checked, calibrated, written with its card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from hemacrypt.model.bundle import Bundle
from hemacrypt.model.calibration import calibrated_on
from hemacrypt.model.network import Array, CollapsedNetwork, Dense, Linear
from hemacrypt.model.preprocess import Pixels, Preprocessing
from training.calibration import scaled, usual_cells
from training.card import model_card
from training.collapse import collapse, largest_difference
from training.datasets import LABELS
from training.errors import CollapseError
from training.fit import logits, network_input

# The collapsed network computes what the Keras model computes, up to this, and up to this after its numbers were
# rounded to float32; `largest_difference` says relative to what. Folding is exact to 1e-13; rounding costs two squares
# about 2e-6 and four up to 2e-5, a hundredth of what encryption adds.
TOLERANCE = 1e-9
ROUNDING = 1e-4
# Images in work at once: a first layer may write hundreds of kilobytes for each.
_AT_ONCE = 512


@dataclass(frozen=True)
class Export:
    """What becomes a bundle, besides the network.

    Attributes
    ----------
    name, description:
        As in the manifest; without a description one is made of the layers.
    preprocessing:
        How the network reads cells; ``largest_mean`` is filled in.
    seen:
        Cells that it was trained on, uint8, shape (n, size, size, 3): magnitudes, margins and ``largest_mean`` are
        those of them; magnitudes and margins without the few that `training.calibration.usual_cells` leaves out.
    checked:
        Cells on which it must agree with Keras, uint8, shape (n, size, size, 3); those left out by the same rule are
        not compared, for the guard refuses their like.
    temperature:
        What the last layer is divided by; see `training.calibration`.
    training, data, metrics:
        As in the manifest, but for what is measured here.
    """

    name: str
    description: str
    preprocessing: Preprocessing
    seen: Pixels
    checked: Pixels
    training: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
    temperature: float = 1.0


def export_network(model: keras.Model, export: Export, out: Path) -> tuple[Bundle, float]:
    """Collapse a network, check it, divide by its temperature, calibrate it and write the bundle.

    Compared with the Keras model are the folded network, on the first images, and then the network as it will stand on
    disk, rounded to float32, on all; logits are multiplied by the temperature again for that.

    Returns
    -------
    bundle, difference
        The bundle as read back, and the largest relative difference; see `training.collapse.largest_difference`.

    Raises
    ------
    CollapseError
        If the model is not of the family, or the collapsed network differs by more than `TOLERANCE`, the rounded
        one by more than `ROUNDING`. Nothing is written then.
    BundleError
        If the name cannot be one, or the bundle cannot be written.
    """
    preprocessing = export.preprocessing
    folded = collapse(model, preprocessing.input_range)
    compared = export.checked[_usual(model, export.checked, preprocessing)]
    _differing(folded, model, compared[:_AT_ONCE], preprocessing, TOLERANCE)
    network = _as_stored(scaled(folded, export.temperature))
    difference = _differing(scaled(network, 1 / export.temperature), model, compared, preprocessing, ROUNDING)
    usual = _usual(model, export.seen, preprocessing)
    calibrated, margins = calibrated_on(network, map(preprocessing.normalise, _chunks(export.seen[usual])))
    bundle = Bundle.create(
        calibrated,
        name=export.name,
        description=export.description or _described(network, preprocessing),
        labels=LABELS,
        preprocessing=preprocessing.model_copy(update={"largest_mean": _largest_mean(export.seen)}),
        training={**export.training, "collapse_difference": difference},
        data=export.data,
        metrics={**export.metrics, "margins": margins, "left_out": int((~usual).sum())},
    )
    return bundle.with_card(model_card(bundle.manifest)).write(out), difference


def part_record(labels: npt.NDArray[np.uint8], groups: npt.NDArray[np.str_]) -> dict[str, Any]:
    """Return what a manifest says of one part of the data: numbers of cells, and the groups they are of."""
    return {"images": len(labels), "leukaemic": int(labels.sum()), "groups": sorted(set(groups.tolist()))}


def _differing(
    network: CollapsedNetwork, model: keras.Model, images: Pixels, preprocessing: Preprocessing, accepted: float
) -> float:
    batches = (network_input(chunk, preprocessing) for chunk in _chunks(images))
    difference = largest_difference(network, model, batches)
    if not difference <= accepted:
        raise CollapseError(
            f"collapsed network and Keras model differ by {difference:.2e} on the images compared; at most "
            f"{accepted:.0e} is accepted: train with smaller weights (more weight decay or logit penalty)"
        )
    return difference


def _usual(model: keras.Model, images: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.bool_]:
    found = [logits(model, network_input(chunk, preprocessing)) for chunk in _chunks(images)]
    return usual_cells(np.concatenate(found))


def _chunks(images: Pixels) -> Iterator[Pixels]:
    return (images[start : start + _AT_ONCE] for start in range(0, len(images), _AT_ONCE))


def _described(network: CollapsedNetwork, preprocessing: Preprocessing) -> str:
    layers = ", square, ".join(layer.describe() for layer in network.linears)
    return (
        f"Is this blood cell leukaemic? One segmented, stain-normalised cell on black ({preprocessing.image_size}x"
        f"{preprocessing.image_size}, as C-NMC 2019) is reduced to {preprocessing.size}x{preprocessing.size} pixels; "
        f"{layers}. Decision support for research, not a diagnosis."
    )


def _largest_mean(images: Pixels) -> float:
    """Return the mean level that no cell may exceed: a quarter beyond the brightest training image, a whole number.

    Squares make logits grow with the fourth power of the input; this keeps them within the planner's headroom.
    """
    brightest = float(images.mean(axis=(1, 2, 3)).max())
    return min(float(math.ceil(1.25 * brightest)), 255.0)


def _as_stored(network: CollapsedNetwork) -> CollapsedNetwork:
    """Return the network with every number rounded to float32, as a bundle keeps it."""

    def rounded(values: Array) -> Array:
        return values.astype(np.float32).astype(np.float64)

    def stored(layer: Linear) -> Linear:
        if isinstance(layer, Dense):
            return Dense(rounded(layer.weight), rounded(layer.bias))
        return replace(layer, kernel=rounded(layer.kernel), bias=rounded(layer.bias))

    return replace(network, linears=tuple(stored(layer) for layer in network.linears))
