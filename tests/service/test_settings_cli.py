"""Settings and ``hemacrypt serve``: the environment, bad values, and everything that keeps a service from starting."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from client_sdk import Client, ServiceUnavailableError
from hemacrypt.model.bundle import Bundle
from service.settings import Settings

_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("HEMACRYPT_")}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HEMACRYPT_")]:
        monkeypatch.delenv(name)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {"PORT": "7", "WORKERS": "3", "STORE": str(tmp_path), "JOB_SECONDS": "2.5", "ENGINE": "seal", "QUEUE": "9"}
    for name, value in values.items():
        monkeypatch.setenv(f"HEMACRYPT_{name}", value)
    monkeypatch.setenv("HEMACRYPT_BUNDLES", '["/one", "/two"]')
    settings = Settings()
    assert (settings.port, settings.workers, settings.job_seconds, settings.queue) == (7, 3, 2.5, 9)
    assert settings.store == tmp_path
    assert settings.bundles == (Path("/one"), Path("/two"))
    # The command line is stronger.
    assert Settings(port=8).port == 8


def test_threads_and_key_budget_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().threads, Settings().key_budget, Settings().engine) == (1, None, "vector")
    monkeypatch.setenv("HEMACRYPT_THREADS", "4")
    monkeypatch.setenv("HEMACRYPT_KEY_BUDGET_MB", "20")
    assert (Settings().threads, Settings().key_budget) == (4, 20_000_000)


def test_both_schemes_are_offered_unless_the_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().exact
    monkeypatch.setenv("HEMACRYPT_SCHEMES", '["ckks"]')
    assert not Settings().exact
    assert Settings(schemes=("bfv", "ckks")).exact


def test_without_settings_a_service_is_reachable_from_its_own_machine_alone() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert settings.workers == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "-1"),
        ("port", "65536"),
        ("workers", "0"),
        ("threads", "0"),
        ("threads", "65"),
        ("key_budget_mb", "0"),
        ("cache_limit_mb", "0"),
        ("queue", "0"),
        ("job_seconds", "0"),
        ("job_seconds", "nan"),
        ("worker_memory_mb", "1"),
        ("store_limit_mb", "0"),
        ("upload_idle_hours", "-1"),
        ("grace_seconds", "-0.1"),
        ("cached_keys", "0"),
        ("schemes", "[]"),
        ("schemes", '["bfv"]'),
    ],
)
def test_senseless_values_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"HEMACRYPT_{name.upper()}", value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert refused.value.errors()[0]["loc"] == (name,)


def _serve(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a service that must not come up; a service that does is ended after a minute and fails the test."""
    command = [sys.executable, "-m", "service", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=_ENVIRONMENT | environment, timeout=60, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        ((), {"HEMACRYPT_WORKERS": "many"}, "workers"),
        ((), {"HEMACRYPT_JOB_SECONDS": "-3"}, "job_seconds"),
        (("--port", "99999"), {}, "port"),
        (("--port", "x"), {}, "--port"),
        (("--workers", "0"), {}, "workers"),
        (("--threads", "0"), {}, "threads"),
        (("--key-budget-mb", "0"), {}, "key_budget_mb"),
        (("--schemes", "bfv"), {}, "schemes: Value error, every model is served under CKKS"),
        (("--schemes", "ckks,bgv"), {}, "schemes"),
        (("--schemes", ""), {}, "schemes"),
        ((), {"HEMACRYPT_SCHEMES": "ckks"}, "schemes"),
        (("--no-such-option",), {}, "--no-such-option"),
        ((), {"HEMACRYPT_BUNDLES": "/one/bundle"}, "bundles"),
    ],
)
def test_bad_values_end_the_command_with_a_readable_line(
    arguments: tuple[str, ...], environment: dict[str, str], told: str
) -> None:
    done = _serve(*arguments, **environment)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def _check_one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a start failed with one line for the operator, and return it."""
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cannot serve: ")]
    assert "Traceback" not in done.stderr
    assert "Traceback" not in done.stdout
    return line


def test_a_port_in_use_is_told(small_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _serve(small_bundle, "--port", port, "--store", tmp_path / "store", "--workers", 1)
    line = _check_one_line(done)
    assert f"127.0.0.1:{port}" in line
    assert "--port" in line


def test_an_unknown_engine_is_told_with_the_choices(small_bundle: Path, tmp_path: Path) -> None:
    arguments = ("--port", 0, "--store", tmp_path / "store", "--workers", 1, "--engine", "abacus")
    line = _check_one_line(_serve(small_bundle, *arguments))
    assert "'abacus'" in line
    assert "seal" in line


def test_two_bundles_of_one_name_are_refused(small_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(small_bundle, tmp_path / "copy")
    done = _serve(small_bundle, tmp_path / "copy", "--port", 0, "--store", tmp_path / "store", "--workers", 1)
    assert "two bundles are called 'small'" in _check_one_line(done)


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    done = _serve(tmp_path / "none", "--port", 0, "--store", tmp_path / "store", "--workers", 1)
    assert str(tmp_path / "none") in _check_one_line(done)


def test_a_store_that_is_a_file_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    done = _serve(small_bundle, "--port", 0, "--store", tmp_path / "store", "--workers", 1)
    assert str(tmp_path / "store") in _check_one_line(done)
    assert (tmp_path / "store").read_text() == "a file"


def test_a_port_file_that_cannot_be_written_is_told(small_bundle: Path, tmp_path: Path) -> None:
    port_file = tmp_path / "none" / "port"
    arguments = ("--port", 0, "--store", tmp_path / "store", "--workers", 1, "--port-file", port_file)
    assert str(tmp_path / "none") in _check_one_line(_serve(small_bundle, *arguments))


@dataclass(frozen=True)
class Certificate:
    """A certificate that signed itself, and its key."""

    chain: Path
    key: Path


def _certificate(directory: Path) -> Certificate:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make a certificate with")
    directory.mkdir()
    made = Certificate(directory / "chain.pem", directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", made.key, "-out", made.chain], check=True, capture_output=True)
    return made


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return _certificate(tmp_path / "certificate")


@contextmanager
def _running(port_file: Path, *arguments: object) -> Iterator[str | None]:
    """Start a service; yield its address, or None if it ended before it was ready."""
    command = [sys.executable, "-m", "service", *map(str, arguments), "--port", "0", "--port-file", str(port_file)]
    with (
        port_file.with_suffix(".log").open("wb") as log,
        subprocess.Popen([*command, "--workers", "1"], env=_ENVIRONMENT, stdout=log, stderr=log) as process,
    ):
        try:
            while process.poll() is None and not port_file.exists():
                time.sleep(0.02)
            yield f"127.0.0.1:{int(port_file.read_text())}" if port_file.exists() else None
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def test_tls_protects_the_whole_path(small_bundle: Path, certificate: Certificate, tmp_path: Path) -> None:
    stranger = _certificate(tmp_path / "stranger")
    arguments = (small_bundle, "--store", tmp_path / "store")
    secured = ("--tls-certificate", certificate.chain, "--tls-key", certificate.key)
    with _running(tmp_path / "port", *arguments, *secured) as address:
        assert address is not None
        keys = tmp_path / "keys"
        with Client(address, "small", key_directory=keys, root_certificate=certificate.chain) as client:
            client.prepare()
            pixels = np.random.default_rng(8).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            answer = client.predict(pixels)
            clear = Bundle.read(small_bundle).network(client.preprocessing(pixels)[None])[0]
            assert np.abs(answer.logits - clear).max() <= client.plan.logit_error_bound
        for root in (stranger.chain, None):
            with (
                Client(address, "small", key_directory=keys, root_certificate=root) as distrustful,
                pytest.raises(ServiceUnavailableError),
            ):
                distrustful.models()


@pytest.mark.parametrize("given", ["chain", "key"])
def test_half_of_tls_never_becomes_none(
    small_bundle: Path, certificate: Certificate, tmp_path: Path, given: str
) -> None:
    """An operator who forgets one of both files must not end up with a service that speaks plainly."""
    option = {"chain": ("--tls-certificate", certificate.chain), "key": ("--tls-key", certificate.key)}[given]
    with _running(tmp_path / "port", small_bundle, "--store", tmp_path / "store", *option) as address:
        assert address is None
    told = (tmp_path / "port.log").read_text()
    assert "tls" in told.lower()
    assert "Traceback" not in told


def test_tls_files_that_are_none_are_told(small_bundle: Path, certificate: Certificate, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    arguments = (small_bundle, "--port", 0, "--store", tmp_path / "store", "--workers", 1)
    absent = _serve(*arguments, "--tls-certificate", tmp_path / "absent.pem", "--tls-key", certificate.key)
    assert "absent.pem" in _check_one_line(absent)
    damaged = _check_one_line(_serve(*arguments, "--tls-certificate", junk, "--tls-key", certificate.key))
    # Nothing is wrong with the port, so the operator must not be sent there.
    assert "--port" not in damaged
    assert "certificate" in damaged.lower()
