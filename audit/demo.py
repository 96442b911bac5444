"""The demonstration: a real service in a process of its own, real keys, real cells, every step shown.

The service gets a bundle of the zoo; this side gets the sample and never needs the weights — except that, being a
demonstration, it evaluates the same network in the clear as well, to show that both answers agree.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from audit.answers import Answer
from audit.picture import draw
from client_sdk._client import Client
from client_sdk._exceptions import ClientError, ServiceUnavailableError
from hemacrypt import DISCLAIMER
from hemacrypt.embedded import SampleCell, bundle_path, sample
from hemacrypt.engines import DEFAULT_ENGINE
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import Preprocessing

_STAGES = ("encrypt", "upload", "compute", "decrypt")
_START_SECONDS = 300.0


@contextmanager
def running_service(
    bundle: Path, directory: Path, workers: int, log: Path, engine: str = DEFAULT_ENGINE
) -> Iterator[str]:
    """Start a service process on a free port of this machine, yield its address, stop it.

    Raises
    ------
    ServiceUnavailableError
        If it does not become ready; its log says why.
    """
    port_file = directory / "port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "service", str(bundle), "--port", "0", "--port-file", str(port_file)]
    command += ["--store", str(directory / "store"), "--workers", str(workers), "--engine", engine]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEMACRYPT_")}
    environment["HEMACRYPT_CACHE"] = str(directory / "cache")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServiceUnavailableError(f"the service did not start; see {log}")
            time.sleep(0.05)
        yield f"127.0.0.1:{int(port_file.read_text())}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_demo(
    out: Path,
    limit: int | None,
    workers: int,
    console: Console,
    engine: str = DEFAULT_ENGINE,
    directory: Path | None = None,
) -> int:
    """Run the demonstration and write ``report.json``, ``report.png`` and the service's log.

    Parameters
    ----------
    out:
        Directory for the outputs.
    limit:
        Use only so many cells, spread over the sample; all when None.
    workers:
        Worker processes of the service.
    console:
        Where to print.
    engine:
        Engine of the service.
    directory:
        Bundle of a model that reads cells; by default that of the zoo.

    Returns
    -------
    int
        How many cells encrypted and clear prediction disagree on; 0 is the promise.

    Raises
    ------
    ClientError
        If the bundle's model reads something else than cells.
    ServiceUnavailableError
        If the service does not start.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells = sample()
    if limit is not None and limit < len(cells):
        cells = [cells[i] for i in np.linspace(0, len(cells) - 1, limit).astype(int)]
    directory = directory or bundle_path()
    bundle = Bundle.read(directory)
    if not isinstance(bundle.manifest.preprocessing, Preprocessing):
        raise ClientError(f"{directory} reads arrays, not cells; the demonstration needs a model for cells")
    console.print(f"[bold]Hemacrypt demo[/]: {len(cells)} real cells of subjects that the model has never seen")
    with tempfile.TemporaryDirectory(prefix="hemacrypt-demo-") as scratch:
        here = Path(scratch)
        started = time.perf_counter()
        console.print(
            "laboratory: starting the service (the first time on a machine compiles the engine: about a minute) …"
        )
        with running_service(directory, here, workers, out / "service.log", engine) as target:
            start_seconds = time.perf_counter() - started
            console.print(f"laboratory: ready at {target} after {start_seconds:.1f} s")
            with Client(target, bundle.manifest.name, key_directory=here / "keys") as client:
                answers, key_bytes = _ask(client, cells, bundle, console)
        console.print("laboratory: service stopped")
    report = summarise(answers, key_bytes, start_seconds) | {"engine": engine}
    _print(answers, report, console)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(answers, report, bundle.manifest.labels, out / "report.png")
    console.print(f"written: {out / 'report.json'}, {out / 'report.png'}")
    console.print(f"[bold]{DISCLAIMER}[/]")
    return int(report["disagreements"])


def _ask(client: Client, cells: Sequence[SampleCell], bundle: Bundle, console: Console) -> tuple[list[Answer], int]:
    started = time.perf_counter()
    client.generate_keys()
    key_bytes = len(client.keys.evaluation_blob())
    console.print(f"hospital: keys generated in {time.perf_counter() - started:.1f} s; the secret key stays here")
    started = time.perf_counter()
    client.register()
    console.print(
        f"hospital: {key_bytes / 1e6:.1f} MB evaluation keys registered in {time.perf_counter() - started:.1f} s"
    )
    client.predict(cells[0].path)  # the first request pays for loading the keys into the worker
    answers = []
    for cell in track(cells, "hospital: encrypt → predict → decrypt", console=console):
        clear = bundle.network(client.preprocessing(cell.path)[None])[0]
        answers.append(Answer(cell, client.predict(cell.path), clear))
    return answers, key_bytes


def summarise(answers: Sequence[Answer], key_bytes: int, start_seconds: float) -> dict[str, Any]:
    """Return the report: counts, accuracies, errors, times, bytes."""
    times = {stage: np.array([getattr(a.encrypted.milliseconds, stage) for a in answers]) for stage in _STAGES}
    return {
        "images": len(answers),
        "disagreements": sum(not answer.agrees for answer in answers),
        "max_logit_error": max(answer.logit_error for answer in answers),
        "logit_error_bound": max(answer.encrypted.error_bound for answer in answers),
        "encrypted_accuracy": float(np.mean([a.encrypted.index == a.cell.label for a in answers])),
        "clear_accuracy": float(np.mean([a.clear_index == a.cell.label for a in answers])),
        "protocol": "subject-disjoint: cells of held-out subjects, never trained or tuned on",
        "subjects": len({answer.cell.subject for answer in answers}),
        "ms": {
            stage: {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
            for stage, values in times.items()
        },
        "bytes": {
            "upload_per_image": int(np.median([a.encrypted.size.upload for a in answers])),
            "reply_per_image": int(np.median([a.encrypted.size.reply for a in answers])),
            "evaluation_keys": key_bytes,
        },
        "service_start_seconds": start_seconds,
        "note": DISCLAIMER,
    }


def _print(answers: Sequence[Answer], report: dict[str, Any], console: Console) -> None:
    table = Table("cell", "truth", "encrypted", "p", "clear", "logit error", title="Predictions", title_justify="left")
    for answer in answers:
        labels = answer.encrypted.labels
        table.add_row(
            answer.cell.path.name,
            labels[answer.cell.label],
            answer.encrypted.label,
            f"{answer.encrypted.probability:.3f}",
            labels[answer.clear_index],
            f"{answer.logit_error:.1e}",
            style=None if answer.agrees else "bold red",
        )
    console.print(table)
    milliseconds, sizes = report["ms"], report["bytes"]
    stages = Table("stage", "median ms", "p95 ms", title="Time of one image", title_justify="left")
    for stage in _STAGES:
        stages.add_row(stage, f"{milliseconds[stage]['median']:.1f}", f"{milliseconds[stage]['p95']:.1f}")
    console.print(stages)
    console.print(
        f"bytes: up {sizes['upload_per_image']:,} per image, down {sizes['reply_per_image']:,}, "
        f"evaluation keys {sizes['evaluation_keys']:,} once"
    )
    console.print(
        f"accuracy on {report['images']} cells of {report['subjects']} held-out subjects: "
        f"encrypted {report['encrypted_accuracy']:.1%}, clear {report['clear_accuracy']:.1%}"
    )
    console.print(
        f"largest logit error {report['max_logit_error']:.2e}, the plan's bound {report['logit_error_bound']:.2e}"
    )
    console.print(f"[bold]encrypted and clear disagree on {report['disagreements']} of {report['images']} cells[/]")
