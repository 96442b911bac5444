"""Real, tiny studies: what is run, what is passed over, and what is never looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.datasets import load_cells
from training.errors import RunError
from training.study import learners, runner
from training.study.config import StudyConfig, read_study, shipped
from training.study.learners import check
from training.study.results import collect
from training.study.runner import Study, run_study
from training.study.runs import RESULT, RunFolder
from training.study.teaching import Learned, Lesson

PLAIN = {"name": "plain", "family": "ordinary", "architecture": "plain", "width": 0.1}
SQUARE = {"name": "square", "family": "square", "architecture": "cryptonet", "width": 0.2, "teachers": ["plain"]}
SVM = {"name": "svm", "family": "svm", "architecture": "rbf", "features": "plain"}


def config(*models: dict[str, Any], **more: Any) -> StudyConfig:
    given = {"name": "tiny", "folds": 2, "defaults": {"size": 32, "epochs": 1, "batch_size": 64}, **more}
    return StudyConfig.model_validate({**given, "models": list(models)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_arrays: Callable[[Path, int], Path]) -> Path:
    return write_arrays(tmp_path_factory.mktemp("data"), 144)


WHOLE = config(PLAIN, SQUARE, SVM, protocols=["image", "grouped", "heldout"])


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run without --final."""
    folder = tmp_path_factory.mktemp("out")
    outcomes = run_study(Study(WHOLE, data), folder)
    assert {outcome.status for outcome in outcomes} == {"finished"}
    assert len(outcomes) == 5 * 3
    return folder


def test_a_run_leaves_logits_history_and_what_made_it(out: Path, data: Path) -> None:
    folder = RunFolder.of(out, "square", "grouped-1", 0)
    result, found = folder.result(), folder.logits()
    assert (result.model, result.fold, result.status, result.epochs) == ("square", 1, "finished", 1)
    assert result.multiply_adds > 0 < result.parameters
    assert result.device == "CPU"
    assert "tensorflow" in result.versions
    assert found.test_logits.shape == (result.n_test, 2)
    assert found.train_logits.dtype == np.float64
    assert set(folder.history()) >= {"loss", "accuracy", "test_accuracy", "cross_entropy", "test_cross_entropy"}
    assert folder.config()["digest"] == result.digest
    cells = load_cells(data)
    labels = dict(zip(cells.sha256.tolist(), cells.labels.tolist(), strict=True))
    assert found.test_labels.tolist() == [labels[digest] for digest in found.test_sha256.tolist()]
    assert list((out / "tensorboard" / "square" / "grouped-1" / "seed-0").glob("events.out.tfevents.*"))


def test_held_out_cells_are_not_touched_without_final(out: Path, data: Path, tmp_path: Path) -> None:
    cells = load_cells(data)
    held = set(cells.sha256[cells.final].tolist())
    assert held
    assert not list(out.glob("runs/*/heldout-*"))
    for path in out.glob("runs/*/*/*/logits.npz"):
        found = RunFolder(path.parent).logits()
        assert not held & {*found.train_sha256.tolist(), *found.test_sha256.tolist()}
    # What happens to be in them makes no difference: all runs are those of before.
    with np.load(data / "cnmc_32.npz") as archive:
        arrays = dict(archive)
    arrays["images"][cells.heldout] = 0
    arrays["images"][cells.heldout, 0, 0, 0] = np.arange(cells.heldout.sum())
    np.savez(tmp_path / "cnmc_32.npz", **arrays)
    seen, other = Study(WHOLE, data), Study(WHOLE, tmp_path)
    assert [other.digest(job) for job in other.jobs] == [seen.digest(job) for job in seen.jobs]
    assert all((a.images == b.images).all() for a, b in zip(seen.cells.values(), other.cells.values(), strict=True))


