"""A training run on disk.

::

    RUN/
      settings.json   everything that was set
      split.json      which images served what, by SHA-256
      model.keras     the trained Keras model
      metrics.json    figures with protocol, and the fingerprint of the training data
      curves.png      loss, accuracy and AUROC over the epochs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from pydantic import BaseModel, ConfigDict

from hemacrypt.bundle import Bundle
from hemacrypt.margins import margin_quantiles
from hemacrypt.network import Array, CollapsedNetwork, Dense, Linear
from hemacrypt.preprocess import Pixels, Preprocessing
from training import datasets
from training.card import model_card
from training.collapse import collapse, largest_difference
from training.datasets import CellImages, Part, Split
from training.errors import CollapseError, DataError, RunError
from training.evaluate import Figures, figures
from training.fit import fit, logits, network_input
from training.report import draw_curves
from training.settings import Settings, read_json

MODEL, METRICS, SETTINGS, CURVES = "model.keras", "metrics.json", "settings.json", "curves.png"
# The bundle computes what the Keras model computes, up to this; `largest_difference` says relative to what.
TOLERANCE = 1e-5


class RunMetrics(BaseModel):
    """Content of ``metrics.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Literal["image", "subject"]
    protocol_in_words: str
    seed: int
    kept_epoch: int
    data_fingerprint: str
    parts: dict[str, Figures]
    history: dict[str, list[float]]


def train_run(
    cells: CellImages,
    settings: Settings,
    run: Path,
    preprocessing: Preprocessing,
    final: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> RunMetrics:
    """Train, measure, and write the folder of a run.

    Parameters
    ----------
    final:
        Also measure on the held-out groups (protocol ``subject``). Do so once, when nothing will be changed any more.
        The image protocol has a test part of its own, which is always measured.

    Raises
    ------
    DataError
        If a part of the data is empty.
    RunError
        If the folder cannot be written.
    """
    split = datasets.split_cells(cells, settings.protocol, settings.split_seed)
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / SETTINGS).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        split.write(run)
    except OSError as error:
        raise RunError(f"cannot write {run}: {error.strerror}; check space and permissions") from error
    model, history = fit(cells, split, settings, preprocessing, callbacks)
    parts: list[Part] = ["train", "validation"]
    if settings.protocol == "image" or final:
        parts.append("test")
    measured: dict[str, Figures] = {}
    for part in parts:
        rows = split.rows(cells, part)
        measured[part] = figures(
            logits(model, network_input(cells, rows, preprocessing)),
            cells.labels[rows],
            cells.subjects[rows],
            split.words,
            cells.groups[rows],
        )
    used = np.concatenate([split.rows(cells, "train"), split.rows(cells, "validation")])
    metrics = RunMetrics(
        protocol=settings.protocol,
        protocol_in_words=split.words,
        seed=settings.seed,
        kept_epoch=int(np.argmin(history["val_loss"])) + 1,
        data_fingerprint=cells.fingerprint(used),
        parts=measured,
        history={name: [float(value) for value in values] for name, values in history.items()},
    )
    model.save(run / MODEL)
    (run / METRICS).write_text(metrics.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draw_curves(history, split.words, run / CURVES)
    return metrics


def read_metrics(run: Path) -> RunMetrics:
    """Read ``metrics.json`` of a run.

    Raises
    ------
    RunError
        If it is missing or of another kind.
    """
    return read_json(run / METRICS, RunMetrics)


def export_run(
    run: Path,
    out: Path,
    cells: CellImages,
    preprocessing: Preprocessing,
    name: str,
    description: str,
) -> tuple[Bundle, float]:
    """Collapse the model of a run, check it on every test image, calibrate it and write the bundle.

    Magnitudes are measured on the train part only. The check compares the network as it will stand on disk, rounded
    to float32, with the Keras model.

    Returns
    -------
    bundle, difference
        The bundle as read back, and the largest relative difference; see `training.collapse.largest_difference`.

    Raises
    ------
    RunError
        If the run is incomplete.
    DataError
        If the data is not that of the run.
    CollapseError
        If the model is not of the family, or the collapsed network differs by more than `TOLERANCE`. Nothing is
        written then.
    """
    settings, metrics, split = read_json(run / SETTINGS, Settings), read_metrics(run), Split.read(run)
    if not (run / MODEL).is_file():
        raise RunError(f"{run / MODEL} is missing; name a folder written by `hemacrypt train`")
    train, validation, test = (split.rows(cells, part) for part in ("train", "validation", "test"))
    if cells.fingerprint(np.concatenate([train, validation])) != metrics.data_fingerprint:
        raise DataError(f"the data is not what {run} was trained on; point --data at the same data")
    model = keras.saving.load_model(run / MODEL, compile=False, safe_mode=True)
    network = _as_stored(collapse(model, preprocessing.input_range))
    difference = largest_difference(network, model, network_input(cells, test, preprocessing))
    if not difference <= TOLERANCE:
        raise CollapseError(
            f"collapsed network and Keras model differ by {difference:.2e} on the test images; at most {TOLERANCE:.0e} "
            "is accepted: train with smaller weights (more weight decay or logit penalty)"
        )
    seen = preprocessing.normalise(cells.images[train])
    peaks, margins = network.calibrated(seen), margin_quantiles(network(seen))
    declared = preprocessing.model_copy(update={"largest_mean": _largest_mean(cells.images[train])})
    bundle = Bundle.create(
        peaks,
        name=name,
        description=description,
        labels=datasets.LABELS,
        preprocessing=declared,
        training={
            **settings.model_dump(mode="json"),
            "kept_epoch": metrics.kept_epoch,
            "collapse_difference": difference,
        },
        data=_provenance(cells, split, metrics),
        metrics={part: values.model_dump(mode="json") for part, values in metrics.parts.items()} | {"margins": margins},
    )
    return bundle.with_card(model_card(bundle.manifest)).write(out), difference


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


def _provenance(cells: CellImages, split: Split, metrics: RunMetrics) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {}
    for part in split.parts:
        rows = split.rows(cells, part)
        parts[part] = {
            "images": len(rows),
            "leukaemic": int(cells.labels[rows].sum()),
            "groups": sorted(set(cells.groups[rows].tolist())),
        }
    return {
        "source": datasets.SOURCE,
        "protocol": split.protocol,
        "protocol_in_words": split.words,
        "fingerprint": metrics.data_fingerprint,
        "parts": parts,
        "held_out_subjects": sorted(datasets.heldout_subjects()),
    }
