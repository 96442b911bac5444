"""Runs what a study names and what is not there yet.

Every model is trained in every division of its protocols with each of its seeds, after the models that it needs. A
run that is finished under the same digest (of configuration, data and the runs that it learns from) is passed over;
an unfinished one starts again.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from training.datasets import CellImages
from training.errors import DataError, RunError
from training.fit import weigh
from training.report import read_progress
from training.study.config import ModelConfig, StudyConfig, Views
from training.study.divisions import Division, divide, read_cells
from training.study.learners import LEARNERS, check
from training.study.runs import (
    STUDY,
    WEIGHTS,
    RunFolder,
    RunLogits,
    RunResult,
    WrittenStudy,
    digest_of,
    read_written,
    write_json,
)
from training.study.teaching import Diverged, Doubles, Floats, Learned, Lesson, over_symmetries
from training.study.tracker import Tracker
from training.study.views import DrawnViews, answered

# Raised when the meaning of a configuration changes: runs of before are then no longer taken for finished.
_FORMAT = 1

Status = Literal["finished", "diverged", "already there", "blocked"]


@dataclass(frozen=True)
class Job:
    """One run that a study asks for."""

    model: ModelConfig
    division: Division
    seed: int

    @property
    def words(self) -> str:
        """Name for people."""
        return f"{self.model.name}, {self.division.name}, seed {self.seed}"

    def folder(self, out: Path) -> RunFolder:
        """Return where it lies."""
        return RunFolder.of(out, self.model.name, self.division.name, self.seed)


@dataclass(frozen=True)
class Outcome:
    """What became of a job in one call of `run_study`."""

    job: Job
    status: Status
    reason: str = ""


class Study:
    """A study with its data: which runs there are, and what each depends on.

    Parameters
    ----------
    config:
        What to run.
    data:
        Folder of the data, as `training.datasets.load_cells` reads it.
    final:
        Whether held-out cells may be read. If not, they are dropped as soon as a file is open.
    only:
        Names of models: these and what they need. Empty: all.
    divisions:
        Names of divisions, such as ``grouped-2``. Empty: all. Nothing is shared between divisions, so several processes
        can each do a part of one study in one folder.

    Raises
    ------
    DataError
        If the data cannot be read, or is not the same cells in all sizes.
    RunError
        If the study has no division of a name.
    """

    def __init__(
        self,
        config: StudyConfig,
        data: Path,
        final: bool = False,
        only: Sequence[str] = (),
        console: Console | None = None,
        divisions: Sequence[str] = (),
    ) -> None:
        self.config, self.final, self.only = config, final, tuple(only)
        self.models = config.ordered(only)
        show = partial(read_progress, console) if console else None
        self.cells = read_cells(data, {model.size for model in self.models}, final, show)
        self._divisions: dict[str, tuple[Division, ...]] = {}
        self._digests: dict[tuple[str, str, int], str] = {}
        self._chosen = frozenset(divisions)
        if self._chosen:
            there = sorted({division.name for model in self.models for division in self.divisions(model)})
            if unknown := sorted(self._chosen.difference(there)):
                raise RunError(f"the study has no divisions {unknown}; it has {there}")

    @property
    def _some_cells(self) -> CellImages:
        return next(iter(self.cells.values()))

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """All runs, each after those that it learns from; those on held-out cells only if they may be read."""
        return tuple(
            Job(model, division, seed)
            for model in self.models
            for division in self.divisions(model)
            if not self._chosen or division.name in self._chosen
            for seed in model.seeds
        )

    def divisions(self, model: ModelConfig) -> tuple[Division, ...]:
        """Return the divisions that a model runs in."""
        found: list[Division] = []
        for protocol in self.config.protocols_of(model):
            if protocol == "heldout" and not self.final:
                continue
            if protocol not in self._divisions:
                divided = divide(self._some_cells, protocol, self.config.folds, self.config.seed)
                self._divisions[protocol] = divided
            found += self._divisions[protocol]
        return tuple(found)

    def needed(self, job: Job, name: str) -> tuple[Job, ...]:
        """Return the runs of another model that a job learns from: all seeds of a teacher, one of features."""
        model = self.config.model(name)
        seeds = model.seeds if name in job.model.teachers else model.seeds[:1]
        return tuple(Job(model, job.division, seed) for seed in seeds)

    def content(self, job: Job) -> dict[str, Any]:
        """Return everything that decides the outcome of a job."""
        cells, division = self._some_cells, job.division
        return {
            "format": _FORMAT,
            "recipe": job.model.recipe(),
            "protocol": division.protocol,
            "fold": division.fold,
            "seed": job.seed,
            "train": cells.fingerprint(division.train),
            "test": cells.fingerprint(division.test),
            "needs": {name: [self.digest(need) for need in self.needed(job, name)] for name in job.model.needs},
        }

    def digest(self, job: Job) -> str:
        """Return the digest of `content`."""
        key = job.model.name, job.division.name, job.seed
        if key not in self._digests:
            self._digests[key] = digest_of(self.content(job))
        return self._digests[key]

    def keeps_weights(self, model: ModelConfig) -> bool:
        """Whether a model's network is kept: it is asked for, or another takes its features or asks it about views."""
        return model.keep_weights or any(
            other.features == model.name or (other.views is not None and model.name in other.teachers)
            for other in self.config.models
        )


