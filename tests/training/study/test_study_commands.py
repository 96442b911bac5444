"""``hemacrypt study``, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hemacrypt import DISCLAIMER
from training.errors import RunError
from training.study.cli import app

STUDY = """
name = "tiny"
protocols = ["grouped", "heldout"]
folds = 2
[[models]]
name = "square"
family = "square"
architecture = "cryptonet"
size = 32
width = 0.2
epochs = 1
"""


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_run_and_report(arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    out = tmp_path / "out"
    printed = call("run", tmp_path / "study.toml", "--data", arrays, "--out", out)
    assert "held-out subjects: not read" in printed
    assert "6 runs finished" in printed
    assert DISCLAIMER in printed
    text = (out / "report.md").read_text()
    assert "`hemacrypt study run study.toml --data DATA --out OUT`" in text
    assert str(tmp_path) not in text
    assert "not run: held-out cells are for --final" in text
    assert json.loads((out / "study.json").read_text())["held_out"] is None
    (out / "report.md").unlink()
    call("report", out)
    assert (out / "report.md").read_text() == text
    assert "6 runs already there" in call("run", tmp_path / "study.toml", "--data", arrays, "--out", out)


def test_list_names_the_shipped_studies() -> None:
    printed = call("list")
    assert "quick" in printed
    assert "full" in printed


def test_an_unknown_model_is_refused(arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    with pytest.raises(RunError, match="'nobody' is no model of the study 'tiny'"):
        call("run", tmp_path / "study.toml", "--data", arrays, "--out", tmp_path / "out", "--only", "nobody")


def test_the_commands_load_without_tensorflow() -> None:
    code = "import training.study.cli, sys; sys.exit(bool({'tensorflow', 'sklearn', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
