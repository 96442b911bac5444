"""Bundles of a study's square networks, with the study's figures and a temperature that their cells had no say in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from hemacrypt.model.bundle import Bundle
from training import datasets
from training.calibration import Calibration, calibrate
from training.datasets import CellImages
from training.errors import RunError
from training.evaluate import Difference, subject_scores
from training.export import Export, export_network, part_record
from training.study.config import BASELINES, ModelConfig, Protocol
from training.study.divisions import preprocessing_of, read_cells
from training.study.results import CALIBRATED, Pooled, Results
from training.study.runs import WEIGHTS, RunFolder, RunLogits, RunResult


@dataclass(frozen=True)
class Trained:
    """A finished run of a square model whose network is there."""

    out: Path
    model: ModelConfig
    protocol: Protocol
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """Name of files and folders of this run."""
        return f"{self.model.name}-{self.protocol}-{self.fold}-{self.seed}"

    @property
    def folder(self) -> RunFolder:
        """Where the run lies."""
        return RunFolder.of(self.out, self.model.name, f"{self.protocol}-{self.fold}", self.seed)

    @property
    def weights(self) -> Path:
        """The trained network."""
        return self.folder.path / WEIGHTS


def trained_run(results: Results, model: str, protocol: Protocol, fold: int = 0, seed: int | None = None) -> Trained:
    """Find the run that a bundle is to be made of.

    Parameters
    ----------
    seed:
        By default the model's first, which is the one that stands in the tables.

    Raises
    ------
    RunError
        If there is no such run, it is of another family, or its network was not kept; the message says what to do.
    """
    config = results.config.model(model)
    if config.family != "square":
        raise RunError(f"{model!r} is of family {config.family!r}; only square networks are evaluated under encryption")
    if config.symmetries:
        raise RunError(
            f"{model!r} averages its logits over eight images, which no single evaluation does; use an architecture "
            "with symmetric layers instead, or set symmetries = false"
        )
    run = Trained(results.out, config, protocol, fold, config.seeds[0] if seed is None else seed)
    if not run.folder.finished or run.folder.result().status != "finished":
        why = "held-out groups are for --final; " if protocol == "heldout" else ""
        raise RunError(f"{run.folder.path} holds no finished run; {why}see `hemacrypt study report` for what there is")
    if not run.weights.is_file():
        raise RunError(f"{run.weights} is missing; set keep_weights = true for {model!r} and run the study again")
    return run


def calibration_of(results: Results, run: Trained) -> Calibration:
    """Fit the temperature of a bundle on logits of the same model and seed, none of cells that it was trained on.

    ``grouped``: on the other folds; ``heldout``: on all folds of the grouped protocol; ``image``: on the test part,
    where nothing else is left. The error after scaling is cross-fitted.

    Raises
    ------
    RunError
        If runs of the grouped protocol are missing that it would be fitted on.
    """
    source: Protocol = "image" if run.protocol == "image" else "grouped"
    found = _pooled(results, run, source)
    if found is None:
        raise RunError(
            f"the temperature of {run.name} is fitted on the {source} protocol, and not all runs of {run.model.name!r} "
            f"with seed {run.seed} have finished there; let it run under {source!r} first"
        )
    rows = np.ones(len(found.labels), dtype=np.bool_)
    if run.protocol == "grouped":
        rows = found.folds != run.fold
    folds = found.folds[rows]
    if len(set(folds.tolist())) < 2:
        folds = np.arange(rows.sum()) % 4  # in the order of digests every fourth cell is as good as drawn
    words = "test part of the split by image" if source == "image" else "out-of-fold logits of grouped cross-validation"
    if run.protocol == "grouped":
        words += f", folds other than {run.fold}"
    return calibrate(found.logits[rows], found.labels[rows], folds, words)


def study_cells(data: Path, size: int, final: bool = False) -> CellImages:
    """Read the cells that a bundle is made with; held-out ones are dropped unless they are asked for."""
    return read_cells(data, (size,), final)[size]


def export_trained(
    results: Results, run: Trained, cells: CellImages, out: Path, name: str, description: str = ""
) -> tuple[Bundle, float]:
    """Export the network of a run.

    It is checked against Keras on the run's test cells, under ``heldout`` on its training cells: held-out ones are
    not needed for a bundle.

    Parameters
    ----------
    cells:
        As `study_cells` reads them at the model's size.

    Raises
    ------
    DataError
        If the data lacks a cell of the run.
    RunError
        As `calibration_of`.
    CollapseError
        As `training.export.export_network`.
    """
    calibration, logits, result = calibration_of(results, run), run.folder.logits(), run.folder.result()
    train = cells.rows_of(logits.train_sha256.tolist(), "the train part")
    checked = train if run.protocol == "heldout" else cells.rows_of(logits.test_sha256.tolist(), "the test part")
    export = Export(
        name=name,
        description=description,
        preprocessing=preprocessing_of(run.model.size),
        seen=cells.images[train],
        checked=cells.images[checked],
        temperature=calibration.temperature,
        training=_training(results, run, result, logits),
        data={
            "source": datasets.SOURCE,
            "protocol": run.protocol,
            "protocol_in_words": result.protocol_in_words,
            "fingerprint": cells.fingerprint(train),
            "parts": {
                "train": part_record(cells.labels[train], cells.groups[train]),
                # A study has none: it trains for a fixed number of epochs.
                "validation": part_record(cells.labels[:0], cells.groups[:0]),
                "test": part_record(logits.test_labels, logits.test_groups),
            },
            "held_out_subjects": sorted(datasets.heldout_subjects()),
        },
        metrics=_metrics(results, run, calibration),
    )
    return export_network(keras.saving.load_model(run.weights, compile=False, safe_mode=True), export, out)


def is_export_of(bundle: Bundle, results: Results, run: Trained) -> bool:
    """Whether a bundle holds the network of a run as it is now, divided by the temperature it would be given now."""
    expected = _training(results, run, run.folder.result(), run.folder.logits())
    given = bundle.manifest.training
    temperature = bundle.manifest.metrics.get("calibration", {}).get("temperature")
    return all(given.get(key) == expected[key] for key in ("run", "logits")) and (
        temperature == calibration_of(results, run).temperature
    )


def _training(results: Results, run: Trained, result: RunResult, logits: RunLogits) -> dict[str, Any]:
    return {
        "study": results.config.name,
        "command": results.written.command or "hemacrypt study run",
        "model": run.model.name,
        "protocol": run.protocol,
        "fold": run.fold,
        "seed": run.seed,
        "recipe": run.model.recipe(),
        "versions": result.versions,
        # What was trained from what, and what came out: together they name the network.
        "run": result.digest,
        "logits": hashlib.sha256(np.ascontiguousarray(logits.test_logits).tobytes()).hexdigest(),
    }


def _metrics(results: Results, run: Trained, calibration: Calibration) -> dict[str, Any]:
    """Return the study's figures of a model: of each protocol that was run, on held-out cells only after --final."""
    shown = [found for found in _of_model(results, run) if found.protocol != "heldout" or results.written.final]
    own = next(found for found in shown if found.protocol == ("image" if run.protocol == "image" else "grouped"))
    baselines = {kind: results.baseline(own.protocol, kind) for kind in BASELINES}
    others = {kind: baseline for kind, baseline in baselines.items() if baseline is not None}
    ordinary = results.best(own.protocol, "ordinary")
    return {
        **{found.protocol: found.figures.model_dump(mode="json") for found in shown},
        "calibration": calibration.model_dump(mode="json"),
        "baselines": {kind: baseline.figures.model_dump(mode="json") for kind, baseline in others.items()},
        "differences": {
            f"model minus {name}": _difference(own.minus(other))
            for name, other in (others | ({} if ordinary is None else {ordinary.model.name: ordinary})).items()
        },
        "subject_scores": {
            own.protocol: [
                score.model_dump(mode="json") for score in subject_scores(own.scaled, own.labels, own.subjects)
            ]
        },
        "ece_is": {found.protocol: CALIBRATED[found.protocol] for found in shown},
    }


def _difference(found: Difference) -> dict[str, Any]:
    """Return a difference but for ``ece``, which is one of logits as they are; what counts is that after scaling."""
    content = found.model_dump(mode="json")
    for part in ("values", "intervals"):
        content[part].pop("ece", None)
    return content


def _of_model(results: Results, run: Trained) -> Iterator[Pooled]:
    return (found for found in results.pooled if (found.model, found.seed) == (run.model, run.seed))


def _pooled(results: Results, run: Trained, protocol: Protocol) -> Pooled | None:
    return next((found for found in _of_model(results, run) if found.protocol == protocol), None)