def run_study(
    study: Study, out: Path, again: bool = False, command: str = "", console: Console | None = None
) -> tuple[Outcome, ...]:
    """Run what is not there yet.

    Parameters
    ----------
    out:
        Folder of the study's outputs.
    again:
        Also redo runs that are finished, or that were made from something else. Where the study is limited to some
        models, finished runs of those that they need stay.
    command:
        The command that makes these outputs; stands in the report.

    Raises
    ------
    RunError
        If a folder holds a finished run of another configuration or of other data, and ``again`` is not set.
    """
    console = console or Console(quiet=True)
    costs = check(study.config)
    pending = [job for job in study.jobs if not _is_there(study, job, out, again)]
    _write_study(study, out, command)
    outcomes = {job.words: Outcome(job, "already there") for job in study.jobs}
    with _bars(console) as bars:
        # Progress in multiplications: the estimate of the time left is right although models differ in cost.
        work = [_work(job, costs[job.model.name]) for job in pending]
        whole = bars.add_task("study", total=sum(work), words=f"{len(pending)} runs")
        for number, (job, cost) in enumerate(zip(pending, work, strict=True), 1):
            words = f"run {number} of {len(pending)}: {job.words}"
            bars.update(whole, words=words)
            before = bars.tasks[0].completed
            with _epochs(bars, job, cost / job.model.epochs, whole) as advance:
                outcome = _run(study, job, out, advance)
            bars.update(whole, completed=before + cost)
            console.print(f"{words}: {outcome.status}{f' ({outcome.reason})' if outcome.reason else ''}")
            outcomes[job.words] = outcome
    return tuple(outcomes.values())


def _is_there(study: Study, job: Job, out: Path, again: bool) -> bool:
    """Whether a run is finished and may stay; refuses one that was made from something else, unless told to redo."""
    folder = job.folder(out)
    if not folder.finished:
        return False
    result = folder.result()
    if again and (not study.only or job.model.name in study.only):
        return False
    if result.digest != study.digest(job):
        if again:
            return False
        raise RunError(
            f"{folder.path} holds a finished run of another configuration, other data or other teachers; add --again "
            "to replace it, or choose another --out"
        )
    networked = job.model.family in ("ordinary", "square") and result.status == "finished"
    return not (networked and study.keeps_weights(job.model)) or (folder.path / WEIGHTS).is_file()


def _write_study(study: Study, out: Path, command: str) -> None:
    if (out / STUDY).is_file():
        held = read_written(out).config.name
        if held != study.config.name:
            raise RunError(f"{out} holds the study {held!r}, not {study.config.name!r}; choose another --out")
    written = WrittenStudy(command=command, final=study.final, config=study.config)
    write_json(out / STUDY, written.model_dump(mode="json"))


def _run(study: Study, job: Job, out: Path, advance: Any) -> Outcome:
    needed = [need for name in job.model.needs for need in study.needed(job, name)]
    for need in needed:
        if not need.folder(out).finished or need.folder(out).result().status != "finished":
            return Outcome(job, "blocked", f"{need.words} has no logits to learn from")
    folder, content = job.folder(out), study.content(job)
    folder.begin(content)
    tracked = out / "tensorboard" / job.model.name / job.division.name / f"seed-{job.seed}"
    began = time.monotonic()
    with Tracker(tracked, content, advance) as tracker:
        lesson = _lesson(study, job, out, tracker)
        try:
            learned = LEARNERS[job.model.family](lesson)
            found = _logits(study, job, learned)
        except Diverged as diverged:
            result = _result(study, job, time.monotonic() - began, None, str(diverged))
            folder.finish(result, {})
            return Outcome(job, "diverged", str(diverged))
        score = found.test_logits[:, 1] - found.test_logits[:, 0]
        tracker.final({"test_accuracy": float(((score > 0) == (found.test_labels == 1)).mean())})
    folder.write_logits(found)
    if learned.network is not None and study.keeps_weights(job.model):
        learned.network.save(folder.path / WEIGHTS)
    folder.finish(_result(study, job, time.monotonic() - began, learned), learned.history)
    return Outcome(job, "finished")


