"""Real worker processes: what they answer, what happens when they die, and what they may not do."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client_sdk import Client
from hemacrypt.embedded import bundle_path
from hemacrypt.v1 import inference_pb2 as pb
from service import pool as pool_module
from service.pool import Job, Outcome, PoolError, QueueFullError, WorkerLostError, WorkerPool
from service.settings import Settings
from tests.service.conftest import Keys, Until


def _settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {"bundles": (bundle_path(),), "workers": 1, "queue": 1} | changes
    return Settings(**values)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """One worker with the embedded model, and room for one waiting job."""
    made = WorkerPool(_settings())
    yield made
    made.close()


@pytest.fixture
def file(keys: Keys, tmp_path: Path) -> Path:
    return keys.stored_below(tmp_path / "stored")


@pytest.fixture
def job(pool: WorkerPool, keys: Keys, file: Path, image: pb.PredictRequest) -> Job:
    """A job that will succeed, with keys that no worker has loaded."""
    pool.forget(keys.name)
    return _prediction(image, keys, file)


def _prediction(image: pb.PredictRequest, keys: Keys, file: Path) -> Job:
    return Job("predict", image.model, image.plan_id, keys.name, file, tuple(image.ciphertexts))


def _pid(pool: WorkerPool) -> int:
    (process,) = pool._processes
    return process._process.pid


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _children() -> set[int]:
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(path.name))
    return found


def _refusal(outcome: Outcome) -> str:
    assert outcome.header["ok"] is False
    return str(outcome.header["refusal"])


def test_a_job_is_done(pool: WorkerPool, job: Job, client: Client) -> None:
    outcome = pool.submit(job).result()
    assert outcome.header["ok"] is True
    assert outcome.header["compute_us"] > 0
    assert client._holder(client.plan).decrypt(outcome.ciphertexts).shape == (1, 2)


def test_keys_are_checked_without_an_image(pool: WorkerPool, job: Job) -> None:
    outcome = pool.submit(replace(job, kind="check_keys", ciphertexts=())).result()
    assert (outcome.header["ok"], outcome.ciphertexts) == (True, ())
    assert "compute_us" not in outcome.header


def test_a_foreign_image_is_refused_and_the_worker_lives_on(pool: WorkerPool, job: Job) -> None:
    before = _pid(pool)
    outcome = pool.submit(replace(job, ciphertexts=(b"nonsense",))).result()
    assert _refusal(outcome) == "ciphertext"
    assert outcome.header["field"] == "ciphertext"
    assert pool.submit(job).result().header["ok"]
    assert _pid(pool) == before


def test_a_worker_killed_between_jobs_is_replaced(pool: WorkerPool, job: Job) -> None:
    before = _pid(pool)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        pool.submit(job).result()
    assert pool.submit(job).result().header["ok"]
    assert _pid(pool) != before
    assert not _alive(before)


def test_a_worker_killed_during_a_job_fails_that_job_alone(pool: WorkerPool, job: Job, until: Until) -> None:
    before = _pid(pool)
    os.kill(before, signal.SIGSTOP)
    first = pool.submit(job)
    until(first.running)
    second = pool.submit(job)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        first.result()
    assert second.result().header["ok"]
    assert _pid(pool) != before
    assert not _alive(before)


def test_a_full_queue_refuses_and_a_cancelled_job_gives_its_place_up(
    pool: WorkerPool, job: Job, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Job] = []
    call = pool_module._Process.call

    def recorded(self: pool_module._Process, job: Job) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        given.append(job)
        return call(self, job)

    monkeypatch.setattr(pool_module._Process, "call", recorded)
    given_up, patient = (replace(job) for _ in range(2))
    os.kill(_pid(pool), signal.SIGSTOP)
    running = pool.submit(job)
    until(running.running)
    pending = pool.submit(given_up)
    with pytest.raises(QueueFullError):
        pool.submit(patient)
    assert pending.cancel()
    last = pool.submit(patient)
    with pytest.raises(QueueFullError):
        pool.submit(job)
    assert not running.cancel()
    os.kill(_pid(pool), signal.SIGCONT)
    assert running.result().header["ok"]
    assert last.result().header["ok"]
    with pytest.raises(CancelledError):
        pending.result()
    assert [any(job is one for one in given) for job in (given_up, patient)] == [False, True]
    # Every place is free again.
    assert pool._pending == 0


def test_whoever_waits_for_a_place_gets_it_when_one_becomes_free(pool: WorkerPool, job: Job, until: Until) -> None:
    os.kill(_pid(pool), signal.SIGSTOP)
    running = pool.submit(job)
    until(running.running)
    pool.submit(job)
    with ThreadPoolExecutor(1) as waiter:
        accepted = waiter.submit(pool.submit, job, wait_seconds=600)
        until(accepted.running)
        assert not accepted.done()
        os.kill(_pid(pool), signal.SIGCONT)
        assert accepted.result().result().header["ok"]


def test_loaded_keys_outlive_their_file_until_they_are_forgotten(
    pool: WorkerPool, job: Job, keys: Keys, file: Path
) -> None:
    assert pool.submit(job).result().header["ok"]
    file.unlink()
    assert pool.submit(job).result().header["ok"], "the keys were not kept loaded, so forgetting would prove nothing"
    pool.forget(keys.name)
    assert _refusal(pool.submit(job).result()) == "missing"


def test_forgetting_other_keys_changes_nothing(pool: WorkerPool, job: Job, file: Path) -> None:
    assert pool.submit(job).result().header["ok"]
    file.unlink()
    pool.forget("0" * 64)
    assert pool.submit(job).result().header["ok"]


def test_keys_forgotten_while_a_job_is_handed_over_are_dropped_before_the_next(
    pool: WorkerPool, job: Job, keys: Keys, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pool.submit(job).result().header["ok"]
    (process,) = pool._processes
    send = process._connection.send_bytes

    def send_and_forget(content: bytes) -> None:
        send(content)
        pool.forget(keys.name)

    with monkeypatch.context() as patched:
        patched.setattr(process._connection, "send_bytes", send_and_forget)
        assert pool.submit(job).result().header["ok"]
    file.unlink()
    assert _refusal(pool.submit(job).result()) == "missing"


def test_keys_damaged_on_disk_are_refused(pool: WorkerPool, job: Job, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for kind in ("predict", "check_keys"):
        assert _refusal(pool.submit(replace(job, kind=kind)).result()) == "damaged"


def test_keys_that_are_none_are_refused_as_keys_and_not_as_an_image(pool: WorkerPool, job: Job, tmp_path: Path) -> None:
    blob = b"HEMACRYPTKEYS1\0\0"
    path = tmp_path / "none"
    path.write_bytes(blob)
    for kind in ("predict", "check_keys"):
        name = hashlib.sha256(blob).hexdigest()
        outcome = pool.submit(replace(job, kind=kind, key_set_id=name, keys=path)).result()
        assert _refusal(outcome) == "keys"
        assert outcome.header["field"] == "evaluation keys"


def test_a_worker_that_has_too_much_to_forget_forgets_everything(pool: WorkerPool, job: Job, file: Path) -> None:
    assert pool.submit(job).result().header["ok"]
    file.unlink()
    # So many names that they would not fit the frame.
    for number in range(3000):
        pool.forget(f"{number:064x}")
    assert _refusal(pool.submit(job).result()) == "missing"


def test_an_answer_to_another_job_is_taken_for_none(
    pool: WorkerPool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever got another client's logits could not decrypt them, but must not get them either."""
    before = _pid(pool)
    (process,) = pool._processes
    receive = process._connection.recv_bytes

    def another(largest: int | None = None) -> bytes:
        frame = receive(largest)
        return json.dumps(json.loads(frame) | {"number": 10**6}).encode() if frame.startswith(b"{") else frame

    with monkeypatch.context() as patched:
        patched.setattr(process._connection, "recv_bytes", another)
        with pytest.raises(WorkerLostError):
            pool.submit(job).result()
    assert pool.submit(job).result().header["ok"]
    assert _pid(pool) != before


