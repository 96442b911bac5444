"""The commands train, export and evaluate, on a small slice, as a user calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hemacrypt import DISCLAIMER
from hemacrypt.cli import main
from hemacrypt.errors import BundleError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.preprocess import ArrayPreprocessing
from tests.large import write_large_bundle
from training import cli
from training.datasets import PROTOCOL_WORDS, Split, load_cells
from training.errors import CollapseError, DataError, RunError
from training.export import ROUNDING


def call(*words: object) -> str:
    """Run one command and return what it printed, with line breaks made blanks."""
    app = typer.Typer()
    for command in (cli.train, cli.export, cli.evaluate):
        app.command()(command)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def run(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "image"
    printed = call("train", "--data", arrays, "--protocol", "image", "--epochs", 2, "--out", folder)
    assert PROTOCOL_WORDS["image"] in printed
    assert "epoch 2" in printed
    assert DISCLAIMER in printed
    return folder


@pytest.fixture(scope="module")
def bundle(run: Path, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    printed = call("export", run, "--data", arrays, "--out", folder, "--name", "tiny")
    assert "conv 4×4/2 3→16" in printed
    return folder


def test_a_run_leaves_model_figures_curves_settings_and_split(run: Path, arrays: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "curves.png",
        "metrics.json",
        "model.keras",
        "settings.json",
        "split.json",
    ]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["protocol_in_words"] == PROTOCOL_WORDS["image"]
    assert set(metrics["parts"]) == {"train", "validation", "test"}
    assert all(part["protocol"] == PROTOCOL_WORDS["image"] for part in metrics["parts"].values())
    assert len(metrics["history"]["loss"]) == 2
    assert metrics["parts"]["test"]["n"] == len(Split.read(run).parts["test"])
    assert json.loads((run / "settings.json").read_text())["epochs"] == 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    cells = load_cells(arrays)
    used = np.concatenate([Split.read(run).rows(cells, "train"), Split.read(run).rows(cells, "validation")])
    assert metrics["data_fingerprint"] == cells.fingerprint(used)


def test_the_bundle_carries_settings_provenance_and_figures(bundle: Path, run: Path) -> None:
    manifest = Bundle.read(bundle).manifest
    assert manifest.name == "tiny"
    assert manifest.labels == ("normal", "leukaemic")
    assert manifest.training["epochs"] == 2
    assert manifest.training["collapse_difference"] <= ROUNDING
    assert manifest.data["protocol_in_words"] == PROTOCOL_WORDS["image"]
    parts = json.loads((run / "metrics.json").read_text())["parts"]
    assert {name: values for name, values in manifest.metrics.items() if name in parts} == parts
    assert set(manifest.metrics) == {*parts, "margins", "left_out"}
    assert 0 < manifest.metrics["margins"]["0.01"] <= manifest.metrics["margins"]["0.5"]


def test_the_bundle_carries_a_card_with_the_figures_of_the_run(bundle: Path, run: Path) -> None:
    card = Bundle.read(bundle).card
    assert card.startswith("# Model card: tiny")
    test = json.loads((run / "metrics.json").read_text())["parts"]["test"]
    assert f"{test['auroc']:.3f} ({test['intervals']['auroc'][0]:.3f} to" in card
    assert PROTOCOL_WORDS["image"] in card


@pytest.mark.parametrize("name", ["Bad Name", "", "../up"])
def test_a_name_that_cannot_be_one_is_a_sentence_and_leaves_nothing(
    run: Path,
    arrays: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["export", str(run), "--data", str(arrays), "--out", str(tmp_path / "bundle"), "--name", name]
    monkeypatch.setattr("sys.argv", ["hemacrypt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: name {name!r} cannot be one")
    assert list(tmp_path.iterdir()) == []


def test_magnitudes_are_those_of_the_training_cells_alone(bundle: Path, run: Path, arrays: Path) -> None:
    read, cells = Bundle.read(bundle), load_cells(arrays)
    rows = Split.read(run).rows(cells, "train")
    peaks = read.network.calibrated(read.manifest.preprocessing.normalise(cells.images[rows])).peaks
    for stored, measured in zip(read.network.peaks, peaks, strict=True):
        np.testing.assert_allclose(stored, measured, rtol=1e-6)


def test_evaluate_gives_the_figures_of_training(bundle: Path, run: Path, arrays: Path, tmp_path: Path) -> None:
    printed = call("evaluate", bundle, "--data", arrays, "--split", run, "--out", tmp_path / "figures.json")
    assert DISCLAIMER in printed
    assert PROTOCOL_WORDS["image"] in printed
    found = json.loads((tmp_path / "figures.json").read_text())
    trained = json.loads((run / "metrics.json").read_text())["parts"]["test"]
    assert found["accuracy"] == trained["accuracy"]
    assert found["auroc"] == pytest.approx(trained["auroc"])
    assert found["digest"] == Bundle.read(bundle).digest


def test_evaluate_on_held_out_subjects_and_on_the_embedded_cells(bundle: Path, arrays: Path, tmp_path: Path) -> None:
    call("evaluate", bundle, "--data", arrays, "--split", "heldout", "--limit", 10, "--out", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["n"] == 10
    assert found["protocol"].startswith("held-out subjects")
    call("evaluate", bundle, "--out", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["n"] == 180


def test_evaluate_takes_a_bundle_of_the_zoo_and_one_for_64_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_large_bundle(tmp_path / "large")
    for named in ("balanced", "large"):
        call("evaluate", named, "--out", "figures.json")
        found = json.loads((tmp_path / "figures.json").read_text())
        assert found["n"] == 180
        assert 0 < found["sensitivity"] < 1


def test_the_subject_protocol_looks_at_held_out_cells_only_when_told(
    tmp_path: Path, write_arrays: Callable[[Path, int], Path]
) -> None:
    data = write_arrays(tmp_path, 80)
    settings = tmp_path / "settings.json"
    settings.write_text('{"epochs": 1, "first_maps": 2, "inner_maps": 2, "hidden": 2, "split_seed": 1}')

    def parts(*more: str) -> set[str]:
        call("train", "--data", data, "--settings", settings, "--out", tmp_path / "run", *more)
        return set(json.loads((tmp_path / "run" / "metrics.json").read_text())["parts"])

    assert parts() == {"train", "validation"}
    assert parts("--final") == {"train", "validation", "test"}


def test_a_model_that_does_not_agree_is_not_exported(
    run: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.export.ROUNDING", 1e-12)  # float32 cannot reach this
    with pytest.raises(CollapseError, match="differ by"):
        call("export", run, "--data", arrays, "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_export_refuses_other_data_and_incomplete_runs(
    run: Path, arrays: Path, tmp_path: Path, write_arrays: Callable[[Path, int], Path]
) -> None:
    with pytest.raises(RunError, match=r"cannot read .*settings\.json"):
        call("export", tmp_path, "--data", arrays, "--out", tmp_path / "bundle")
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "model.keras").unlink()
    with pytest.raises(RunError, match=r"model\.keras is missing"):
        call("export", copy, "--data", arrays, "--out", tmp_path / "bundle")
    with pytest.raises(DataError, match="not in this data"):
        call("export", run, "--data", write_arrays(tmp_path, 100), "--out", tmp_path / "bundle")


def test_export_refuses_a_model_of_another_family(run: Path, arrays: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(2), keras.layers.ReLU(name="act")]
    ).save(copy / "model.keras")
    with pytest.raises(CollapseError, match="'act' is ReLU"):
        call("export", copy, "--data", arrays, "--out", tmp_path / "bundle")


def test_evaluate_refuses_what_is_no_run_and_no_bundle(bundle: Path, arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no folder of a run"):
        call("evaluate", bundle, "--data", arrays, "--split", tmp_path / "nothing")
    with pytest.raises(BundleError):
        call("evaluate", tmp_path)


def test_the_commands_load_without_tensorflow() -> None:
    code = "import training.cli, sys; sys.exit(bool({'tensorflow', 'keras', 'sklearn', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_bundle_that_reads_arrays_is_not_measured_on_cells(tmp_path: Path) -> None:
    network = CollapsedNetwork((1, 2, 2), (Dense(np.ones((2, 4)), np.zeros(2)),))
    bundle = Bundle.create(network, name="arrays", labels=("a", "b"), preprocessing=ArrayPreprocessing(shape=(1, 2, 2)))
    bundle.write(tmp_path / "bundle")
    with pytest.raises(RunError, match=r"'arrays' reads arrays of shape \(1, 2, 2\), not cells"):
        call("evaluate", tmp_path / "bundle")
