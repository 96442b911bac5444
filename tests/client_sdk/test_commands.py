"""The hospital's commands when something is wrong: one line, exit status 1, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from tests.client_sdk.conftest import Impostor, Met, make_small, serving


def _hemacrypt(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hemacrypt")
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120)


def _check_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cell.png"
    Image.new("RGB", (8, 8), (200, 30, 90)).save(path)
    return path


def test_nobody_there_is_one_line() -> None:
    assert "127.0.0.1:1" in _check_one_line(_hemacrypt("models", "--server", "127.0.0.1:1"))


def test_a_root_certificate_that_is_not_there_is_one_line(met: Met, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    assert "absent.pem" in _check_one_line(_hemacrypt("models", "--server", met.address, "--tls-root", absent))


def test_a_file_in_the_place_of_the_key_directory_is_one_line(met: Met, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    arguments = ("--server", met.address, "--model", "small", "--keys", tmp_path / "file")
    assert str(tmp_path / "file") in _check_one_line(_hemacrypt("keygen", *arguments))
    assert (tmp_path / "file").read_text() == "not a directory"


@pytest.mark.parametrize("label", ["[/]", "[bold red]yes", "[link=http://evil.example]yes[/link]"])
def test_labels_are_shown_as_they_are(tmp_path: Path, picture: Path, label: str) -> None:
    with serving(Impostor(make_small(labels=(label, label + "!")))) as address:
        arguments = ("--server", address, "--model", "small", "--keys", tmp_path / "keys")
        done = _hemacrypt("predict", picture, *arguments)
    assert done.returncode == 0, done.stderr
    assert label in done.stdout


def test_descriptions_are_shown_as_they_are_and_steer_no_terminal(met: Met) -> None:
    def tamper(method: str, answer: Any, context: grpc.ServicerContext) -> Any:
        answer.models[0].description = "[/] for \x1b[2J research"
        answer.models[0].plan_id = "[/]"
        return answer

    met.impostor.tamper = tamper
    done = _hemacrypt("models", "--server", met.address)
    assert done.returncode == 0, done.stderr
    assert "[/] for" in done.stdout
    assert "\x1b[2J" not in done.stdout


def test_a_false_answer_is_one_line_and_no_prediction(met: Met, picture: Path) -> None:
    def tamper(method: str, answer: Any, context: grpc.ServicerContext) -> Any:
        if method == "Predict":
            answer.ciphertexts[0] = answer.ciphertexts[0][:-1] + b"x"
        return answer

    met.impostor.tamper = tamper
    arguments = ("--server", met.address, "--model", "small", "--keys", met.client.keys.path)
    done = _hemacrypt("predict", picture, *arguments)
    assert "damaged" in _check_one_line(done)
    assert "yes" not in done.stdout