def _lesson(study: Study, job: Job, out: Path, tracker: Tracker) -> Lesson:
    cells, division, model = study.cells[job.model.size], job.division, job.model
    watched = None
    if division.protocol != "heldout":
        watched = cells.images[division.test], cells.labels[division.test]
    return Lesson(
        config=model,
        images=cells.images[division.train],
        labels=cells.labels[division.train],
        weights=weigh(cells, division.train, model.label_balance, model.group_power),
        soft=None if model.views else _soft(study, job, out),
        answers=_answers(study, job, out, model.views) if model.views else None,
        watched=watched,
        features=study.needed(job, model.features)[0].folder(out).path / WEIGHTS if model.features else None,
        seed=job.seed,
        callbacks=[tracker],
    )


def _soft(study: Study, job: Job, out: Path) -> Doubles | None:
    """Return the mean logits of all runs of all teachers on the train part, shape (n, 2)."""
    if not job.model.teachers:
        return None
    expected = study.cells[job.model.size].sha256[job.division.train].tolist()
    every = []
    for need in (need for name in job.model.teachers for need in study.needed(job, name)):
        given = need.folder(out).logits()
        if given.train_sha256.tolist() != expected:
            raise DataError(f"{need.folder(out).path} taught other cells, or in another order; run it with --again")
        every.append(given.train_logits)
    mean: Doubles = np.mean(every, axis=0)
    return mean


def _answers(study: Study, job: Job, out: Path, views: Views) -> Floats:
    """Return the mean logits of all runs of all teachers for every view of the train part, shape (views, n, 2).

    A teacher answers once; its answers are kept beside its network.
    """
    train = job.division.train
    every = []
    for need in (need for name in job.model.teachers for need in study.needed(job, name)):
        folder = need.folder(out)
        kept = folder.path / f"answers-{digest_of(views.model_dump(mode='json'))[:16]}.npy"
        if not kept.is_file():
            images = study.cells[need.model.size].images[train]
            answers = answered(folder.path / WEIGHTS, images, DrawnViews.draw(views, len(train)))
            beside = kept.with_suffix(".part.npy")
            np.save(beside, answers, allow_pickle=False)
            beside.replace(kept)
        every.append(np.load(kept, allow_pickle=False))
    mean: Floats = np.mean(every, axis=0, dtype=np.float32)
    return mean


def _logits(study: Study, job: Job, learned: Learned) -> RunLogits:
    cells, division = study.cells[job.model.size], job.division
    predict = over_symmetries(learned.logits) if job.model.symmetries else learned.logits
    train, test = predict(cells.images[division.train]), predict(cells.images[division.test])
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise Diverged("a logit is no finite number")
    return RunLogits(
        train_logits=train.astype(np.float64),
        train_sha256=cells.sha256[division.train],
        test_logits=test.astype(np.float64),
        test_sha256=cells.sha256[division.test],
        test_labels=cells.labels[division.test],
        test_subjects=cells.subjects[division.test],
        test_groups=cells.groups[division.test],
    )


def _result(study: Study, job: Job, seconds: float, learned: Learned | None, reason: str = "") -> RunResult:
    return RunResult(
        model=job.model.name,
        protocol=job.division.protocol,
        fold=job.division.fold,
        seed=job.seed,
        digest=study.digest(job),
        status="diverged" if learned is None else "finished",
        reason=reason,
        protocol_in_words=job.division.words,
        weights="" if learned is None else learned.weights,
        n_train=len(job.division.train),
        n_test=len(job.division.test),
        epochs=0 if learned is None else len(learned.history.get("loss", ())),
        seconds=round(seconds, 2),
        parameters=0 if learned is None else learned.parameters,
        multiply_adds=0 if learned is None else learned.multiply_adds,
        machine=machine(),
        device=device(),
        versions={name: version(name) for name in ("hemacrypt", "keras", "tensorflow", "scikit-learn", "numpy")},
        peak_memory_mb=_peak_memory_mb(),
    )


def machine() -> str:
    """Return the machine's class: processor and number of cores that this process may use; no name of a host."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def device() -> str:
    """Return what TensorFlow computes on: a GPU where it finds one."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "CPU"
    return f"GPU: {tf.config.experimental.get_device_details(gpus[0]).get('device_name', 'unnamed')}"


def _peak_memory_mb() -> float | None:
    """Return the most memory that this process has held so far; None where that cannot be asked."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


# ---------------------------------------------------------------------------------------------- progress


def _work(job: Job, multiply_adds: int) -> float:
    """Return what a run costs, in units of one another; an epoch costs something however small the network."""
    if not multiply_adds:
        return 1e9
    return float(job.model.epochs * len(job.division.train)) * (3 * multiply_adds + 2e6)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[words]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=1800,
    )


@contextmanager
def _epochs(bars: Progress, job: Job, step: float, whole: Any) -> Iterator[Any]:
    """Show the epochs of one run; gives the function that one epoch calls at its end."""
    task = bars.add_task("epochs", total=job.model.epochs, words="epochs")

    def advance() -> None:
        bars.advance(task)
        bars.advance(whole, step)

    try:
        yield advance
    finally:
        bars.remove_task(task)
