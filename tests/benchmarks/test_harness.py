"""The harness of `make bench-engines`: rows, what becomes of engines that are absent, bars, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import engines, report
from benchmarks.engines import Absent, Entry, Schedule, Worker, ours, run_case
from benchmarks.networks import NAMES, Case, make_case, random_case
from benchmarks.peers.packing import evaluate_in_clear, make_packing
from benchmarks.peers.worker import CaseFile, Skipped
from hemacrypt.model.network import Convolution, Dense

# However slow the machine is, no engine counts as slow: what a test finds may not depend on that.
FAST = Schedule(rounds=2, timed=2, slow_ms=1e9, once_ms=1e9)
ROW_KEYS = {"network", "engine", "threads", "batch", "slots", "compute_ms", "logit_error", "disagreements", "images"}
ROW_KEYS |= {"bytes", "rss_mb", "key_budget_mb"}


@pytest.fixture(scope="module")
def tiny() -> Case:
    """Return a convolution, a square and a matrix on 4×4 pixels."""
    rng = np.random.default_rng(5)
    convolution = Convolution(rng.normal(size=(2, 1, 3, 3)) / 3, rng.normal(size=2), (1, 4, 4), 2, ((1, 0), (1, 0)))
    return random_case("tiny", (convolution, Dense(rng.normal(size=(2, 8)) / 3, rng.normal(size=2))), (1, 4, 4), 3)


@pytest.fixture(scope="module")
def measured(tiny: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """Return what a run of our two engines, of a peer that is absent and of a row that no engine can give found."""
    peer = Entry("openfhe-manual", "openfhe", "benchmarks.peers.openfhe_bsgs", "manual")
    entries = [ours("vector"), ours("seal"), peer, ours("vector", threads=10_000)]
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HEMACRYPT_PEER_OPENFHE", "/there/is/no/python")
        return run_case(tiny, entries, tmp_path_factory.mktemp("engines"), lines.append, FAST), lines


def test_both_engines_give_a_row_with_every_field(measured: tuple[dict[str, Any], list[str]]) -> None:
    rows = measured[0]["rows"]
    assert [row["engine"] for row in rows] == ["vector", "seal"]
    for row in rows:
        assert set(row) >= ROW_KEYS
        assert 0 < row["compute_ms"]["min"] <= row["compute_ms"]["median"] <= row["compute_ms"]["p95"]
        assert row["repetitions"] == 4
        assert row["images"] == 3
        assert row["disagreements"] == 0
        assert 0 < row["logit_error"] < 1e-2
        assert all(row["bytes"][name] > 0 for name in ("upload", "reply", "keys"))
        assert row["rss_mb"] > 10


def test_what_is_absent_gives_a_line_and_no_row(measured: tuple[dict[str, Any], list[str]]) -> None:
    found, lines = measured
    skipped = [line for line in lines if "skipped" in line]
    assert len(skipped) == len(found["skipped"]) == 2
    assert "/there/is/no/python does not exist" in skipped[0]
    assert "10000 threads need as many CPUs" in skipped[1]


def test_a_worker_that_breaks_is_reported_with_its_last_words(tiny: Case, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "tiny.npz")
    path.write_bytes(b"no case at all")
    worker = Worker(Entry("none", "vector", "benchmarks.ours", "vector/real"), path, tmp_path / "log")
    try:
        with pytest.raises(Absent, match="ended with code 1"):
            worker.answer()
    finally:
        worker.stop()


def test_a_case_survives_its_file(tiny: Case, tmp_path: Path) -> None:
    read = Case.read(tiny.write(tmp_path / "tiny.npz"))
    assert read.name == "tiny"
    np.testing.assert_array_equal(read.network(read.images), tiny.network(tiny.images))
    for got, wanted in zip(read.network.peaks, tiny.network.peaks, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_every_named_case_has_logits_of_moderate_size() -> None:
    for name in NAMES[:-1]:
        case = make_case(name, 2)
        assert case.images.shape[0] == 2
        assert 0.01 < np.abs(case.network(case.images)).max() < 10


@pytest.mark.parametrize("name", ["tiny", "rp", "cryptonets-mnist"])
def test_the_packing_for_peers_computes_the_network(name: str, tiny: Case, tmp_path: Path) -> None:
    case = tiny if name == "tiny" else make_case(name, 1)
    read = CaseFile.read(str(case.write(tmp_path / "case.npz")))
    packing = make_packing(read, 4096)
    np.testing.assert_allclose(evaluate_in_clear(packing, read.images[0]), read.logits[0], atol=1e-12)
    assert 0 not in packing.rotations


def test_the_packing_for_peers_refuses_what_does_not_fit(tiny: Case, tmp_path: Path) -> None:
    with pytest.raises(Skipped, match="one ciphertext has 8"):
        make_packing(CaseFile.read(str(tiny.write(tmp_path / "tiny.npz"))), 8)


def row(network: str, engine: str, milliseconds: float, **other: Any) -> dict[str, Any]:
    times = dict.fromkeys(("median", "min", "p95"), milliseconds)
    sizes = {"upload": 1e6, "reply": 2e3, "keys": None}
    row = {"network": network, "engine": engine, "threads": 1, "batch": 1, "slots": "real", "compute_ms": times}
    row |= {"logit_error": 1e-3, "disagreements": 0, "images": 4, "bytes": sizes, "bytes_estimated": False}
    return row | {"repetitions": 3, "rss_mb": 10.0, "key_budget_mb": None} | other


def test_bars_compare_like_with_like() -> None:
    rows = [
        row("rp", "vector", 40.0),
        row("rp", "vector", 24.0, slots="complex"),
        row("rp", "vector", 15.0, slots="complex", threads=2),
        row("rp", "vector", 44.0, slots="complex", batch=2),
        row("rp", "seal", 300.0),
        row("rp", "seal", 192.0, slots="complex"),
        row("rp", "orion", 264.0),
        row("rp", "openfhe-manual", 100.0, threads=2),
        row("cryptonets-mnist", "throughput", 4096.0, batch=4096),
    ]
    bars = {bar.name.split(", ", 1)[-1]: bar for bar in report.bars({"rows": rows, "floors": []})[:7]}
    assert bars["one image, one thread"].value == 24
    assert bars["fastest peer (orion) / vector"].value == 11
    assert bars["seal on the same plan / vector"].value == 8
    assert bars["two threads / one thread"].value == pytest.approx(15 / 24)
    assert bars["complex slots / real slots, one image"].value == 0.6
    assert bars["complex slots, two images, for each / one image in real slots"].value == pytest.approx(22 / 40)
    assert [bar.verdict for bar in bars.values()] == ["met", "met", "met", "not met", "met", "met", "not measured"]
    mnist = next(bar for bar in report.bars({"rows": rows, "floors": []}) if bar.name.startswith("cryptonets"))
    assert mnist.value == 1


def test_a_report_shows_rows_floors_and_machine(tmp_path: Path) -> None:
    floor = {"network": "rp", "engine": "vector", "floor_ms": 10.0, "parts": {"transforms": 7.5, "products": 2.5}}
    results = {
        "rows": [row("rp", "vector", 15.0), row("rp", "orion", 264.0)],
        "floors": [
            floor | {"slots": "real", "threads": 1, "batch": 1, "measured_ms": 15.0, "ratio": 1.5},
            floor | {"slots": "real", "threads": 2, "batch": 1, "measured_ms": 8.0, "ratio": 0.8},
        ],
        "skipped": [],
        "machine": engines.machine(),
        "versions": engines.versions(),
    }
    console = Console(record=True, width=150)
    report.show(results, console)
    text = console.export_text()
    assert "transforms" in text
    assert "1.5 ×" in text
    assert "15.0 (15.0, 15.0)" in text
    report.plot(results["rows"], tmp_path / "engines.png")
    assert (tmp_path / "engines.png").stat().st_size > 1000


@pytest.fixture
def command() -> typer.Typer:
    """Return the command line of the harness."""
    app = typer.Typer()
    app.command()(engines.main)
    return app


def test_the_command_writes_json_and_picture(
    command: typer.Typer, tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "make_case", lambda name, images: tiny)
    options = ["--network", "rp", "--engine", "seal", "--images", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(engines, "entries_for", lambda name, full: [ours("seal")])
    outcome = CliRunner().invoke(command, options)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "engines.json").read_text(encoding="utf-8"))
    assert set(written) == {"rows", "floors", "skipped", "machine", "versions"}
    assert {"cpu", "cores", "flags", "kernel"} <= set(written["machine"])
    assert [found["engine"] for found in written["rows"]] == ["seal"]
    assert (tmp_path / "engines.png").exists()


def test_an_unknown_engine_is_refused(command: typer.Typer, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(command, ["--engine", "abacus", "--out", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "abacus" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_quick_runs_leave_out_what_takes_minutes() -> None:
    quick = engines.entries_for("rp", full=False)
    assert {entry.family for entry in quick} == {"vector", "seal", *engines.SCRIPTS}
    assert all(entry.threads == 1 for entry in quick if entry.family in engines.SCRIPTS)
    assert not any(entry.engine == "throughput" for entry in engines.entries_for("leukaemia", full=False))
    assert any(entry.engine == "throughput" for entry in engines.entries_for("leukaemia", full=True))