@pytest.mark.parametrize("sizes", [None, [], [1], [-1, 2], [2**70], ["x"], [0.5], {}, 7])
def test_an_answer_whose_sizes_do_not_add_up_is_taken_for_none(
    pool: WorkerPool, job: Job, monkeypatch: pytest.MonkeyPatch, sizes: Any
) -> None:
    """A worker has parsed what strangers sent; what it says is not believed blindly."""
    before = _pid(pool)
    (process,) = pool._processes
    receive = process._connection.recv_bytes

    def another(largest: int | None = None) -> bytes:
        frame = receive(largest)
        return json.dumps(json.loads(frame) | {"sizes": sizes}).encode() if frame.startswith(b"{") else frame

    with monkeypatch.context() as patched:
        patched.setattr(process._connection, "recv_bytes", another)
        with pytest.raises(WorkerLostError):
            pool.submit(job).result()
    assert _pid(pool) != before
    assert pool.submit(job).result().header["ok"]


def test_keys_that_were_never_there_are_missing(pool: WorkerPool, job: Job, tmp_path: Path) -> None:
    absent = replace(job, keys=tmp_path / "absent")
    assert _refusal(pool.submit(absent).result()) == "missing"


def test_a_job_that_takes_too_long_is_stopped(keys: Keys, file: Path, image: pb.PredictRequest) -> None:
    # Reading and hashing 29 MB of keys alone takes many times this long.
    pool = WorkerPool(_settings(job_seconds=0.001))
    try:
        before = _pid(pool)
        with pytest.raises(WorkerLostError):
            pool.submit(_prediction(image, keys, file)).result()
        assert not _alive(before)
        assert _alive(_pid(pool))
    finally:
        pool.close()


