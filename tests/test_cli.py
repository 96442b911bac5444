"""The ``hemacrypt`` program: help that a newcomer can follow, the plan explained, errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from hemacrypt import __version__
from hemacrypt.cli import application
from hemacrypt.model.bundle import Bundle
from hemacrypt.plan.plan import PRIME_LIMIT, is_prime
from hemacrypt.plan.security import LARGEST_MODULUS_BITS
from hemacrypt.planner import plan_bundle

_COMMANDS = {
    "demo": ("--out", "--limit", "--workers", "--model"),
    "verify": ("--scheme", "--json", "--images", "--limit", "--engine"),
    "train": ("--out", "--data", "--protocol", "--epochs", "--seed"),
    "export": (),
    "convert": ("--name", "--labels", "--geometry", "--scale", "--range", "--preprocessing", "--calibrate", "--limit"),
    "plan": (
        "--json",
        "--images",
        "--key-budget-mb",
        "--precision",
        "--engine",
        "--scheme",
        "--plain-moduli",
        "--degree",
        "--magnitudes",
    ),
    "evaluate": (),
    "study": ("run", "report", "export", "encrypt", "list"),
    "serve": (
        *("--host", "--port", "--store", "--workers", "--threads", "--engine", "--key-budget-mb"),
        *("--port-file", "--tls-certificate", "--tls-key"),
    ),
    "models": ("--server", "--tls-root"),
    "keygen": ("--server", "--model", "--keys", "--tls-root", "--replace"),
    "register": ("--server", "--model", "--keys", "--tls-root"),
    "predict": ("--server", "--model", "--keys", "--tls-root", "--json"),
    "forget": ("--server", "--model", "--keys", "--tls-root"),
}


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hemacrypt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEMACRYPT_")}
    environment["COLUMNS"] = "160"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120)


def test_help_lists_every_command_and_says_what_this_is_not() -> None:
    done = _run("--help")
    assert done.returncode == 0, done.stderr
    for command in _COMMANDS:
        assert f" {command} " in done.stdout
    assert "not a diagnosis" in done.stdout
    assert "--version" in done.stdout


def test_the_version_is_the_installed_one() -> None:
    done = _run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"hemacrypt {__version__}")


def test_no_command_and_an_unknown_one_end_with_help() -> None:
    lost = _run()
    assert "Usage" in lost.stdout + lost.stderr
    wrong = _run("diagnose")
    assert wrong.returncode == 2
    assert "diagnose" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.fixture(scope="module")
def program() -> typer.Typer:
    return application()


def test_no_command_is_forgotten_here(program: typer.Typer) -> None:
    known = [*program.registered_commands, *program.registered_groups]
    assert {command.name for command in known} == set(_COMMANDS)


@pytest.mark.parametrize("command", _COMMANDS)
def test_each_command_explains_itself(program: typer.Typer, command: str) -> None:
    done = CliRunner().invoke(program, [command, "--help"], env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"})
    assert done.exit_code == 0, done.output
    shown = click.unstyle(done.output)
    assert "is not installed" not in shown
    for option in (*_COMMANDS[command], "--help"):
        assert option in shown
    # The usage line is followed by what the command does.
    assert len([line for line in shown.splitlines() if len(line.split()) > 4]) >= 1


@pytest.fixture(scope="module")
def planned() -> dict[str, object]:
    done = _run("plan", "--json")
    assert done.returncode == 0, done.stderr
    content: dict[str, object] = json.loads(done.stdout)
    return content


def test_the_embedded_plan_is_secure_and_small(planned: dict[str, object], bundle: Bundle) -> None:
    primes = [*planned["data_primes"], planned["special_prime"]]  # type: ignore[misc]
    assert planned["degree"] == 8192
    assert len(set(primes)) == len(primes)
    for prime in primes:
        assert prime < PRIME_LIMIT == 2**30
        assert is_prime(prime)
        assert prime % (2 * 8192) == 1
    product = 1
    for prime in primes:
        product *= prime
    assert planned["modulus_bits"] == product.bit_length() <= LARGEST_MODULUS_BITS[8192] == 218
    assert planned["model"] == bundle.manifest.name
    assert planned["plan_id"] == plan_bundle(bundle)[0].public.plan_id


def test_the_embedded_plan_keeps_the_promised_sizes(planned: dict[str, object]) -> None:
    sizes = planned["bytes"]
    assert isinstance(sizes, dict)
    assert sizes["upload"] <= 245_000
    assert 0 < planned["logit_error_bound"] < planned["logit_limit"]  # type: ignore[operator]
    kinds = [step["kind"] for step in planned["steps"]]  # type: ignore[attr-defined]
    levels = [step["level"] for step in planned["steps"]]  # type: ignore[attr-defined]
    assert sizes["evaluation_keys"] <= 40_000_000
    assert kinds == ["affine", "plain", "affine", "plain", "affine"]
    assert planned["images"] == 1
    assert levels == sorted(levels, reverse=True)


def test_the_plan_is_shown_as_a_table_too(planned: dict[str, object]) -> None:
    done = _run("plan")
    assert done.returncode == 0, done.stderr
    assert "8192" in done.stdout
    for word in ("level", "scale", "turns", "square"):
        assert word in done.stdout.lower()


def test_the_plan_for_two_images_is_shown_too(planned: dict[str, object], bundle: Bundle) -> None:
    done = _run("plan", "--json", "--images", 2)
    assert done.returncode == 0, done.stderr
    pair = json.loads(done.stdout)
    assert pair["images"] == 2
    assert pair["plan_id"] == plan_bundle(bundle)[1].public.plan_id != planned["plan_id"]
    # One key set serves both.
    assert (pair["keys"], pair["data_primes"]) == (planned["keys"], planned["data_primes"])
    none = _run("plan", "--images", 0)
    assert none.returncode == 2
    assert "Traceback" not in none.stderr


def test_fewer_keys_may_be_asked_for(planned: dict[str, object]) -> None:
    done = _run("plan", "--json", "--key-budget-mb", 15)
    assert done.returncode == 0, done.stderr
    cheap = json.loads(done.stdout)
    assert cheap["bytes"]["evaluation_keys"] <= 15_000_000 < planned["bytes"]["evaluation_keys"]  # type: ignore[index]
    assert cheap["estimated_ms"] > planned["estimated_ms"]


@pytest.mark.parametrize("what", ["absent", "file", "empty"])
def test_a_bundle_that_is_none_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("no bundle")
    elif what == "empty":
        path.mkdir()
    done = _run("plan", path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}")


def test_neither_the_program_nor_client_or_service_load_tensorflow() -> None:
    code = (
        "import sys, hemacrypt.cli, client_sdk, client_sdk.cli, audit.demo, service.cli, service.server, "
        "service.worker; hemacrypt.cli.application(); "
        "print([name for name in ('tensorflow', 'keras', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_an_extra_that_is_not_installed_is_told() -> None:
    """Where the service's libraries are missing, its command says what to install and the others work."""
    code = (
        "import sys; sys.modules['pydantic_settings'] = None; sys.modules['structlog'] = None; "
        "sys.modules['service.cli'] = None; sys.argv = ['hemacrypt', 'serve']; "
        "import hemacrypt.cli; hemacrypt.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'hemacrypt[service]'" in done.stderr
    assert "Traceback" not in done.stderr
