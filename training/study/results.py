"""What lies in a study's folder, put together: out-of-fold logits, figures, calibration, encrypted results.

Of a model with several seeds the first one stands in the tables, fixed before anything was trained; the spread over
all of them is reported beside. Folds of the grouped protocol are pooled: every cell of the pool has one logit pair,
from the model that did not see its group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from training.calibration import cross_fitted, fit_temperature
from training.errors import RunError
from training.evaluate import Difference, Figures, disagreements, figures, paired_difference
from training.study.config import BASELINES, ModelConfig, Protocol, StudyConfig
from training.study.runs import RunFolder, RunResult, WrittenStudy, read_written

Doubles = npt.NDArray[np.float64]
Strings = npt.NDArray[np.str_]

ENCRYPTED = "encrypted"

CALIBRATED: Mapping[Protocol, str] = {
    "image": "temperature cross-fitted by image within the test part",
    "grouped": "temperature of each fold fitted on the other folds",
    "heldout": "temperature fitted on the out-of-fold logits of the grouped protocol",
}


class EncryptedResult(BaseModel):
    """One file ``OUT/encrypted/*.json``: logits that were computed under encryption.

    Attributes
    ----------
    model, protocol, fold, seed:
        The run whose network was evaluated.
    logits:
        An ``.npz`` file, relative to the JSON file, with ``logits`` (float64, shape (n, 2)) and ``sha256`` (strings,
        shape (n,)) of test cells, in any order. They are on the scale of the run's own logits: where the bundle's last
        layer was divided by a temperature, what was decrypted is multiplied by it again. So the same temperatures serve
        both, and nothing is scaled twice.
    milliseconds:
        Median of the computation for one image.
    engine, scheme, digest, note:
        How, on which bundle, and a remark.
    temperature:
        That of the bundle.
    cells:
        For how many cells this was asked; 0 where nobody said.
    disagreements, largest_error, error_bound:
        Cells with another prediction than the bundle gives in the clear, or with an answer that could not be read;
        largest difference of a decrypted logit from the clear one, and the largest bound on it. Of the bundle's logits,
        which are divided by the temperature.
    run:
        Digest of the run whose network it is; empty where nobody said.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    protocol: Protocol
    fold: int = 0
    seed: int = 0
    logits: str
    milliseconds: float
    engine: str = "vector"
    scheme: str = "ckks"
    digest: str = ""
    note: str = ""
    temperature: float = 1.0
    cells: int = 0
    disagreements: int = 0
    largest_error: float | None = None
    error_bound: float | None = None
    run: str = ""


@dataclass(frozen=True)
class Encrypted:
    """Encrypted logits of one model and protocol, all folds together."""

    logits: Doubles
    rows: npt.NDArray[np.intp]
    milliseconds: float
    engine: str


@dataclass(frozen=True)
class Pooled:
    """All folds of one model, protocol and seed.

    Attributes
    ----------
    logits:
        float64, shape (n, 2), in the order of ``sha256``.
    labels, subjects, groups, folds, sha256:
        Shape (n,).
    grouped:
        The same model and seed under the grouped protocol, where there is one: its temperature serves held-out cells.
    """

    model: ModelConfig
    protocol: Protocol
    seed: int
    results: tuple[RunResult, ...]
    logits: Doubles
    labels: npt.NDArray[np.uint8]
    subjects: Strings
    groups: Strings
    folds: npt.NDArray[np.intp]
    sha256: Strings
    grouped: Pooled | None = None
    encrypted: Encrypted | None = None

    @property
    def words(self) -> str:
        """The protocol in words."""
        return self.results[0].protocol_in_words

    @property
    def start(self) -> str:
        """What training started from; of several folds all the same, or each is named."""
        return "; ".join(sorted({result.weights for result in self.results}))

    @cached_property
    def temperatures(self) -> Doubles | None:
        """One temperature for each cell, shape (n,), none of them fitted on the cell itself; None without any."""
        if self.protocol == "grouped":
            return cross_fitted(self.logits, self.labels, self.folds)
        if self.protocol == "image":
            # In the order of digests every fourth cell is as good as drawn.
            return cross_fitted(self.logits, self.labels, np.arange(len(self.labels)) % 4)
        if self.grouped is None:
            return None
        return np.full(len(self.labels), fit_temperature(self.grouped.logits, self.grouped.labels))

    @cached_property
    def figures(self) -> Figures:
        """Figures of the logits as they are, but for ``ece``: that is after temperature scaling where there is one."""
        if self.temperatures is None:
            return self._unscaled
        after = self._figures(self.scaled)
        intervals = {**self._unscaled.intervals, "ece": after.intervals["ece"]}
        return self._unscaled.model_copy(update={"ece": after.ece, "intervals": intervals})

    @property
    def scaled(self) -> Doubles:
        """Logits divided by the temperatures, where there are any."""
        return self.logits if self.temperatures is None else self.logits / self.temperatures[:, None]

    @property
    def ece_before(self) -> float:
        """Calibration error of the logits as they are."""
        return self._unscaled.ece

    @cached_property
    def _unscaled(self) -> Figures:
        return self._figures(self.logits)

    def _figures(self, logits: Doubles) -> Figures:
        return figures(logits, self.labels, self.subjects, self.words, self.groups)

    @cached_property
    def fold_aurocs(self) -> tuple[float, ...]:
        """AUROC of each fold by itself."""
        return tuple(
            figures(
                self.logits[rows], self.labels[rows], self.subjects[rows], self.words, self.groups[rows], resamples=1
            ).auroc
            for rows in (self.folds == fold for fold in np.unique(self.folds))
        )

    @cached_property
    def encrypted_figures(self) -> Figures | None:
        """Figures of the encrypted logits, of as many cells as were evaluated."""
        if self.encrypted is None:
            return None
        rows = self.encrypted.rows
        return figures(self.encrypted.logits, self.labels[rows], self.subjects[rows], self.words, self.groups[rows])

    @property
    def disagreements(self) -> int:
        """For how many cells encrypted and clear prediction differ."""
        return 0 if self.encrypted is None else disagreements(self.logits[self.encrypted.rows], self.encrypted.logits)

    def minus(self, other: Pooled) -> Difference:
        """Compare with another model on the same cells.

        Raises
        ------
        RunError
            If the cells differ.
        """
        if self.sha256.tolist() != other.sha256.tolist():
            raise RunError(f"{self.model.name} and {other.model.name} were tested on different cells; run both again")
        return paired_difference(self.logits, other.logits, self.labels, self.groups)


@dataclass(frozen=True)
class Missing:
    """Runs without logits, and why."""

    run: str
    why: str


@dataclass(frozen=True)
class Results:
    """Everything in a study's folder."""

    out: Path
    written: WrittenStudy
    pooled: tuple[Pooled, ...]
    missing: tuple[Missing, ...]
    runs: tuple[RunResult, ...]

    @property
    def config(self) -> StudyConfig:
        """What was asked for."""
        return self.written.config

    def table(self, protocol: Protocol) -> list[Pooled]:
        """Return the first seed of every model under one protocol, in the order of the study."""
        return [found for found in self.pooled if found.protocol == protocol and found.seed == found.model.seeds[0]]

    def seeds(self, protocol: Protocol, model: str) -> list[Pooled]:
        """Return all seeds of one model that have logits."""
        return [found for found in self.pooled if found.protocol == protocol and found.model.name == model]

    def best(self, protocol: Protocol, family: str) -> Pooled | None:
        """Return the model of a family with the largest AUROC in the clear.

        On held-out cells it is the one that was best in grouped cross-validation: nothing is chosen on those.
        """
        if protocol == "heldout":
            chosen = self.best("grouped", family)
            return None if chosen is None else self.named("heldout", chosen.model.name)
        of_family = [found for found in self.table(protocol) if found.model.family == family]
        return max(of_family, key=lambda found: found.figures.auroc, default=None)

    def named(self, protocol: Protocol, model: str) -> Pooled | None:
        """Return the first seed of one model, if it has run."""
        return next((found for found in self.table(protocol) if found.model.name == model), None)

    def baseline(self, protocol: Protocol, kind: str) -> Pooled | None:
        """Return one of the confounder baselines."""
        return next((found for found in self.table(protocol) if found.model.architecture == kind), None)

    def rivals(self, protocol: Protocol) -> dict[str, Pooled]:
        """Return what square networks are compared with, as far as it has run: ``ordinary``, ``area``, ``colour``."""
        found = {"ordinary": self.best(protocol, "ordinary")}
        found |= {kind: self.baseline(protocol, kind) for kind in BASELINES}
        return {name: rival for name, rival in found.items() if rival is not None}

    @property
    def hours(self) -> float:
        """Time that all runs took."""
        return sum(run.seconds for run in self.runs) / 3600


def collect(out: Path, with_encrypted: bool = True) -> Results:
    """Read all runs of a study.

    Parameters
    ----------
    with_encrypted:
        Also read what was computed under encryption.

    Raises
    ------
    RunError
        If the folder holds no study, or a file in it is broken.
    """
    written = read_written(out)
    encrypted = _read_encrypted(out) if with_encrypted else []
    pooled: list[Pooled] = []
    missing: list[Missing] = []
    runs: list[RunResult] = []
    # Grouped first: its logits are what held-out ones are calibrated with.
    for protocol in sorted(written.config.protocols_in_use, key=("grouped", "image", "heldout").index):
        for model in written.config.models:
            if protocol not in written.config.protocols_of(model):
                continue
            for seed in model.seeds:
                folds = range(written.config.folds_of(protocol))
                folders = [RunFolder.of(out, model.name, f"{protocol}-{fold}", seed) for fold in folds]
                results = [folder.result() if folder.finished else None for folder in folders]
                runs += [result for result in results if result is not None]
                gaps = [
                    Missing(f"{model.name}, {protocol}-{fold}, seed {seed}", _why(result, protocol, written.final))
                    for fold, result in enumerate(results)
                    if result is None or result.status != "finished"
                ]
                missing += gaps
                if not gaps:
                    done = tuple(result for result in results if result is not None)
                    grouped = next(
                        (p for p in pooled if (p.model, p.seed, p.protocol) == (model, seed, "grouped")), None
                    )
                    pooled.append(_pool(model, protocol, seed, folders, done, grouped, encrypted))
    return Results(out, written, tuple(pooled), tuple(missing), tuple(runs))


def _why(result: RunResult | None, protocol: Protocol, final: bool) -> str:
    if result is not None:
        return f"diverged: {result.reason}"
    return "not run: held-out cells are for --final" if protocol == "heldout" and not final else "not run"


def _pool(
    model: ModelConfig,
    protocol: Protocol,
    seed: int,
    folders: Sequence[RunFolder],
    results: tuple[RunResult, ...],
    grouped: Pooled | None,
    encrypted: Sequence[tuple[EncryptedResult, Path]],
) -> Pooled:
    every = [folder.logits() for folder in folders]
    sha256 = np.concatenate([found.test_sha256 for found in every])
    order = np.argsort(sha256)
    folds = np.repeat(np.arange(len(every)), [len(found.test_sha256) for found in every])
    return Pooled(
        model=model,
        protocol=protocol,
        seed=seed,
        results=results,
        logits=np.concatenate([found.test_logits for found in every])[order],
        labels=np.concatenate([found.test_labels for found in every])[order],
        subjects=np.concatenate([found.test_subjects for found in every])[order],
        groups=np.concatenate([found.test_groups for found in every])[order],
        folds=folds[order],
        sha256=sha256[order],
        grouped=grouped if protocol == "heldout" else None,
        encrypted=_encrypted_of(model.name, protocol, seed, sha256[order], results, encrypted),
    )


# ---------------------------------------------------------------------------------------------- encrypted


def _read_encrypted(out: Path) -> list[tuple[EncryptedResult, Path]]:
    found = []
    for path in sorted((out / ENCRYPTED).glob("*.json")):
        try:
            found.append((EncryptedResult.model_validate(json.loads(path.read_text(encoding="utf-8"))), path))
        except (OSError, ValueError, ValidationError) as error:
            raise RunError(f"{path} is no encrypted result ({error}); see training.study.results") from error
    return found


def _encrypted_of(
    model: str,
    protocol: Protocol,
    seed: int,
    sha256: Strings,
    runs: Sequence[RunResult],
    every: Sequence[tuple[EncryptedResult, Path]],
) -> Encrypted | None:
    mine = [
        (result, path)
        for result, path in every
        if (result.model, result.protocol, result.seed) == (model, protocol, seed)
    ]
    if not mine:
        return None
    digests = {run.fold: run.digest for run in runs}
    for result, path in mine:
        if result.run not in ("", digests.get(result.fold)):
            raise RunError(f"{path} is of a run that was replaced since; call `hemacrypt study encrypt` again")
    where = {digest: row for row, digest in enumerate(sha256.tolist())}
    logits: list[Any] = []
    rows: list[int] = []
    for result, path in mine:
        try:
            with np.load(path.parent / result.logits, allow_pickle=False) as archive:
                logits.append(np.asarray(archive["logits"], dtype=np.float64).reshape(-1, 2))
                rows += [where[digest] for digest in archive["sha256"].tolist()]
        except KeyError as error:
            raise RunError(f"{path}: {error} is no array of its file, or no cell tested under {protocol}") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{path} names logits that cannot be read ({error}); make them again") from error
    if len(set(rows)) < len(rows) or len(rows) != sum(map(len, logits)):
        raise RunError(f"{mine[0][1]}: expected one pair of encrypted logits for each cell, and no cell twice")
    return Encrypted(
        logits=np.concatenate(logits),
        rows=np.array(rows, dtype=np.intp),
        milliseconds=float(np.median([result.milliseconds for result, _ in mine])),
        engine=", ".join(sorted({f"{result.engine} ({result.scheme})" for result, _ in mine})),
    )