def test_workers_are_limited_in_memory_and_leave_no_core_dump(pool: WorkerPool) -> None:
    limits = {}
    for line in Path(f"/proc/{_pid(pool)}/limits").read_text().splitlines()[1:]:
        limits[line[:26].strip()] = line[26:].split()[:2]
    memory = str(_settings().worker_memory_mb << 20)
    assert limits["Max address space"] == [memory, memory]
    assert limits["Max core file size"] == ["0", "0"]


def test_a_smaller_limit_reaches_the_worker(small_bundle: Path) -> None:
    pool = WorkerPool(_settings(bundles=(small_bundle,), worker_memory_mb=3000))
    try:
        assert f"{3000 << 20}" in Path(f"/proc/{_pid(pool)}/limits").read_text()
    finally:
        pool.close()


def test_a_worker_that_cannot_start_is_told(tmp_path: Path) -> None:
    before = _children()
    with pytest.raises(PoolError):
        WorkerPool(_settings(bundles=(tmp_path / "none",)))
    assert _children() == before


def test_closing_leaves_no_process_and_fails_what_waits(
    small_bundle: Path, tmp_path: Path, until: Until, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _children()
    pool = WorkerPool(_settings(bundles=(small_bundle,), workers=2, queue=4))
    assert len(_children() - before) == 2
    for process in pool._processes:
        os.kill(process._process.pid, signal.SIGSTOP)
    futures = [pool.submit(Job("predict", "small", "1" * 64, "0" * 64, tmp_path)) for _ in range(4)]
    until(lambda: sum(future.running() for future in futures) == 2)
    pool.close()
    for future in futures:
        with pytest.raises(WorkerLostError):
            future.result()
    assert _children() == before
    assert "Traceback" not in capfd.readouterr().err


def test_closing_while_a_worker_is_replaced_leaves_no_process(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _children()
    pool = WorkerPool(_settings(bundles=(small_bundle,)))
    started, closed = threading.Event(), threading.Event()
    made: list[pool_module._Process] = []
    start = pool_module._Process.__init__

    def slowly(self: pool_module._Process, settings: Settings) -> None:
        started.set()
        closed.wait(60)
        start(self, settings)
        made.append(self)

    monkeypatch.setattr(pool_module._Process, "__init__", slowly)
    os.kill(_pid(pool), signal.SIGKILL)
    future = pool.submit(Job("predict", "small", "1" * 64, "0" * 64, tmp_path))
    assert started.wait(60)
    pool.close()
    closed.set()
    with pytest.raises(WorkerLostError):
        future.result()
    left = _children() - before
    for process in made:
        process.stop()
    assert not left


def _arguments(bundle: Path) -> dict[str, Any]:
    """What a worker is started with."""
    limits = {"cached_keys": 1, "memory_mb": 4096, "threads": 1, "key_budget": None, "cache": None, "cache_limit_mb": 1}
    return {"bundles": [str(bundle)], "engine": "seal", "exact": False, "precision": None} | limits


class _Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_frames_are_json_and_bytes_and_never_pickles(small_bundle: Path, tmp_path: Path) -> None:
    """Speak with a worker by hand: a 32-bit big-endian length before every frame, and nothing of multiprocessing's."""

    def receive(size: int) -> bytes:
        content = b""
        while len(content) < size:
            more = ours.recv(size - len(content))
            assert more, "the worker has ended"
            content += more
        return content

    def send(content: bytes) -> None:
        ours.sendall(struct.pack("!i", len(content)) + content)

    ours, theirs = socket.socketpair()
    arguments = _arguments(small_bundle)
    with ours, theirs:
        command = [sys.executable, "-m", "service.worker", str(theirs.fileno()), json.dumps(arguments)]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        try:
            assert json.loads(receive(*struct.unpack("!i", receive(4)))) == {"ready": True}
            absent = str(tmp_path / "absent")
            name = "0" * 64
            job = {"number": 7, "job": "predict", "model": "small", "key_set_id": name, "keys": absent, "forget": []}
            send(json.dumps(job).encode())
            send(b"no ciphertext")
            assert json.loads(receive(*struct.unpack("!i", receive(4)))) == {
                "number": 7,
                "ok": False,
                "refusal": "missing",
            }
            assert receive(*struct.unpack("!i", receive(4))) == b""
            bomb = pickle.dumps(_Touch(tmp_path / "exploded"))
            send(bomb)
            send(bomb)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 1
    assert b"Error" in told
    assert not (tmp_path / "exploded").exists()
    # The bomb is one: whoever unpickles it creates the file.
    pickle.loads(bomb)  # noqa: S301 - our own bytes
    assert (tmp_path / "exploded").exists()


def test_a_worker_ends_when_its_service_is_gone(small_bundle: Path) -> None:
    ours, theirs = socket.socketpair()
    arguments = _arguments(small_bundle)
    with ours, theirs:
        command = [sys.executable, "-m", "service.worker", str(theirs.fileno()), json.dumps(arguments)]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            assert ours.recv(1)
            ours.close()
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode in (0, 1)
