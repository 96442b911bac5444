"""Reports out of known logits: every number can be worked out beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemacrypt import DISCLAIMER
from training.calibration import cross_fitted, fit_temperature
from training.errors import RunError
from training.evaluate import calibration_error, figures, paired_difference
from training.study.config import StudyConfig
from training.study.report import write_report
from training.study.results import collect
from training.study.runs import STUDY, RunFolder, RunLogits, RunResult, write_json

N = 120
LABELS = (np.arange(N) % 2).astype(np.uint8)
SUBJECTS = np.array([f"{'' if label else 'H'}{i // 2 % 10}" for i, label in enumerate(LABELS)])
SHA256 = np.array([f"{i:064x}" for i in range(N)])
# How well a model tells the labels apart; seed 1 of `good` is better than its seed 0, and not chosen for that.
STRENGTH = {"good": 1.5, "poor": 0.5, "net": 2.0, "other-net": 1.0, "area": 0.3, "colour": 0.1}
FOLD = (np.arange(N) // 2 % 10 >= 5).astype(np.intp)


def logits_of(model: str, seed: int = 0, shift: float = 0.0) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng([sum(model.encode()), seed])
    score = rng.normal(size=N) * 2 + (LABELS * 2.0 - 1) * (STRENGTH[model] + seed) + shift
    return np.stack([-score / 2, score / 2], axis=1)


def write_run(out: Path, model: str, division: str, rows: Any, seed: int = 0, status: Any = "finished") -> None:
    protocol, fold = division.split("-")
    folder = RunFolder.of(out, model, division, seed)
    folder.begin({"model": model})
    logits = logits_of(model, seed)
    folder.write_logits(
        RunLogits(logits[:0], SHA256[:0], logits[rows], SHA256[rows], LABELS[rows], SUBJECTS[rows], SUBJECTS[rows])
    )
    result = RunResult.model_validate(
        {
            **{"model": model, "protocol": protocol, "fold": int(fold), "seed": seed, "digest": "", "status": status},
            **{"reason": "nan" if status == "diverged" else "", "protocol_in_words": f"words of {protocol}"},
            **{"weights": "from scratch", "n_train": 1, "n_test": 1, "epochs": 3, "seconds": 36.0, "parameters": 7},
            **{"multiply_adds": 8, "machine": "processor, 2 cores", "device": "CPU", "versions": {}},
            "peak_memory_mb": None,
        }
    )
    curve = {"loss": [3.0, 2.0, 1.0], "cross_entropy": [3.0, 2.0, 1.0], "accuracy": [0.5, 0.6, 0.7]}
    folder.finish(result, {} if model in ("area", "colour") else curve)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    family = {"good": "square", "poor": "square", "net": "ordinary", "other-net": "ordinary"}
    models = [
        {"name": name, "family": kind, "architecture": "x", "seeds": [0, 1, 2] if name == "good" else [0]}
        for name, kind in family.items()
    ]
    study = StudyConfig.model_validate(
        {"name": "known", "folds": 2, "protocols": ["image", "grouped", "heldout"], "models": models}
    )
    write_json(folder / STUDY, {"command": "make it", "final": True, "config": study.model_dump(mode="json")})
    for model in STRENGTH:
        for division, rows in (
            ("image-0", np.arange(N)),
            ("grouped-0", np.flatnonzero(FOLD == 0)),
            ("grouped-1", np.flatnonzero(FOLD == 1)),
            ("heldout-0", np.arange(N)),
        ):
            for seed in (0, 1, 2) if model == "good" else (0,):
                if (model, division) != ("other-net", "grouped-1"):
                    write_run(folder, model, division, rows, seed, "diverged" if seed == 2 else "finished")
    (folder / "encrypted").mkdir()
    for model, shift, milliseconds in (("good", 0.4, 20.0), ("poor", 0.0, 10.0)):
        order = np.random.default_rng(0).permutation(N)
        encrypted = logits_of(model, shift=shift)[order]
        np.savez(folder / "encrypted" / f"{model}.npz", logits=encrypted, sha256=SHA256[order])
        content = {"model": model, "protocol": "image", "logits": f"{model}.npz", "milliseconds": milliseconds}
        (folder / "encrypted" / f"{model}.json").write_text(json.dumps(content))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "study.json").read_text())
    return content


def test_the_summary_holds_what_the_bars_are_measured_on(summary: dict[str, Any]) -> None:
    expected = figures(logits_of("good"), LABELS, SUBJECTS, "w")
    best = summary["subject_disjoint"]["best_square"]
    assert best["model"] == "good"
    for metric in ("auroc", "sensitivity", "specificity", "accuracy", "weighted_f1", "subject_auroc"):
        assert best[metric]["value"] == pytest.approx(getattr(expected, metric))
        assert best[metric]["interval"] == pytest.approx(expected.intervals[metric])
    assert summary["subject_disjoint"]["best_ordinary"]["model"] == "net"
    assert summary["subject_disjoint"]["protocol"] == "words of grouped"
    assert summary["disclaimer"] == DISCLAIMER
    assert (summary["command"], summary["machines"]) == ("make it", ["processor, 2 cores; TensorFlow on CPU"])


def test_calibration_uses_no_cell_of_its_own(summary: dict[str, Any]) -> None:
    logits = logits_of("good")
    crossed = calibration_error(logits / cross_fitted(logits, LABELS, FOLD)[:, None], LABELS)
    assert summary["subject_disjoint"]["best_square"]["ece"]["value"] == pytest.approx(crossed)
    assert summary["subject_disjoint"]["best_square"]["ece_before_scaling"] == pytest.approx(
        calibration_error(logits, LABELS)
    )
    held = calibration_error(logits / fit_temperature(logits, LABELS), LABELS)
    assert summary["held_out"]["best_square"]["ece"]["value"] == pytest.approx(held)


def test_differences_are_paired(summary: dict[str, Any]) -> None:
    for name, other in (("ordinary", "net"), ("area", "area"), ("colour", "colour")):
        expected = paired_difference(logits_of("good"), logits_of(other), LABELS, SUBJECTS)
        found = summary["subject_disjoint"]["differences"][f"square_minus_{name}"]["auroc"]
        assert found["value"] == pytest.approx(expected.values["auroc"])
        assert found["interval"] == pytest.approx(expected.intervals["auroc"])


def test_encrypted_logits_are_matched_by_digest(summary: dict[str, Any]) -> None:
    clear, encrypted = logits_of("good"), logits_of("good", shift=0.4)
    found = summary["image_split"]["best_square_encrypted"]
    expected = figures(encrypted, LABELS, SUBJECTS, "w")
    assert (found["model"], found["n"], found["milliseconds"]) == ("good", N, 20.0)
    assert found["accuracy"] == pytest.approx(expected.accuracy)
    assert found["auroc"] == pytest.approx(expected.auroc)
    flipped = int(((clear[:, 1] > clear[:, 0]) != (encrypted[:, 1] > encrypted[:, 0])).sum())
    assert found["disagreements"] == flipped > 0
    assert "best_square_encrypted" not in summary["subject_disjoint"]


def test_what_did_not_run_or_diverged_is_named(out: Path, summary: dict[str, Any]) -> None:
    assert "good, image-0, seed 2: diverged: nan" in summary["missing"]
    assert "other-net, grouped-1, seed 0: not run" in summary["missing"]
    text = (out / "report.md").read_text()
    assert "- other-net, grouped-1, seed 0: not run" in text
    # A model with a fold missing is in no pooled table.
    assert "`other-net`" not in text.split("## Grouped")[1].split("## Held-out")[0]
    assert "| 2 of 3 | 1 |" in text  # seeds of `good`: finished, diverged


def test_the_report_says_what_its_figures_mean(out: Path) -> None:
    text = (out / "report.md").read_text()
    for words in (DISCLAIMER, "Words of image", "Words of grouped", "Words of heldout", "`make it`", "processor"):
        assert words in text
    for section in ("## Split by image", "## Grouped", "## Held-out"):
        part = text.split(section)[1].split("\n## ")[0]
        assert "`area`" in part
        assert "`colour`" in part
    runs = len(list(out.glob("runs/*/*/*/result.json")))
    assert f"{runs} runs together: {runs * 36 / 3600:.2f} hours" in text
    for picture in ("curves.png", "bars.png", "roc.png", "reliability.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert f"]({picture})" in text


def test_the_csv_has_a_line_for_every_seed(out: Path) -> None:
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    good = [line for line in lines if (line["model"], line["protocol"]) == ("good", "grouped")]
    assert [line["seed"] for line in good] == ["0", "1"]
    for line in good:
        expected = figures(logits_of("good", int(line["seed"])), LABELS, SUBJECTS, "w")
        assert float(line["auroc"]) == pytest.approx(expected.auroc, abs=1e-6)
        assert float(line["auroc_low"]) == pytest.approx(expected.intervals["auroc"][0], abs=1e-6)


def test_nothing_is_chosen_on_held_out_cells(out: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(out, tmp_path / "copy")
    held = RunFolder.of(copy, "poor", "heldout-0", 0)
    better = held.logits()
    perfect = np.stack([1 - LABELS, LABELS], axis=1).astype(np.float64) * 9
    held.write_logits(RunLogits(**{**vars(better), "test_logits": perfect}))
    results = collect(copy)
    chosen, poor = results.best("heldout", "square"), results.named("heldout", "poor")
    assert chosen is not None
    assert poor is not None
    assert poor.figures.auroc == 1 > chosen.figures.auroc
    assert chosen.model.name == "good"


def test_broken_folders_are_refused_in_words(out: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read .*study\.config\.json"):
        write_report(tmp_path)
    wrong = out / "encrypted" / "wrong.json"
    wrong.write_text('{"model": "good", "protocol": "grouped", "logits": "no.npz", "milliseconds": 1}')
    try:
        with pytest.raises(RunError, match="names logits that cannot be read"):
            collect(out)
        np.savez(out / "encrypted" / "no.npz", logits=np.zeros((1, 2)), sha256=np.array(["f" * 64]))
        with pytest.raises(RunError, match="no cell tested under grouped"):
            collect(out)
        wrong.write_text("{}")
        with pytest.raises(RunError, match="is no encrypted result"):
            collect(out)
    finally:
        wrong.unlink()
