"""A study's networks as bundles, and under encryption: real, tiny, without held-out cells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hemacrypt.model.bundle import Bundle
from training.datasets import load_cells
from training.errors import DataError, RunError
from training.export import ROUNDING
from training.release import trained_subjects
from training.study.cli import app
from training.study.config import StudyConfig
from training.study.encrypt import encrypt_study
from training.study.export import calibration_of, export_trained, study_cells, trained_run
from training.study.results import EncryptedResult, collect
from training.study.runner import Study, run_study
from training.study.runs import RunFolder

MODELS = [
    {"name": "square", "family": "square", "architecture": "cryptonet", "options": {"hidden": 4}, "keep_weights": True},
    {"name": "forgotten", "family": "square", "architecture": "cryptonet", "protocols": ["image"]},
    {"name": "plain", "family": "ordinary", "architecture": "plain", "width": 0.1, "keep_weights": True},
    {"name": "lone", "family": "square", "architecture": "cryptonet", "protocols": ["heldout"], "keep_weights": True},
]
DEFAULTS = {"size": 32, "epochs": 1, "batch_size": 64}
WHOLE = {"name": "tiny", "folds": 3, "protocols": ["image", "grouped", "heldout"], "defaults": DEFAULTS}
SMALL = {"first_maps": 2, "inner_maps": 2}


def study() -> StudyConfig:
    models = [
        {"width": 0.2, **model} if model["family"] == "ordinary" else {**model, "options": {**SMALL, "hidden": 4}}
        for model in MODELS
    ]
    return StudyConfig.model_validate({**WHOLE, "models": models})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_arrays: Callable[[Path, int], Path]) -> Path:
    return write_arrays(tmp_path_factory.mktemp("data"), 160)


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study after --final, on synthetic cells."""
    folder = tmp_path_factory.mktemp("out")
    run_study(Study(study(), data, final=True), folder, command="hemacrypt study run tiny.toml")
    return folder


