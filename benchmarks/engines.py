"""Our engines and other systems side by side: one run, one machine, the same weights and images.

Every row is measured in a process of its own, pinned to as many CPUs as it has threads. The processes of a network
are interleaved: each evaluates a few times, then the next, several times round, so that what disturbs the machine
disturbs them all::

    make bench-engines                      # the cell-shaped networks, a few minutes
    FULL=1 make bench-engines               # everything; TenSEAL's own API alone takes minutes
    python -m benchmarks.engines --network rp --engine vector --engine openfhe

Other systems live in virtual environments of their own: ``build/peers/NAME``, or the Python that the environment
variable ``HEMACRYPT_PEER_NAME`` names. Those that are absent are skipped with a line: ``benchmarks/peers/README.md``.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import report
from benchmarks.networks import NAMES, Case, make_case
from benchmarks.report import Row
from hemacrypt.model.network import Array

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build" / "peers"
QUICK = ("rp", "r", "leukaemia")
# Peers: the name of their environment and their script. TenSEAL is in the project's own environment.
SCRIPTS = {
    "openfhe": "openfhe_bsgs",
    "orion": "orion_lattigo",
    "desilo": "desilo_bsgs",
    "helayers": "helayers_onnx",
    "tenseal": "tenseal_api",
}
_THROUGHPUT_IMAGES = 4096
_WIDTH = 150
# CPU flags that decide which kernels a library can run.
_FLAGS = ("avx2", "avx512f", "avx512dq", "avx512ifma", "avx512vbmi", "avx512_vnni")


class Absent(Exception):  # noqa: N818 - a row that does not come about is no error
    """Raised where there is nothing to measure; the text says why."""


@dataclass(frozen=True)
class Entry:
    """One row to be measured.

    Attributes
    ----------
    engine:
        What the row calls it.
    family:
        What ``--engine`` calls it: one of ours, or a peer's name.
    module:
        The worker.
    variant:
        Which of the worker's ways.
    """

    engine: str
    family: str
    module: str
    variant: str = ""
    threads: int = 1
    batch: int = 1
    slots: str = "real"

    @property
    def label(self) -> str:
        """What a line about the row calls it."""
        return f"{self.engine} ({self.slots} slots, threads {self.threads}, batch {self.batch})"


@dataclass(frozen=True)
class Schedule:
    """How often to evaluate.

    Attributes
    ----------
    rounds:
        How often the engines take turns.
    timed:
        Timed evaluations in each turn, after an untimed one.
    slow_rounds:
        Turns of one evaluation for engines that take longer than ``slow_ms``; their second evaluation counts too.
    once_ms:
        Engines whose first evaluation takes longer than this are not evaluated again.
    """

    rounds: int = 5
    timed: int = 3
    slow_rounds: int = 2
    slow_ms: float = 1500.0
    once_ms: float = 60_000.0


def ours(engine: str, slots: str = "real", threads: int = 1, batch: int = 1) -> Entry:
    """Return the entry of one of our engines."""
    return Entry(engine, engine, "benchmarks.ours", f"{engine}/{slots}", threads, batch, slots)


def entries_for(network: str, full: bool) -> list[Entry]:
    """List the rows of a network."""
    if network == "lola-cifar":
        # Its diagonals take gigabytes in every process, and all rows of a network are measured at once.
        return [ours("vector", "complex"), *([ours("vector", "complex", threads=2)] if full else [])]
    listed = [ours("vector", "complex"), ours("seal"), ours("vector"), ours("seal", "complex")]
    listed += [ours("vector", "complex", batch=2), ours("vector", "complex", threads=2), ours("vector", threads=2)]
    if network in ("rp", "r") or full:
        for threads in (1, 2) if full else (1,):
            listed += [
                Entry(f"openfhe-{variant}", "openfhe", _script("openfhe"), variant, threads)
                for variant in ("manual", "auto")
            ]
            listed += [Entry(name, name, _script(name), "", threads) for name in ("orion", "desilo", "helayers")]
    if network == "rp":
        listed.append(Entry("tenseal-api", "tenseal", _script("tenseal")))
    if full and network in ("leukaemia", "cryptonets-mnist"):
        listed += [
            Entry("throughput", "vector", "benchmarks.ours", "throughput", threads, _THROUGHPUT_IMAGES)
            for threads in (1, 2)
        ]
    return listed


def _script(peer: str) -> str:
    return f"benchmarks.peers.{SCRIPTS[peer]}"


def python_for(entry: Entry) -> str:
    """Return the Python that runs a worker.

    Raises
    ------
    Absent
        If a peer is not installed.
    """
    if entry.module == "benchmarks.ours" or entry.family == "tenseal":
        return sys.executable
    variable = f"HEMACRYPT_PEER_{entry.family.upper()}"
    path = Path(os.environ.get(variable) or PEERS / entry.family / "bin" / "python")
    if not path.exists():
        raise Absent(f"not installed; see benchmarks/peers/README.md ({path} does not exist)")
    return str(path)


class Worker:
    """A process that measures one entry.

    Parameters
    ----------
    entry:
        What to measure.
    case:
        File of the case.
    log:
        File that takes its standard error.
    limit_s:
        Seconds that any answer may take.

    Raises
    ------
    Absent
        If it cannot be measured here.
    """

    def __init__(self, entry: Entry, case: Path, log: Path, limit_s: float = 1200.0) -> None:
        self.entry, self._log, self._limit = entry, log, limit_s
        python, cpus = python_for(entry), sorted(os.sched_getaffinity(0))
        if len(cpus) < entry.threads:
            raise Absent(f"{entry.threads} threads need as many CPUs; this machine lends {len(cpus)}")
        counts = {name: str(entry.threads) for name in ("OMP_NUM_THREADS", "GOMAXPROCS", "NUMBA_NUM_THREADS")}
        options = ["--threads", str(entry.threads), "--batch", str(entry.batch), "--variant", entry.variant]
        os.sched_setaffinity(0, cpus[: entry.threads])  # inherited, and in force before any library makes threads
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    [python, "-m", entry.module, str(case), *options],
                    cwd=ROOT,
                    env=os.environ | counts | {"PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        finally:
            os.sched_setaffinity(0, cpus)
        # Where memory runs out, the process that is measured goes, and not a neighbour of it.
        Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000", encoding="ascii")

    def answer(self) -> dict[str, Any]:
        """Wait for its next message."""
        timer = threading.Timer(self._limit, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise Absent(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "skipped" in message:
            raise Absent(message["skipped"])
        return message

    def evaluate(self, untimed: int, timed: int) -> list[float]:
        """Let it evaluate; return the milliseconds of the timed evaluations."""
        assert self._process.stdin is not None
        try:
            print(untimed, timed, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Absent(self._last_words()) from None
        return list(self.answer()["ms"])

    def finish(self) -> dict[str, Any]:
        """Tell it that it may end, and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.answer()

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            # What was written to a process that died is lost, and nobody waits for it.
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _last_words(self) -> str:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        killed = " (killed: too little memory, or no answer in time)" if code == -signal.SIGKILL else ""
        return f"ended with code {code}{killed}: {lines[-1] if lines else 'no word'}; see {self._log}"