def test_final_adds_the_held_out_cells_and_nothing_else(out: Path, data: Path) -> None:
    small = Study(WHOLE, data, final=True, only=["plain"])
    statuses = {outcome.job.division.name: outcome.status for outcome in run_study(small, out)}
    assert statuses == {
        "image-0": "already there",
        "grouped-0": "already there",
        "grouped-1": "already there",
        "heldout-0": "finished",
    }
    cells = load_cells(data)
    found = RunFolder.of(out, "plain", "heldout-0", 0)
    assert set(found.logits().test_sha256.tolist()) == set(cells.sha256[cells.final].tolist())
    assert not any(name.startswith("test_") for name in found.history())  # no curve on them


def test_a_process_can_do_its_part_of_the_divisions(data: Path, tmp_path: Path) -> None:
    study = config(PLAIN, SQUARE, protocols=["image", "grouped"])
    run_study(Study(study, data, divisions=["grouped-1"]), tmp_path)
    assert {path.parent.parent.name for path in tmp_path.glob(f"runs/*/*/*/{RESULT}")} == {"grouped-1"}
    both = Study(study, data, divisions=["grouped-1", "image-0"])
    statuses = {outcome.job.words: outcome.status for outcome in run_study(both, tmp_path)}
    assert len(statuses) == 8  # two models and two baselines
    assert all((status == "finished") == ("image-0" in words) for words, status in statuses.items())
    with pytest.raises(RunError, match=r"no divisions \['heldout-0'\]; it has \['grouped-0', 'grouped-1', 'image-0'\]"):
        Study(study, data, divisions=["image-0", "heldout-0"])


def test_the_students_soft_targets_are_the_teachers_mean(data: Path, tmp_path: Path, out: Path) -> None:
    study = Study(config({**PLAIN, "seeds": [0, 1]}, SQUARE, protocols=["image"]), data, only=["square"])
    student = next(job for job in study.jobs if job.model.name == "square")
    taught = [RunFolder.of(out, "plain", "image-0", 0).logits()]
    taught.append(taught[0].__class__(**{**vars(taught[0]), "train_logits": taught[0].train_logits + 1}))
    for seed, logits in enumerate(taught):
        folder = RunFolder.of(tmp_path, "plain", "image-0", seed)
        folder.begin({})
        folder.write_logits(logits)
    soft = runner._soft(study, student, tmp_path)
    assert soft is not None
    np.testing.assert_allclose(soft, taught[0].train_logits + 0.5)


def _times(out: Path) -> dict[str, int]:
    return {str(path.parent): path.stat().st_mtime_ns for path in out.glob(f"runs/*/*/*/{RESULT}")}


