"""Batches over real service processes: the answers of single images, and nothing left behind when something breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_sdk import Client, RequestRefusedError, ServiceUnavailableError
from hemacrypt.model.bundle import Bundle
from tests.batching import NAME, clear_logits, make_bundle, make_images
from tests.e2e.recording import recording_proxy


@dataclass(frozen=True)
class Laboratory:
    """A service process, and where its store is."""

    process: subprocess.Popen[bytes]
    address: str
    store: Path

    @property
    def spools(self) -> list[Path]:
        return list(self.store.glob("*.batch"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / NAME
    make_bundle().write(directory)
    return directory


@contextmanager
def _running(tiny: Path, directory: Path, **settings: object) -> Iterator[Laboratory]:
    """Run a service with two workers; it must end well, unless a test ended it."""
    port_file, store = directory / "port", directory / "store"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "service", str(tiny), "--port", "0", "--port-file", str(port_file)]
    command += ["--store", str(store), "--workers", "2"]
    environment = os.environ | {f"HEMACRYPT_{name.upper()}": str(value) for name, value in settings.items()}
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _until(lambda: port_file.exists() or process.poll() is not None)
        yield Laboratory(process, f"127.0.0.1:{int(port_file.read_text())}", store)
    finally:
        ended = process.poll()
        process.terminate()
        assert process.wait(timeout=60) in (0, ended)


@pytest.fixture(scope="module")
def laboratory(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with _running(tiny, tmp_path_factory.mktemp("laboratory")) as running:
        yield running


@pytest.fixture(scope="module")
def hospital(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    keys = tmp_path_factory.mktemp("hospital") / "keys"
    with Client(laboratory.address, NAME, key_directory=keys) as client:
        client.prepare()
        yield client


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_batch_gives_the_answers_of_its_images_one_by_one(hospital: Client, tiny: Path) -> None:
    images = make_images(50)
    answers = hospital.predict_batch(images)
    clear = clear_logits(Bundle.read(tiny), images)
    assert [answer.index for answer in answers] == clear.argmax(axis=1).tolist()
    assert np.abs(np.stack([answer.logits for answer in answers]) - clear).max() <= answers[0].error_bound
    for answer, image in zip(answers[:5], images, strict=False):
        alone = hospital.predict(image)
        assert alone.label == answer.label
        assert np.abs(alone.logits - answer.logits).max() <= alone.error_bound + answer.error_bound


def test_one_key_set_serves_both_layouts(hospital: Client, laboratory: Laboratory) -> None:
    hospital.predict_batch(make_images(1))
    hospital.predict(make_images(1)[0])
    assert [path.name for path in laboratory.store.iterdir()] == [hospital.keys.info().key_set_id]


def test_keys_that_were_deleted_are_registered_again(hospital: Client) -> None:
    assert hospital.forget()
    assert len(hospital.predict_batch(make_images(3))) == 3


def test_single_images_are_answered_between_batches(hospital: Client, laboratory: Laboratory) -> None:
    over, batches = threading.Event(), []

    def keep_sending() -> None:
        with Client(laboratory.address, NAME, key_directory=hospital.keys.path) as other:
            while not over.is_set():
                batches.append(other.predict_batch(make_images(1)))

    threads = [threading.Thread(target=keep_sending) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        _until(lambda: len(batches) >= 1)
        waits = [hospital.predict(make_images(1)[0]).milliseconds.queue for _ in range(20)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    # One worker takes no batches at a time that another is at one.
    assert max(waits) < 5_000


def test_a_connection_that_breaks_while_a_batch_is_sent_leaves_nothing(
    hospital: Client, laboratory: Laboratory
) -> None:
    with (
        recording_proxy(laboratory.address) as (proxied, wire),
        Client(proxied, NAME, key_directory=hospital.keys.path) as flaky,
    ):
        flaky.prepare()
        wire.cut_after = len(wire.to_service) + 1_000_000
        with pytest.raises(ServiceUnavailableError):
            flaky.predict_batch(make_images(3))
    _until(lambda: not laboratory.spools)
    assert len(hospital.predict_batch(make_images(3))) == 3


def test_a_store_without_room_refuses_batches_and_serves_on(tiny: Path, tmp_path: Path) -> None:
    with (
        _running(tiny, tmp_path, store_limit_mb=10) as small,
        Client(small.address, NAME, key_directory=tmp_path / "keys") as client,
    ):
        client.prepare()
        with pytest.raises(RequestRefusedError) as refused:
            client.predict_batch(make_images(3))
        assert (refused.value.status, refused.value.reason) == ("RESOURCE_EXHAUSTED", "STORE_FULL")
        assert not small.spools
        assert client.predict(make_images(1)[0]).label in client.plan.labels


def test_a_killed_service_leaves_a_file_and_the_next_one_deletes_it(tiny: Path, tmp_path: Path) -> None:
    with _running(tiny, tmp_path) as killed, Client(killed.address, NAME, key_directory=tmp_path / "keys") as client:
        client.prepare()
        dead = threading.Event()

        def kill(sent: int, total: int) -> None:
            if sent == total // 2:
                _until(lambda: bool(killed.spools))
                killed.process.send_signal(signal.SIGKILL)
                killed.process.wait()
                dead.set()

        with pytest.raises(ServiceUnavailableError):
            client.predict_batch(make_images(3), kill)
        assert dead.wait(60)
        assert killed.spools
    with _running(tiny, tmp_path) as again:
        assert not again.spools
        with Client(again.address, NAME, key_directory=tmp_path / "keys") as client:
            assert len(client.predict_batch(make_images(3))) == 3


def test_the_command_sends_batches_when_told_or_when_they_pay(
    hospital: Client, laboratory: Laboratory, tmp_path: Path
) -> None:
    random = np.random.default_rng(9)
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        Image.fromarray(random.integers(0, 90, (8, 8, 3), dtype=np.uint8)).save(path)
    absent = tmp_path / "absent.png"
    options = ["--server", laboratory.address, "--model", NAME, "--keys", str(hospital.keys.path), "--json"]
    found = {}
    for layout in ("single", "batch", "auto"):
        program = Path(sys.executable).with_name("hemacrypt")
        command = [program, "predict", *paths[:2], absent, *paths[2:], *options, "--layout", layout]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "absent.png does not exist" in done.stderr
        assert "Traceback" not in done.stderr
        found[layout] = [json.loads(line) for line in done.stdout.splitlines()]
    for answers in found.values():
        assert [answer["image"] for answer in answers] == list(map(str, paths))
        assert [answer["label"] for answer in answers] == [answer["label"] for answer in found["single"]]
    # Five images are not enough for a batch.
    assert found["auto"][0]["bytes"]["upload"] < found["batch"][0]["bytes"]["upload"]
