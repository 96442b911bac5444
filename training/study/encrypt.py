"""Test cells of a study's square networks, evaluated under encryption by the hospital's own program.

The laboratory holds no secret key, so it does not encrypt either: for each run its bundle is exported and ``hemacrypt
verify`` is called as a process of its own, with nothing but that bundle and an archive of the test cells.

::

    OUT/bundles/RUN/         the bundle
    OUT/encrypted/RUN.npz    logits and SHA-256 of the cells
    OUT/encrypted/RUN.json   what came of it, see training.study.results.EncryptedResult; written last
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hemacrypt.errors import BundleError, HemacryptError
from hemacrypt.model.bundle import Bundle
from training.datasets import CellImages
from training.errors import RunError
from training.study.config import ModelConfig, Protocol
from training.study.export import Trained, export_trained, is_export_of, study_cells, trained_run
from training.study.results import ENCRYPTED, Doubles, EncryptedResult, Results, Strings, collect
from training.study.runs import write_json

BUNDLES = "bundles"
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Status = Literal["encrypted", "already there", "failed"]


@dataclass(frozen=True)
class Encryption:
    """What became of one run in one call of `encrypt_study`."""

    run: str
    status: Status
    words: str


def encrypt_study(
    out: Path,
    data: Path,
    models: Sequence[str] = (),
    protocols: Sequence[Protocol] = (),
    limit: int | None = None,
    threads: int = 1,
    pairs: bool = False,
    console: Console | None = None,
) -> tuple[Encryption, ...]:
    """Evaluate every finished run of square networks under encryption that is not there yet.

    Held-out cells are read only for runs under ``heldout``, which a study has only after ``--final``.

    Parameters
    ----------
    out:
        Folder of the study's outputs.
    data:
        Folder of the data, as `training.datasets.load_cells` reads it.
    models, protocols:
        Which runs; empty: all that kept their network.
    limit:
        At most so many test cells of each run, evenly spread.
    threads:
        Threads for one image.
    pairs:
        Two cells at a time, where the network has a plan for that. Their milliseconds are a half of the pair's: a
        throughput, and the engine's name says so.

    Returns
    -------
    tuple of Encryption
        One for each run. A result stays when it is of the same bundle and of as many cells.

    Raises
    ------
    RunError
        If there is no such run.
    DataError
        If the data cannot be read.
    """
    console = console or Console(quiet=True)
    results = collect(out, with_encrypted=False)
    runs = _runs(results, models, protocols)
    wanted = {run.name: _some(len(run.folder.logits().test_sha256), limit) for run in runs}
    kept: dict[tuple[int, bool], CellImages] = {}
    outcomes = []
    with Progress(
        *(TextColumn("{task.fields[words]}"), BarColumn(), MofNCompleteColumn(), TextColumn("cells")),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        speed_estimate_period=1800,
    ) as bars:
        task = bars.add_task("runs", total=sum(map(len, wanted.values())), words="")
        for number, run in enumerate(runs, 1):
            bars.update(task, words=f"run {number} of {len(runs)}: {run.name}")
            key = run.model.size, run.protocol == "heldout"
            if key not in kept:
                kept[key] = study_cells(data, *key)
            try:
                outcome = _encrypt(results, run, kept[key], wanted[run.name], threads, pairs)
            except HemacryptError as error:
                outcome = Encryption(run.name, "failed", str(error))
            bars.advance(task, len(wanted[run.name]))
            console.print(f"{outcome.run}: {outcome.status}; {outcome.words}", highlight=False)
            outcomes.append(outcome)
    return tuple(outcomes)


def _runs(results: Results, models: Sequence[str], protocols: Sequence[Protocol]) -> list[Trained]:
    """Return the finished runs whose network was kept; of each model that was named at least one."""
    config = results.config
    chosen = [config.model(name) for name in models] or [model for model in config.models if model.family == "square"]
    found: list[Trained] = []
    for model in chosen:
        mine = [run for run in _all_runs(results, model) if _is_kept(run) and run.protocol in (protocols or PROTOCOLS)]
        if models and not mine:
            trained_run(results, model.name, (*protocols, *config.protocols_of(model))[0])  # says why there is none
        found += mine
    if not found:
        raise RunError(
            f"{results.out} has no finished run of a square network that was kept; set keep_weights = true for the "
            "models to encrypt, and run the study"
        )
    return found


def _all_runs(results: Results, model: ModelConfig) -> Iterator[Trained]:
    for protocol in results.config.protocols_of(model):
        for fold in range(results.config.folds_of(protocol)):
            for seed in model.seeds:
                yield Trained(results.out, model, protocol, fold, seed)


def _is_kept(run: Trained) -> bool:
    if run.model.family != "square" or run.model.symmetries or not run.weights.is_file():
        return False
    return run.folder.finished and run.folder.result().status == "finished"


def _some(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return [int(row) for row in np.linspace(0, count - 1, limit)]


def _encrypt(
    results: Results, run: Trained, cells: CellImages, rows: list[int], threads: int, pairs: bool
) -> Encryption:
    bundle, directory = _bundle(results, run, cells)
    target = run.out / ENCRYPTED / f"{run.name}.json"
    if _is_there(target, bundle, len(rows)):
        return Encryption(run.name, "already there", f"bundle {bundle.digest[:16]}…")
    sha256 = run.folder.logits().test_sha256[rows]
    shown = cells.rows_of(sha256.tolist(), "the test part")
    with tempfile.TemporaryDirectory(prefix="hemacrypt-study-") as scratch:
        archive = Path(scratch) / "cells.npz"
        np.savez(archive, images=cells.images[shown], labels=cells.labels[shown])
        record, logits = _verified(directory, archive, Path(scratch), threads, pairs)
    if record["bundle"] != bundle.digest or len(logits) != len(sha256):
        raise RunError(f"{directory} was changed while it was evaluated; call `hemacrypt study encrypt` again")
    temperature = float(bundle.manifest.metrics["calibration"]["temperature"])
    _write(target, _result(run, record, bundle, temperature, len(rows), threads), logits * temperature, sha256)
    return Encryption(run.name, "encrypted", _words(record))


def _bundle(results: Results, run: Trained, cells: CellImages) -> tuple[Bundle, Path]:
    """Return the bundle of a run, exported now unless it was before."""
    directory = run.out / BUNDLES / run.name
    try:
        bundle = Bundle.read(directory)
        if is_export_of(bundle, results, run):
            return bundle, directory
    except BundleError:
        pass  # not there, or not whole
    return export_trained(results, run, cells, directory, run.model.name)[0], directory


def _is_there(target: Path, bundle: Bundle, cells: int) -> bool:
    try:
        held = EncryptedResult.model_validate_json(target.read_bytes())
    except (OSError, ValueError):
        return False
    return held.digest == bundle.digest and held.cells >= cells and (target.parent / held.logits).is_file()


def _verified(
    directory: Path, archive: Path, scratch: Path, threads: int, pairs: bool
) -> tuple[dict[str, Any], Doubles]:
    """Call the hospital's program; return its record and the decrypted logits, not a number where unreadable.

    It exits with status 1 when something disagrees, and that is a result; without its files it is a failure.
    """
    told, logits = scratch / "record.json", scratch / "logits.npz"
    command = [sys.executable, "-m", "hemacrypt", "verify", str(directory), "--images", str(archive)]
    command += ["--scheme", "ckks", "--threads", str(threads), "--json", str(told), "--logits", str(logits)]
    command += ["--pairs"] if pairs else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    try:
        record: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        with np.load(logits, allow_pickle=False) as arrays:
            return record, np.asarray(arrays["encrypted"], dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RunError(f"`hemacrypt verify` gave no result: {said[-1] if said else error}") from error


def _result(
    run: Trained, record: Mapping[str, Any], bundle: Bundle, temperature: float, cells: int, threads: int
) -> EncryptedResult:
    unreadable = len(record["unreadable"])
    return EncryptedResult(
        model=run.model.name,
        protocol=run.protocol,
        fold=run.fold,
        seed=run.seed,
        logits=f"{run.name}.npz",
        milliseconds=record["ms"]["compute"]["median"],
        engine=record["engine"] + (", pairs" if record["images_at_a_time"] > 1 else ""),
        scheme=record["scheme"],
        digest=bundle.digest,
        note=f"threads: {threads}" + (f"; {unreadable} answers could not be read" if unreadable else ""),
        temperature=temperature,
        cells=cells,
        disagreements=record["disagreements"],
        largest_error=record["max_logit_error"],
        error_bound=record["logit_error_bound"],
        run=run.folder.result().digest,
    )


def _write(target: Path, result: EncryptedResult, logits: Doubles, sha256: Strings) -> None:
    """Write both files, the JSON last, and of the logits those that could be read."""
    read = np.isfinite(logits).all(axis=1)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never beside the logits of another bundle
        np.savez_compressed(target.parent / result.logits, logits=logits[read], sha256=sha256[read])
    except OSError as error:
        raise RunError(f"cannot write {target.parent}: {error.strerror}; check space and permissions") from error
    write_json(target, result.model_dump(mode="json"))


def _words(record: Mapping[str, Any]) -> str:
    return (
        f"{record['images']} cells, {record['ms']['compute']['median']:.1f} ms each, {record['disagreements']} other "
        f"predictions than in the clear, largest error {record['max_logit_error']:.1e} of at most "
        f"{record['logit_error_bound']:.1e}"
    )