@dataclass
class _Running:
    worker: Worker
    milliseconds: list[float]
    rounds: int
    timed: int


def run_case(
    case: Case,
    entries: Iterable[Entry],
    folder: Path,
    say: Callable[[str], None],
    schedule: Schedule | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure all entries on one case.

    Parameters
    ----------
    case:
        Network and images.
    entries:
        Rows to measure, in the order in which they take turns.
    folder:
        Takes the case file and the logs.
    say:
        Takes a line for people: progress, and why a row is missing.
    schedule:
        How often to evaluate.

    Returns
    -------
    dict
        ``rows``, ``floors`` and ``skipped``: what goes into the report; ``versions`` as (name, version) pairs.
    """
    schedule = schedule or Schedule()
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "floors": [], "skipped": [], "versions": []}
    path = case.write(folder / f"{case.name}.npz")
    clear = case.network(case.images)

    def skip(entry: Entry, reason: object) -> None:
        say(f"{case.name}: {entry.label} skipped: {reason}")
        found["skipped"].append({"network": case.name, "engine": entry.label, "reason": str(reason)})

    running: list[_Running] = []
    workers: list[Worker] = []
    try:
        for entry in entries:
            say(f"{case.name}: {entry.label}")
            try:
                name = f"{case.name}-{entry.engine}-{entry.slots}-{entry.threads}-{entry.batch}.log"
                worker = Worker(entry, path, folder / name)
                workers.append(worker)
                first = worker.answer()
                if "measured" in first:
                    row = first["measured"]
                    found["rows"].append(_row(case.name, entry, row.pop("ms"), row))
                elif first["first_ms"] > schedule.once_ms:
                    running.append(_Running(worker, [first["first_ms"]], 0, 0))
                else:
                    second = worker.evaluate(0, 1)
                    if second[0] <= schedule.slow_ms:
                        running.append(_Running(worker, [], schedule.rounds, schedule.timed))
                    else:
                        running.append(_Running(worker, second, schedule.slow_rounds, 1))
            except Absent as reason:
                skip(entry, reason)
        for turn in range(max((each.rounds for each in running), default=0)):
            for each in [each for each in running if each.rounds > turn]:
                try:
                    each.milliseconds += each.worker.evaluate(int(each.timed > 1), each.timed)
                except Absent as reason:
                    skip(each.worker.entry, reason)
                    running.remove(each)
        for each in running:
            entry = each.worker.entry
            try:
                result = each.worker.finish()
            except Absent as reason:
                skip(entry, reason)
                continue
            row = _row(case.name, entry, each.milliseconds, result | _accuracy(result["answers"], clear))
            found["rows"].append(row)
            if entry.module != "benchmarks.ours":
                found["versions"].append({"name": entry.family, "version": result["version"]})
            if result.get("floor"):
                found["floors"].append(_floor(row, result["floor"]))
    finally:
        for worker in workers:
            worker.stop()
    return found


def _accuracy(answers: dict[str, list[list[float]]], clear: Array) -> dict[str, Any]:
    """Compare the logits of every evaluation with those of the network in the clear."""
    errors, disagreements = [0.0], 0
    for image, logits in answers.items():
        got, wanted = np.array(logits), clear[int(image)]
        errors.append(float(np.abs(got - wanted).max()))
        disagreements += bool((got.argmax(axis=1) != wanted.argmax()).any())
    return {"logit_error": max(errors), "disagreements": disagreements, "images": len(answers)}


def _row(network: str, entry: Entry, milliseconds: Sequence[float], result: dict[str, Any]) -> Row:
    return {
        "network": network,
        "engine": entry.engine,
        "threads": entry.threads,
        "batch": entry.batch,
        "slots": entry.slots,
        "compute_ms": {
            "median": float(np.median(milliseconds)),
            "min": float(np.min(milliseconds)),
            "p95": float(np.percentile(milliseconds, 95)),
        },
        "repetitions": len(milliseconds),
        "logit_error": result["logit_error"],
        "disagreements": result["disagreements"],
        "images": result["images"],
        "bytes": result["bytes"],
        "bytes_estimated": result.get("bytes_estimated", False),
        "rss_mb": result["rss_mb"],
        "key_budget_mb": result.get("key_budget_mb"),
    }


def _floor(row: Row, floor: dict[str, Any]) -> dict[str, Any]:
    measured = row["compute_ms"]["median"]
    names = ("network", "engine", "threads", "batch", "slots")
    return {
        **{name: row[name] for name in names},
        **floor,
        "measured_ms": measured,
        "ratio": measured / floor["floor_ms"],
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on, and how busy it was."""
    facts: dict[str, list[str]] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), []).append(value.strip())
    flags = facts.get("flags", [""])[0].split()
    return {
        "cpu": facts.get("model name", [platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Return the versions of what our engines stand on."""
    found = {"python": platform.python_version()}
    for name in ("hemacrypt", "numpy", "numba", "llvmlite", "tenseal"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(
    full: Annotated[bool, typer.Option("--full", help="All networks, threads and batches; takes long.")] = False,
    network: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(NAMES)}.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help=f"Only these: vector, seal, {', '.join(SCRIPTS)}.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images that the evaluations go through in turn.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for engines.json and engines.png.")] = Path("build/bench"),
) -> None:
    """Measure our engines and the installed peers on the same networks."""
    # A file or a pipe has no width; the tables need this much.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    known = {"vector", "seal", *SCRIPTS}
    if unknown := {*(engine or [])} - known | {*(network or [])} - {*NAMES}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: no such engine or network")
    results: dict[str, Any] = {"rows": [], "floors": [], "skipped": [], "machine": machine(), "versions": versions()}
    out = out.resolve()
    for name in network or (NAMES if full else QUICK):
        entries = [entry for entry in entries_for(name, full) if engine is None or entry.family in engine]
        if not full and not (engine and "tenseal" in engine):
            minutes = [entry for entry in entries if entry.family == "tenseal"]
            for entry in minutes:
                console.print(f"{name}: {entry.label} skipped: takes minutes; FULL=1 make bench-engines runs it")
                entries.remove(entry)
        batches = [entry for entry in entries if entry.batch > images]
        rest = [entry for entry in entries if entry.batch <= images]
        for part, count in ((rest, images), (batches, _THROUGHPUT_IMAGES)):
            if not part:
                continue
            found = run_case(make_case(name, count), part, out / "engines", console.print)
            for key in ("rows", "floors", "skipped"):
                results[key] += found[key]
            results["versions"] |= {each["name"]: each["version"] for each in found["versions"]}
    results["machine"]["load_after"] = os.getloadavg()[0]
    (out / "engines.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report.show(results, console)
    report.plot(results["rows"], out / "engines.png")
    console.print(f"written: {out / 'engines.json'}, {out / 'engines.png'}")


if __name__ == "__main__":
    typer.run(main)
