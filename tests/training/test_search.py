"""The search: what is tried, what is refused before it is trained, and going on; the front against brute force."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from training.datasets import load_cells
from training.errors import DataError, RunError
from training.pareto import ZOO, Tried, front, write_pareto, zoo
from training.search import JOURNAL, Search, SearchConfig, read_search
from training.study.cli import app
from training.study.config import StudyConfig
from training.study.learners import check
from training.study.runner import Study, run_study
from training.study.runs import RunFolder

SMALL: dict[str, Any] = {
    "name": "tiny",
    "folds": 2,
    "epochs": 1,
    "training": {"learning_rate": 2e-3},
    "space": {
        "size": [32],
        "first_maps": [8],
        "kernel": [4, 8],
        "stride": [4],
        "inner_maps": [0, 8],
        "pool": [1, 2],
        "hidden": [8],
    },
}


def config(**more: Any) -> SearchConfig:
    return SearchConfig.model_validate({**SMALL, **more})


def one(number: int, auroc: float | None, ms: float | None, status: Any = "trained") -> Tried:
    model = {
        "architecture": "symmetric",
        "size": 32,
        "options": {"hidden": 8 * number, "activation": "quadratic", "whitened": True},
    }
    return Tried(number, status, "" if auroc else "too dear", model, auroc, ms, ms, 8192, 1.0, 1e-4, 2)


# ---------------------------------------------------------------------------------------------- the front


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few different values: many ties in one objective, some in both.
    tried = [one(n, auroc / 10, float(ms)) for n, (auroc, ms) in enumerate(rng.integers(1, 9, (25, 2)).tolist())]

    def dominated(this: Tried) -> bool:
        assert this.point is not None
        auroc, ms = this.point
        others = [other.point for other in tried if other.point is not None]
        return any(a >= auroc and m <= ms and (a, m) != (auroc, ms) for a, m in others)

    found = front(tried)
    assert {t.number for t in found} == {t.number for t in tried if not dominated(t)}
    assert [t.ms for t in found] == sorted(t.ms for t in found if t.ms is not None)


def test_trials_without_result_are_on_no_front() -> None:
    assert front([one(0, None, None, "refused"), one(1, None, None, "diverged")]) == []
    assert zoo([one(0, None, None, "refused")]) == {}
    assert [t.number for t in front([one(0, None, None, "refused"), one(1, 0.6, 9.0)])] == [1]


def test_names_are_given_by_the_rule() -> None:
    along = [one(0, 0.80, 5.0), one(1, 0.932, 8.0), one(2, 0.945, 13.0), one(3, 0.950, 40.0), one(4, 0.94, 60.0)]
    assert {name: found.number for name, found in zoo(along).items()} == {"fast": 1, "balanced": 2, "accurate": 3}
    alone = zoo([one(7, 0.9, 1.0)])
    assert list(alone) == list(ZOO)
    assert {found.number for found in alone.values()} == {7}


def test_tables_and_models_of_a_study_are_written(tmp_path: Path) -> None:
    tried = [one(0, 0.80, 5.0), one(1, None, None, "refused"), one(2, 0.95, 13.0)]
    write_pareto(tried, tmp_path, {"name": "tiny", "command": "`a command`"})
    rows = list(csv.DictReader((tmp_path / "pareto.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["trial"], row["status"], row["front"], row["auroc"], row["reason"]) for row in rows] == [
        ("0", "trained", "1", "0.8", ""),
        ("1", "refused", "0", "", "too dear"),
        ("2", "trained", "1", "0.95", ""),
    ]
    assert rows[2]["zoo"] == "fast balanced accurate"
    written = json.loads((tmp_path / "pareto.json").read_text())
    assert [point["number"] for point in written["front"]] == [0, 2]
    assert {name: point["number"] for name, point in written["zoo"].items()} == dict.fromkeys(ZOO, 2)
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "pareto.md").read_text()
    assert "2 trained, 1 refused, 0 diverged" in text
    models = tomllib.loads(text.split("```toml\n")[1].split("```")[0])["models"]
    study = StudyConfig.model_validate({"name": "from-search", "models": models})
    assert [model.name for model in study.models[:3]] == list(ZOO)
    assert check(study)["fast"] > 0


def test_a_search_that_trained_nothing_says_so(tmp_path: Path) -> None:
    write_pareto([one(0, None, None, "refused")], tmp_path, {"name": "tiny"})
    assert "Nothing was trained" in (tmp_path / "pareto.md").read_text()
    assert not (tmp_path / "pareto.png").exists()


# ---------------------------------------------------------------------------------------------- the search


@pytest.fixture(scope="module")
def out(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of three trials, interrupted after two."""
    folder = tmp_path_factory.mktemp("search")
    for trials in (2, 3):
        search = Search(config(), arrays, folder)
        search.run(trials)
        search.report()
    return folder


def test_trials_are_measured_and_planned(out: Path) -> None:
    rows = list(csv.DictReader((out / "pareto.csv").read_text(encoding="utf-8").splitlines()))
    trained = [row for row in rows if row["status"] == "trained"]
    assert trained
    for row in trained:
        assert 0 <= float(row["auroc"]) <= 1
        assert float(row["ms"]) > 0 < float(row["planned_ms"])
        assert row["squares"] == ("2" if row["inner_maps"] == "0" else "3")
        # A third square needs a larger chain.
        assert row["degree"] == ("8192" if row["inner_maps"] == "0" else "16384")
    written = json.loads((out / "pareto.json").read_text())
    assert "final ones come from studies" in written["about"]["AUROC"]
    assert written["front"]


