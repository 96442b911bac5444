"""A run of a study on disk: one model, one division, one seed.

::

    OUT/runs/MODEL/PROTOCOL-FOLD/seed-S/
      config.json    what decides the outcome, and the digest over it
      logits.npz     logits of train and test cells with the SHA-256 of their originals; labels and subjects of the test
      history.json   learning curves
      model.keras    the network, where it is kept
      result.json    what came of it; written last, so a folder without it is an unfinished run
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from training.errors import RunError
from training.settings import read_json
from training.study.config import Protocol, StudyConfig

CONFIG, LOGITS, HISTORY, WEIGHTS, RESULT = "config.json", "logits.npz", "history.json", "model.keras", "result.json"
STUDY = "study.config.json"
Doubles = npt.NDArray[np.float64]
Strings = npt.NDArray[np.str_]


class WrittenStudy(BaseModel):
    """Content of ``OUT/study.config.json``: what the runs beside it were asked for by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    final: bool
    config: StudyConfig


def read_written(out: Path) -> WrittenStudy:
    """Read which study a folder of outputs belongs to.

    Raises
    ------
    RunError
        If it holds none.
    """
    return read_json(out / STUDY, WrittenStudy)


class RunResult(BaseModel):
    """Content of ``result.json``.

    ``status`` is ``diverged`` where a loss or logit was no finite number; such a run has no logits, counts as done
    and stands in the report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    protocol: Protocol
    fold: int
    seed: int
    digest: str
    status: Literal["finished", "diverged"]
    reason: str = ""
    protocol_in_words: str
    weights: str
    n_train: int
    n_test: int
    epochs: int
    seconds: float
    parameters: int
    multiply_adds: int
    machine: str
    device: str
    versions: dict[str, str]
    peak_memory_mb: float | None


@dataclass(frozen=True)
class RunLogits:
    """Content of ``logits.npz``.

    Attributes
    ----------
    train_logits, test_logits:
        float64, shape (n, 2).
    train_sha256, test_sha256:
        SHA-256 of the originals, shape (n,).
    test_labels:
        uint8, shape (n,).
    test_subjects, test_groups:
        Strings, shape (n,).
    """

    train_logits: Doubles
    train_sha256: Strings
    test_logits: Doubles
    test_sha256: Strings
    test_labels: npt.NDArray[np.uint8]
    test_subjects: Strings
    test_groups: Strings


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def of(cls, out: Path, model: str, division: str, seed: int) -> RunFolder:
        """Return the folder of a run of a study whose outputs lie in ``out``."""
        return cls(out / "runs" / model / division / f"seed-{seed}")

    def begin(self, content: Mapping[str, Any]) -> None:
        """Make the folder, empty but for ``config.json``; whatever an earlier try left goes."""
        if self.path.exists():
            (self.path / RESULT).unlink(missing_ok=True)  # first: from here on the run is unfinished
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_json(self.path / CONFIG, {**content, "digest": digest_of(content)})

    def write_logits(self, found: RunLogits) -> None:
        """Write ``logits.npz``."""
        np.savez_compressed(self.path / LOGITS, **vars(found))

    def finish(self, result: RunResult, history: Mapping[str, list[float]]) -> None:
        """Write ``history.json`` and, last of all, ``result.json``."""
        write_json(self.path / HISTORY, history)
        write_json(self.path / RESULT, result.model_dump(mode="json"))

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, good or bad."""
        return (self.path / RESULT).is_file()

    def result(self) -> RunResult:
        """Read ``result.json``.

        Raises
        ------
        RunError
            If it is missing or of another kind.
        """
        return read_json(self.path / RESULT, RunResult)

    def history(self) -> dict[str, list[float]]:
        """Read ``history.json``; empty if nothing was learned in epochs."""
        content: dict[str, list[float]] = _read(self.path / HISTORY)
        return content

    def config(self) -> dict[str, Any]:
        """Read ``config.json``."""
        content: dict[str, Any] = _read(self.path / CONFIG)
        return content

    def logits(self) -> RunLogits:
        """Read ``logits.npz``; nothing in it is unpickled.

        Raises
        ------
        RunError
            If it is missing or incomplete.
        """
        try:
            with np.load(self.path / LOGITS, allow_pickle=False) as archive:
                return RunLogits(**{name: archive[name] for name in RunLogits.__annotations__})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise RunError(f"{self.path / LOGITS} is no file of logits ({error}); run the study again") from error


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 over JSON with sorted keys, hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; check space and permissions") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}); run the study again with --again") from error