def test_an_interrupted_study_goes_on_where_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = config(PLAIN, SVM, protocols=["grouped"])

    def interrupted(lesson: Lesson) -> Learned:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(learners.LEARNERS, "svm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(Study(study, data), tmp_path)
    before = _times(tmp_path)
    assert len(before) == 2  # both folds of `plain`
    half = RunFolder.of(tmp_path, "svm", "grouped-0", 0)
    assert half.path.is_dir()
    assert not half.finished
    (half.path / "rubbish").write_text("of the run that was killed")
    statuses = [outcome.status for outcome in run_study(Study(study, data), tmp_path)]
    assert statuses.count("already there") == 2
    assert statuses.count("finished") == 6
    assert before.items() <= _times(tmp_path).items()
    assert not (half.path / "rubbish").exists()


def test_a_changed_configuration_is_refused_and_redone_only_when_told(data: Path, tmp_path: Path) -> None:
    square = {**SQUARE, "teachers": []}
    one, other = (config({**square, "weight_decay": decay}, protocols=["image"]) for decay in (0.1, 0.2))
    run_study(Study(one, data, only=["square"]), tmp_path)
    folder = RunFolder.of(tmp_path, "square", "image-0", 0)
    first = folder.logits().test_logits
    assert not (folder.path / "model.keras").exists()
    with pytest.raises(RunError, match="finished run of another configuration, other data or other teachers; add"):
        run_study(Study(other, data, only=["square"]), tmp_path)
    np.testing.assert_array_equal(folder.logits().test_logits, first)
    # The same again is the same to the bit; something else is not.
    run_study(Study(one, data, only=["square"]), tmp_path, again=True)
    np.testing.assert_array_equal(folder.logits().test_logits, first)
    run_study(Study(other, data, only=["square"]), tmp_path, again=True)
    assert (folder.logits().test_logits != first).any()
    with pytest.raises(RunError, match="holds the study 'tiny', not 'other'"):
        run_study(Study(other.model_copy(update={"name": "other"}), data), tmp_path, again=True)


def test_to_redo_a_student_is_not_to_redo_its_teacher(data: Path, tmp_path: Path) -> None:
    study = Study(config(PLAIN, SQUARE, protocols=["image"]), data, only=["square"])
    run_study(study, tmp_path)
    statuses = {outcome.job.model.name: outcome.status for outcome in run_study(study, tmp_path, again=True)}
    assert statuses == {"plain": "already there", "square": "finished"}


def test_teachers_and_data_are_part_of_the_digest(data: Path, tmp_path: Path, write_arrays: Any) -> None:
    def digest(plain: dict[str, Any], folder: Path) -> str:
        study = Study(config(plain, SQUARE), folder)
        return study.digest(next(job for job in study.jobs if job.model.name == "square"))

    before = digest(PLAIN, data)
    assert digest(PLAIN, data) == before
    assert digest({**PLAIN, "epochs": 2}, data) != before
    assert digest({**PLAIN, "seeds": [0, 1]}, data) != before
    assert digest(PLAIN, write_arrays(tmp_path, 160)) != before


def test_a_diverged_run_is_recorded_and_its_students_do_not_run(data: Path, tmp_path: Path) -> None:
    wild = {"name": "wild", "family": "square", "architecture": "cryptonet", "learning_rate": 1e30, "epochs": 2}
    study = config({**wild, "width": 0.2}, {**SQUARE, "teachers": ["wild"]}, protocols=["image"])
    statuses = {outcome.job.model.name: outcome for outcome in run_study(Study(study, data), tmp_path)}
    assert statuses["wild"].status == "diverged"
    assert statuses["square"].status == "blocked"
    assert "wild, image-0, seed 0 has no logits to learn from" in statuses["square"].reason
    found = RunFolder.of(tmp_path, "wild", "image-0", 0)
    assert found.result().status == "diverged"
    assert not (found.path / "logits.npz").exists()
    missing = {gap.run: gap.why for gap in collect(tmp_path).missing}
    assert missing["wild, image-0, seed 0"].startswith("diverged")
    assert missing["square, image-0, seed 0"] == "not run"
    again = {outcome.job.model.name: outcome.status for outcome in run_study(Study(study, data), tmp_path)}
    assert again["wild"] == "already there"  # it would only diverge again


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({**PLAIN, "architecture": "lenet"}, "'plain': there is no 'lenet' of family 'ordinary'; choose one of plain"),
        ({**PLAIN, "options": {"depth": 3}}, "'plain' does not take the options"),
        ({**SQUARE, "teachers": [], "options": {"hidden": 65}}, "'square': 'cryptonet' does not take"),
        ({**SQUARE, "teachers": [], "architecture": "plain"}, "no 'plain' of family 'square'"),
    ],
)
def test_a_mistake_shows_before_anything_is_trained(model: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError, match=words):
        check(config(model))


@pytest.mark.parametrize("name", shipped())
def test_networks_of_shipped_studies_can_be_built_and_suit_a_laptop(name: str) -> None:
    costs = check(read_study(name))
    assert max(costs.values()) < 6e7
    assert costs["area"] == 0


def test_no_name_of_a_host_is_written(out: Path) -> None:
    import platform

    for path in out.glob("runs/*/*/*/*.json"):
        assert f'"{platform.node()}"' not in json.dumps(json.loads(path.read_text()))
    assert runner.machine().endswith(" cores")