def test_a_search_goes_on_where_it_was(out: Path, arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (out / "pareto.csv").read_text()
    monkeypatch.setattr("training.search.teach", lambda *_: pytest.fail("trained again"))
    search = Search(config(), arrays, out)
    search.run(3)
    search.report()
    assert (out / "pareto.csv").read_text() == before
    assert len(search._done()) == 3


def test_an_architecture_is_trained_once(arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = {name: values[:1] for name, values in SMALL["space"].items()} | {"symmetric": [True]}
    search = Search(config(space=only), arrays, tmp_path)
    search.run(1)
    monkeypatch.setattr("training.search.teach", lambda *_: pytest.fail("trained again"))
    search.run(3)
    assert len(search._done()) == 3
    assert [tried.number for tried in search.tried()] == [0]


def test_what_is_refused_is_not_trained_and_says_why(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr("training.search.teach", lambda network, _: trained.append(network.name))
    only = {**{name: values[:1] for name, values in SMALL["space"].items()}, "symmetric": [True]}
    cases: dict[str, tuple[dict[str, Any], float | None, str]] = {
        "budget": ({}, 0.5, "ms predicted, budget 0.5 ms"),
        "borders": ({"kernel": [5]}, None, "both borders are reached alike"),
        "orbits": ({"hidden": [12]}, None, "give a multiple of 8"),
        "planner": ({"stride": [1], "kernel": [3], "hidden": [1048]}, None, "parameters, at most .* are planned"),
    }
    for name, (space, budget, words) in cases.items():
        search = Search(config(space={**only, **space}), arrays, tmp_path / name, budget_ms=budget)
        search.run(1)
        (tried,) = search.tried()
        assert tried.status == "refused"
        assert not trained
        assert re.search(words, tried.reason), tried.reason
    # With a larger budget it is no longer refused.
    search = Search(config(space=only), arrays, tmp_path / "budget", budget_ms=1000)
    search.run(2)
    assert len(trained) == 1
    assert [tried.status for tried in search.tried()] == ["trained"]


def test_held_out_cells_are_not_read(arrays: Path, tmp_path: Path) -> None:
    search = Search(config(), arrays, tmp_path)
    cells = load_cells(arrays)
    held = set(cells.sha256[cells.final].tolist())
    assert held
    assert not held & set(search._some.sha256.tolist())
    division = search._division
    assert not set(search._some.groups[division.train]) & set(search._some.groups[division.test])


def test_another_search_in_the_same_folder_is_refused(out: Path, arrays: Path) -> None:
    with pytest.raises(RunError, match="holds a search of another configuration"):
        Search(config(epochs=2), arrays, out)
    assert (out / JOURNAL).is_file()


def test_teachers_are_imitated_and_have_to_be_of_the_same_division(arrays: Path, tmp_path: Path) -> None:
    plain = {"name": "plain", "family": "ordinary", "architecture": "plain", "width": 0.1, "size": 32, "epochs": 1}
    study = {"name": "teachers", "folds": 2, "protocols": ["grouped"], "models": [plain]}
    run_study(Study(StudyConfig.model_validate(study), arrays, only=["plain"]), tmp_path / "study")
    runs = [RunFolder.of(tmp_path / "study", "plain", f"grouped-{fold}", 0) for fold in (0, 1)]
    search = Search(config(), arrays, tmp_path / "out", teachers=[runs[0].path])
    assert search._soft is not None
    np.testing.assert_array_equal(search._soft, runs[0].logits().train_logits)
    with pytest.raises(DataError, match="was trained on other cells; name a run of grouped-0"):
        Search(config(), arrays, tmp_path / "other", teachers=[runs[1].path])
    with pytest.raises(RunError, match="is no finished run of a study"):
        Search(config(), arrays, tmp_path / "other", teachers=[tmp_path])


# ---------------------------------------------------------------------------------------------- files and the command


def test_the_shipped_search_is_read() -> None:
    shipped = read_search("default")
    assert shipped.space.symmetric == (True,)
    for maps in (shipped.space.inner_maps, shipped.space.third_maps):
        assert min(maps) == 0 < max(maps)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "is not TOML"),
        ('name = "x"\nfolds = 2\nfold = 2', "fold 2 of 2; expected 0 to 1"),
        ('name = "x"\n[training]\nepochs = 3', r"\[training\] holds \['epochs'\], which the search decides itself"),
        ('name = "x"\n[training]\nlearning_rate = -1', "is no search"),
        ('name = "x"\n[space]\nsize = []', "space.size"),
        ('name = "x"\n[space]\ndepth = [3]', "space.depth"),
    ],
)
def test_files_that_are_no_search_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "search.toml").write_text(text)
    with pytest.raises(RunError, match=words):
        read_search(str(tmp_path / "search.toml"))
    with pytest.raises(RunError, match="no file that can be read"):
        read_search(str(tmp_path / "missing.toml"))


def test_the_command(arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        'name = "tiny"\nfolds = 2\nepochs = 1\n[space]\nsize = [32]\nfirst_maps = [8]\nstride = [4]\nhidden = [8]\n'
    )
    words = ["search", str(tmp_path / "tiny.toml"), "--data", str(arrays), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--trials", "2", "--budget-ms", "0.5"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "budget 0.5 ms" in " ".join(result.output.split())
    text = (tmp_path / "out" / "pareto.md").read_text()
    assert "`hemacrypt study search tiny.toml --data DATA --out OUT --trials 2 --budget-ms 0.5`" in text
    assert str(tmp_path) not in text