def call(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def fold(out: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The network of fold 1 as a bundle, by the command."""
    folder = tmp_path_factory.mktemp("bundles") / "fold"
    where = ["--protocol", "grouped", "--fold", 1, "--name", "mine"]
    printed = call("export", out, "square", *where, "--data", data, "--out", folder)
    assert "temperature" in printed
    assert "from Keras on the test images" in printed
    return Bundle.read(folder)


def test_a_bundle_gives_the_logits_of_its_run_divided_by_the_temperature(fold: Bundle, out: Path, data: Path) -> None:
    found, cells = RunFolder.of(out, "square", "grouped-1", 0).logits(), load_cells(data)
    rows = cells.rows_of(found.test_sha256.tolist(), "the test")
    logits = fold.network(fold.manifest.preprocessing.normalise(cells.images[rows]))
    temperature = fold.manifest.metrics["calibration"]["temperature"]
    assert temperature != 1
    np.testing.assert_allclose(logits * temperature, found.test_logits, atol=1e-4)
    assert fold.manifest.training["collapse_difference"] <= ROUNDING


def test_magnitudes_and_the_brightest_mean_are_those_of_the_train_part(fold: Bundle, out: Path, data: Path) -> None:
    found, cells = RunFolder.of(out, "square", "grouped-1", 0).logits(), load_cells(data)
    images = cells.images[cells.rows_of(found.train_sha256.tolist(), "the train part")]
    peaks = fold.network.calibrated(fold.manifest.preprocessing.normalise(images)).peaks
    for stored, measured in zip(fold.network.peaks, peaks, strict=True):
        np.testing.assert_allclose(stored, measured, rtol=1e-6)
    assert 0 < fold.manifest.preprocessing.largest_mean < 255


def test_the_temperature_is_that_of_the_cells_it_may_be_fitted_on(out: Path) -> None:
    results = collect(out)
    grouped = results.named("grouped", "square")
    assert grouped is not None
    assert grouped.temperatures is not None
    for number in range(3):
        found = calibration_of(results, trained_run(results, "square", "grouped", number))
        assert found.temperature == grouped.temperatures[grouped.folds == number][0]
        assert found.n == (grouped.folds != number).sum()
    heldout = calibration_of(results, trained_run(results, "square", "heldout"))
    assert heldout.n == len(grouped.labels)
    image = calibration_of(results, trained_run(results, "square", "image"))
    assert "split by image" in image.fitted_on


def test_the_manifest_has_the_studys_figures_and_says_who_was_trained_on(fold: Bundle, out: Path, data: Path) -> None:
    manifest, results = fold.manifest, collect(out)
    assert manifest.name == "mine"
    for protocol in ("image", "grouped", "heldout"):
        found = results.named(protocol, "square")  # type: ignore[arg-type]
        assert found is not None
        assert manifest.metrics[protocol]["auroc"] == found.figures.auroc
    assert set(manifest.metrics["baselines"]) == {"area", "colour"}
    assert set(manifest.metrics["differences"]) == {"model minus area", "model minus colour", "model minus plain"}
    cells = load_cells(data)
    train = cells.rows_of(RunFolder.of(out, "square", "grouped-1", 0).logits().train_sha256.tolist(), "the train part")
    assert trained_subjects(manifest.data) == set(cells.subjects[train].tolist())
    assert manifest.training["fold"] == 1
    assert "hemacrypt study run tiny.toml`, then `hemacrypt study export OUT square --protocol grouped" in fold.card
    assert "The one in this bundle is that of `grouped`, fold 1." in fold.card
    assert str(data) not in fold.manifest.text()


def test_without_final_nothing_is_said_of_held_out_cells(out: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    written = tmp_path / "out" / "study.config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"final": False}))
    where = ["--protocol", "image", "--data", data, "--out", tmp_path / "bundle"]
    call("export", tmp_path / "out", "square", *where)
    assert "heldout" not in Bundle.read(tmp_path / "bundle").manifest.metrics


def test_a_network_of_the_whole_pool_is_exported_without_held_out_cells(out: Path, data: Path, tmp_path: Path) -> None:
    cells = study_cells(data, 32)
    assert not cells.heldout.any()
    results = collect(out)
    bundle, _ = export_trained(results, trained_run(results, "square", "heldout"), cells, tmp_path / "b", "whole")
    assert bundle.manifest.data["parts"]["train"]["images"] == len(cells)
    assert not bundle.manifest.preprocessing.largest_mean > 255


@pytest.mark.parametrize(
    ("model", "protocol", "words"),
    [
        ("plain", "image", "'plain' is of family 'ordinary'; only square networks"),
        ("forgotten", "image", "set keep_weights = true for 'forgotten'"),
        ("forgotten", "grouped", "holds no finished run"),
        ("lone", "heldout", "let it run under 'grouped' first"),
        ("nobody", "image", "'nobody' is no model of the study"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    out: Path, data: Path, tmp_path: Path, model: str, protocol: str, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        call("export", out, model, "--protocol", protocol, "--data", data, "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_mean_over_symmetries_is_no_single_network(out: Path) -> None:
    results = collect(out)
    models = [model.model_copy(update={"symmetries": True}) for model in results.config.models]
    config = results.config.model_copy(update={"models": tuple(models)})
    written = results.written.model_copy(update={"config": config})
    with pytest.raises(RunError, match="averages its logits over eight images"):
        trained_run(type(results)(out, written, (), (), ()), "square", "image")


def test_other_data_is_refused(out: Path, tmp_path: Path, write_arrays: Callable[[Path, int], Path]) -> None:
    where = ["--protocol", "image", "--data", write_arrays(tmp_path, 100), "--out", tmp_path / "bundle"]
    with pytest.raises(DataError, match="of the train part are not in this data"):
        call("export", out, "square", *where)


# ---------------------------------------------------------------------------------------------- encrypted


def test_encrypted_results_come_into_the_report_and_stay(out: Path, data: Path) -> None:
    arguments = ["encrypt", out, "--data", data, "--model", "square", "--protocol", "image", "--limit", 3]
    printed = call(*arguments)
    assert "square-image-0-0: encrypted; 3 cells" in printed
    target = out / "encrypted" / "square-image-0-0.json"
    told = EncryptedResult.model_validate_json(target.read_bytes())
    bundle = Bundle.read(out / "bundles" / "square-image-0-0")
    assert told.digest == bundle.digest
    assert (told.cells, told.disagreements, told.scheme) == (3, 0, "ckks")
    assert told.largest_error is not None
    assert told.error_bound is not None
    assert 0 < told.largest_error <= told.error_bound
    found = collect(out).named("image", "square")
    assert found is not None
    assert found.encrypted is not None
    # On the scale of the run: not divided by the temperature that the report would divide by again.
    clear = found.logits[found.encrypted.rows]
    tolerance = told.error_bound * told.temperature + 1e-4
    np.testing.assert_allclose(found.encrypted.logits, clear, atol=tolerance)
    assert found.disagreements == 0
    assert "Under encryption, the same networks" in (out / "report.md").read_text()
    before = target.stat().st_mtime_ns
    assert "already there" in call(*arguments)
    assert target.stat().st_mtime_ns == before


def test_more_cells_are_another_evaluation(out: Path, data: Path) -> None:
    (one,) = encrypt_study(out, data, ["square"], ["image"], limit=4, pairs=True)
    assert one.status == "encrypted"
    assert one.words.startswith("4 cells")
    told = EncryptedResult.model_validate_json((out / "encrypted" / "square-image-0-0.json").read_bytes())
    assert told.engine == "vector, pairs"
    (two,) = encrypt_study(out, data, ["square"], ["image"], limit=2)
    assert two.status == "already there"


def test_a_run_that_cannot_be_evaluated_does_not_stop_the_others(out: Path, data: Path) -> None:
    outcomes = {one.run: one for one in encrypt_study(out, data, ["lone", "square"], ["heldout"], limit=2)}
    assert outcomes["lone-heldout-0-0"].status == "failed"
    assert "let it run under 'grouped' first" in outcomes["lone-heldout-0-0"].words
    assert outcomes["square-heldout-0-0"].status == "encrypted"


def test_encrypted_logits_of_a_run_that_was_replaced_are_refused(out: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    encrypt_study(tmp_path / "out", data, ["square"], ["image"], limit=2)
    path = tmp_path / "out" / "encrypted" / "square-image-0-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "another"}))
    with pytest.raises(RunError, match="of a run that was replaced since; call `hemacrypt study encrypt` again"):
        collect(tmp_path / "out")
    assert collect(tmp_path / "out", with_encrypted=False).named("image", "square") is not None


def test_without_a_kept_network_there_is_nothing_to_encrypt(out: Path, data: Path) -> None:
    with pytest.raises(RunError, match="set keep_weights = true for 'forgotten'"):
        encrypt_study(out, data, ["forgotten"])
    with pytest.raises(RunError, match="'plain' is of family 'ordinary'"):
        encrypt_study(out, data, ["plain"])
