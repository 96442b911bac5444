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

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from pydantic import BaseModel, ConfigDict

from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import Preprocessing
from training import datasets
from training.datasets import CellImages, Part, Split
from training.errors import DataError, RunError
from training.evaluate import Figures, figures
from training.export import Export, export_network, part_record
from training.fit import fit, logits, network_input
from training.report import draw_curves
from training.settings import Settings, read_json

MODEL, METRICS, SETTINGS, CURVES = "model.keras", "metrics.json", "settings.json", "curves.png"


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
            logits(model, network_input(cells.images[rows], preprocessing)),
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
    """Export the network of a run, checked on every test image; see `training.export.export_network`.

    Magnitudes are measured on the train part only.

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
        As `training.export.export_network`.
    """
    settings, metrics, split = read_json(run / SETTINGS, Settings), read_metrics(run), Split.read(run)
    if not (run / MODEL).is_file():
        raise RunError(f"{run / MODEL} is missing; name a folder written by `hemacrypt train`")
    train, validation, test = (split.rows(cells, part) for part in ("train", "validation", "test"))
    if cells.fingerprint(np.concatenate([train, validation])) != metrics.data_fingerprint:
        raise DataError(f"the data is not what {run} was trained on; point --data at the same data")
    export = Export(
        name=name,
        description=description,
        preprocessing=preprocessing,
        seen=cells.images[train],
        checked=cells.images[test],
        training={**settings.model_dump(mode="json"), "kept_epoch": metrics.kept_epoch},
        data=_provenance(cells, split, metrics),
        metrics={part: values.model_dump(mode="json") for part, values in metrics.parts.items()},
    )
    return export_network(keras.saving.load_model(run / MODEL, compile=False, safe_mode=True), export, out)


def _provenance(cells: CellImages, split: Split, metrics: RunMetrics) -> dict[str, Any]:
    return {
        "source": datasets.SOURCE,
        "protocol": split.protocol,
        "protocol_in_words": split.words,
        "fingerprint": metrics.data_fingerprint,
        "parts": {
            part: part_record(cells.labels[rows], cells.groups[rows])
            for part, rows in ((part, split.rows(cells, part)) for part in split.parts)
        },
        "held_out_subjects": sorted(datasets.heldout_subjects()),
    }
