"""Batches at the service: what is admitted, what is refused and how, and that nothing of a batch is left behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from client_sdk import Client
from client_sdk._crypto import BatchKeyHolder
from hemacrypt.model.bundle import Bundle
from hemacrypt.planner import plan_bundle_layouts
from hemacrypt.seal import format as sealformat
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import digest
from service.catalogue import RESERVED_MB, Model, why_no_batches
from service.errors import Refused
from service.keystore import KeySetInfo, KeyStore, SpoolDroppedError, spooled
from service.pool import _Process
from service.server import Service
from service.settings import Settings
from tests.batching import NAME, PREPROCESSING, clear_logits, make_bundle, make_images, message, messages


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return make_bundle()


@dataclass(frozen=True)
class Hall:
    """A service with two workers in this process, and a hospital with registered keys and an encrypted batch."""

    service: Service
    stub: pb_grpc.EncryptedInferenceStub
    client: Client
    holder: BatchKeyHolder
    header: pb.BatchHeader
    ciphertexts: list[bytes]

    @property
    def processes(self) -> list[_Process]:
        return self.service._pool._processes

    @property
    def pending(self) -> int:
        return self.service._pool._pending

    @property
    def spools(self) -> list[Path]:
        return list(self.service._store.root.glob("*.batch"))

    def predict(self, parts: Iterator[pb.PredictBatchRequest] | None = None, timeout: float = 120) -> grpc.Call:
        return self.stub.PredictBatch(parts or messages(self.header, self.ciphertexts), timeout=timeout)

    def single(self) -> pb.PredictRequest:
        return self.client._request(self.client.plan, [make_images(1)[0]])[0]

    def is_clean(self) -> bool:
        """Tell whether nothing of any batch is left: no file, no place taken, no worker at work."""
        servicer, settings = self.service._servicer, self.service.settings
        places = (servicer._batches._value, servicer._streams._value)
        free = places == (settings.batch_places, settings.streams)
        return free and not (self.spools or self.service._store._spooled or self.pending)


@pytest.fixture(scope="module")
def hall(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hall]:
    directory = tmp_path_factory.mktemp("hall")
    tiny.write(directory / "tiny")
    settings = Settings(
        bundles=(directory / "tiny",), port=0, store=directory / "store", workers=2, grace_seconds=0, streams=4
    )
    service = Service(settings)
    service.start()
    try:
        target = f"127.0.0.1:{service.port}"
        with (
            grpc.insecure_channel(target, options=[("grpc.enable_retries", 0)]) as channel,
            Client(target, NAME, key_directory=directory / "keys") as client,
        ):
            client.prepare()
            plan = client.batch_plan
            assert plan is not None
            holder = client.keys.open(client.plan).serving_batches(plan)
            values = np.stack([PREPROCESSING(image) for image in make_images(20)])
            header = pb.BatchHeader(model=NAME, plan_id=plan.plan_id, key_set_id=client.keys.info().key_set_id)
            stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
            yield Hall(service, stub, client, holder, header, list(holder.encrypt(values)))
    finally:
        service.stop()


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves the service without files, places and work."""
    yield
    if "hall" in request.fixturenames:
        hall: Hall = request.getfixturevalue("hall")
        _until(hall.is_clean)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def _detail(error: grpc.RpcError, kind: type[Message]) -> Message | None:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        found = kind()
        if detail.Unpack(found):
            return found
    return None


def _reason(error: grpc.RpcError) -> str:
    info = _detail(error, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return info.reason


def _refused(call: grpc.Call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        list(call)  # type: ignore[call-overload]
    return error.value


@contextmanager
def _stopped(*processes: _Process) -> Iterator[None]:
    """Hold worker processes still."""
    for process in processes:
        os.kill(process._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            if process._process.poll() is None:
                os.kill(process._process.pid, signal.SIGCONT)


def test_a_batch_gets_one_answer_for_each_logit(hall: Hall, tiny: Bundle) -> None:
    replies = list(hall.predict())  # type: ignore[call-overload]
    assert [reply.index for reply in replies] == [0, 1]
    assert all(digest([reply.ciphertext]) == reply.ciphertext_sha256 for reply in replies)
    assert all(reply.timing.compute_us > 0 and reply.timing == replies[0].timing for reply in replies)
    logits = hall.holder.decrypt([reply.ciphertext for reply in replies], 20)
    assert np.abs(logits - clear_logits(tiny, make_images(20))).max() <= hall.holder.plan.logit_error_bound


def test_the_plan_is_told_and_needs_no_other_keys(hall: Hall) -> None:
    told = hall.stub.GetModel(pb.GetModelRequest(name=NAME), timeout=60)
    plan = hall.holder.plan
    assert told.batch.plan_id == plan.plan_id
    assert plan.parameters == hall.client.plan.parameters
    assert plan.requirements_id == hall.client.plan.requirements_id
    assert told.batch.break_even == (hall.service.models[NAME].break_even or 0)


def _changed(hall: Hall, **values: str) -> pb.BatchHeader:
    header = pb.BatchHeader()
    header.CopyFrom(hall.header)
    for name, value in values.items():
        setattr(header, name, value)
    return header


def _instead(hall: Hall, place: int, part: pb.PredictBatchRequest) -> Iterator[pb.PredictBatchRequest]:
    parts = list(messages(hall.header, hall.ciphertexts))
    parts[1 + place] = part
    return iter(parts)


def _other_level(hall: Hall) -> bytes:
    plan = hall.holder.plan
    lower = hall.client.keys.open(hall.client.plan).serving_batches(
        replace(plan, input_level=plan.input_level - 1, output_level=0, output_scale=2.0**10)
    )
    return next(lower.encrypt(np.zeros((1, 48))))


def _with_another_bit(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


_Parts = Callable[[Hall], Iterator[pb.PredictBatchRequest]]
_BAD: dict[str, tuple[_Parts, str, str]] = {
    "nothing": (lambda hall: iter(()), "HEADER_EXPECTED", "must be its header"),
    "a ciphertext first": (lambda hall: iter([message(hall.ciphertexts[0])]), "HEADER_EXPECTED", "header"),
    "an empty message": (lambda hall: iter([pb.PredictBatchRequest()]), "HEADER_EXPECTED", "header"),
    "two headers": (
        lambda hall: iter([pb.PredictBatchRequest(header=hall.header)] * 2),
        "CIPHERTEXT_EXPECTED",
        "only ciphertexts",
    ),
    "a header alone": (lambda hall: messages(hall.header, []), "CIPHERTEXT_INVALID", "0 came"),
    "one too few": (lambda hall: messages(hall.header, hall.ciphertexts[:-1]), "CIPHERTEXT_INVALID", "47 came"),
    "one too many": (
        lambda hall: messages(hall.header, [*hall.ciphertexts, hall.ciphertexts[0]]),
        "CIPHERTEXT_INVALID",
        "more came",
    ),
    "an unknown model": (
        lambda hall: messages(_changed(hall, model="melanoma"), hall.ciphertexts),
        "MODEL_NOT_FOUND",
        NAME,
    ),
    "the plan for one image": (
        lambda hall: messages(_changed(hall, plan_id=hall.client.plan.plan_id), hall.ciphertexts),
        "PLAN_CHANGED",
        "GetModel",
    ),
    "unknown keys": (
        lambda hall: messages(_changed(hall, key_set_id="0" * 64), hall.ciphertexts),
        "KEY_SET_NOT_FOUND",
        "not registered",
    ),
    "a path as keys": (
        lambda hall: messages(_changed(hall, key_set_id="../../keys"), hall.ciphertexts),
        "KEY_SET_ID_INVALID",
        "64 hexadecimal",
    ),
    "an empty ciphertext": (lambda hall: _instead(hall, 7, message(b"")), "CIPHERTEXT_INVALID", "number 7 has 0 bytes"),
    "a ciphertext too large": (
        lambda hall: _instead(hall, 7, message(bytes(_largest(hall) + 1))),
        "CIPHERTEXT_INVALID",
        "number 7 has",
    ),
    "a flipped bit": (
        lambda hall: _instead(
            hall,
            7,
            pb.PredictBatchRequest(
                ciphertext=pb.BatchCiphertext(
                    content=_with_another_bit(hall.ciphertexts[7]), sha256=digest([hall.ciphertexts[7]])
                )
            ),
        ),
        "DIGEST_MISMATCH",
        "ciphertext 7",
    ),
    "garbage": (lambda hall: _instead(hall, 47, message(bytes(1000))), "CIPHERTEXT_INVALID", "SEAL's header"),
    "a cut ciphertext": (
        lambda hall: _instead(hall, 0, message(hall.ciphertexts[0][:-1])),
        "CIPHERTEXT_INVALID",
        "cut off",
    ),
    "another level": (lambda hall: _instead(hall, 3, message(_other_level(hall))), "CIPHERTEXT_INVALID", "level"),
}


def _largest(hall: Hall) -> int:
    return sealformat.largest_ciphertext(hall.holder.plan.parameters, hall.holder.plan.input_level)


@pytest.mark.parametrize(("parts", "reason", "told"), _BAD.values(), ids=_BAD.keys())
def test_bad_batches_are_refused(hall: Hall, parts: _Parts, reason: str, told: str) -> None:
    error = _refused(hall.predict(parts(hall)))
    assert _reason(error) == reason
    assert told in str(error.details())


def test_a_refusal_comes_before_the_ciphertexts(hall: Hall) -> None:
    asked = threading.Event()

    def parts() -> Iterator[pb.PredictBatchRequest]:
        yield pb.PredictBatchRequest(header=_changed(hall, key_set_id="0" * 64))
        asked.wait(60)

    assert _reason(_refused(hall.predict(parts()))) == "KEY_SET_NOT_FOUND"
    asked.set()


@pytest.mark.parametrize("room", ["for nothing", "for less than comes"])
def test_a_full_store_refuses_and_keeps_nothing(hall: Hall, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    store = hall.service._store
    used = store._used()
    if room == "for nothing":
        monkeypatch.setattr(store, "_limit", used + 1000)
    else:
        monkeypatch.setattr("service.servicer.seeded_ciphertext_bytes", lambda parameters, level: 1000)
        monkeypatch.setattr(store, "_limit", used + 100_000)
    error = _refused(hall.predict())
    assert (error.code(), _reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert "one by one" in error.details()
    assert not hall.spools


def test_a_full_disk_refuses_and_keeps_nothing(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        written.append(len(data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "no space left on device")
        return len(data)

    with monkeypatch.context() as patched:
        patched.setattr("service.keystore.os.write", write)
        error = _refused(hall.predict())
    assert (error.code(), _reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert not hall.spools


def test_a_client_that_hangs_up_while_it_sends_leaves_nothing(hall: Hall) -> None:
    sent, over = threading.Event(), threading.Event()

    def parts() -> Iterator[pb.PredictBatchRequest]:
        yield from messages(hall.header, hall.ciphertexts[:10])
        sent.set()
        over.wait(60)

    call = hall.predict(parts())
    assert sent.wait(60)
    _until(lambda: len(hall.spools) == 1)
    assert stat.S_IMODE(hall.spools[0].stat().st_mode) == 0o600
    call.cancel()
    _until(hall.is_clean)
    over.set()


def test_a_silent_client_is_hung_up_on(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    from service import servicer

    patient = servicer.watched
    monkeypatch.setattr(servicer, "watched", lambda parts, context, seconds: patient(parts, context, 0.5))
    over = threading.Event()

    def parts() -> Iterator[pb.PredictBatchRequest]:
        yield from messages(hall.header, hall.ciphertexts[:10])
        over.wait(60)

    assert _refused(hall.predict(parts())).code() is grpc.StatusCode.CANCELLED
    over.set()


def test_a_client_that_hangs_up_stops_the_worker(hall: Hall) -> None:
    with _stopped(*hall.processes):
        call = hall.predict()
        _until(lambda: hall.pending == 1)
        call.cancel()
        _until(lambda: not hall.spools)
    _until(hall.is_clean)
    assert len(list(hall.predict())) == 2  # type: ignore[call-overload]


def test_batches_wait_for_each_other(hall: Hall) -> None:
    with _stopped(*hall.processes):
        calls = [hall.predict() for _ in range(2)]
        _until(lambda: len(hall.spools) == 2 and hall.pending == 1)
        time.sleep(0.3)
        assert hall.pending == 1
    replies = [list(call) for call in calls]  # type: ignore[call-overload]
    assert [len(answer) for answer in replies] == [2, 2]
    # Waiting for the other batch counts as waiting for a worker.
    assert max(answer[0].timing.queue_us for answer in replies) > 300_000


def test_a_deadline_counts_while_another_batch_runs(hall: Hall) -> None:
    with _stopped(*hall.processes):
        first = hall.predict()
        _until(lambda: hall.pending == 1)
        assert _refused(hall.predict(timeout=1.5)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        _until(lambda: len(hall.spools) == 1)
    assert len(list(first)) == 2  # type: ignore[call-overload]


def test_single_images_are_answered_while_a_batch_runs(hall: Hall) -> None:
    before = [process._jobs for process in hall.processes]
    with _stopped(*hall.processes):
        call = hall.predict()
        _until(lambda: [process._jobs for process in hall.processes] != before)
        (free,) = [process for process, jobs in zip(hall.processes, before, strict=True) if process._jobs == jobs]
        os.kill(free._process.pid, signal.SIGCONT)
        for _ in range(3):
            assert hall.stub.Predict(hall.single(), timeout=30).ciphertexts
        assert hall.pending == 1
    assert len(list(call)) == 2  # type: ignore[call-overload]


def test_a_worker_that_is_killed_costs_one_batch(hall: Hall) -> None:
    before = [process._jobs for process in hall.processes]
    with _stopped(*hall.processes):
        call = hall.predict()
        _until(lambda: [process._jobs for process in hall.processes] != before)
        (busy,) = [process for process, jobs in zip(hall.processes, before, strict=True) if process._jobs != jobs]
        os.kill(busy._process.pid, signal.SIGKILL)
        error = _refused(call)
    assert (error.code(), _reason(error)) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    assert not hall.spools
    assert len(list(hall.predict())) == 2  # type: ignore[call-overload]


def test_a_batch_has_a_time_limit_of_its_own(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit for single jobs that nothing could keep.
    for seconds, kept in ((60.0, True), (0.1, False)):
        limits = hall.service.settings.model_copy(update={"job_seconds": 1e-9, "batch_seconds": seconds})
        for process in hall.processes:
            monkeypatch.setattr(process, "_settings", limits)
        if kept:
            assert len(list(hall.predict())) == 2  # type: ignore[call-overload]
            continue
        with _stopped(*hall.processes):
            assert _reason(_refused(hall.predict())) == "WORKER_LOST"


def test_a_model_without_batches_says_why(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hall.service._servicer._batchless, NAME, "workers are too small")
    assert not hall.stub.GetModel(pb.GetModelRequest(name=NAME), timeout=60).HasField("batch")
    error = _refused(hall.predict())
    assert (error.code(), _reason(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "BATCHES_NOT_SERVED")
    assert "workers are too small" in error.details()
    assert _detail(error, error_details_pb2.PreconditionFailure) is not None


def test_keys_that_are_damaged_on_disk_are_asked_for_again(hall: Hall) -> None:
    path, _ = hall.service._store.path_of(hall.header.key_set_id)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert _reason(_refused(hall.predict())) == "KEY_SET_NOT_FOUND"
    hall.client.register()
    assert len(list(hall.predict())) == 2  # type: ignore[call-overload]


# ---- whether a model is served in batches at all


@pytest.fixture(scope="module")
def model(tiny: Bundle) -> Model:
    layouts = plan_bundle_layouts(tiny)
    return Model(tiny, layouts.plans, layouts.batch, layouts.no_batch, layouts.break_even)


def test_batches_need_a_plan_an_engine_and_memory(model: Model) -> None:
    assert why_no_batches(model, "vector", 1, 4096) == ""
    assert "seal evaluates no batches" in why_no_batches(model, "seal", 1, 4096)
    assert "switched batches off" in why_no_batches(model, "vector", 1, 4096, places=0)
    assert f"workers have {RESERVED_MB} MiB" in why_no_batches(model, "vector", 1, RESERVED_MB)
    without = replace(model, batch=None, no_batch="layer 0 has idle outputs")
    assert why_no_batches(without, "vector", 1, 4096) == "layer 0 has idle outputs"


def test_a_service_with_too_little_memory_says_so_when_it_starts(tiny: Bundle, tmp_path: Path) -> None:
    tiny.write(tmp_path / "tiny")
    settings = Settings(
        bundles=(tmp_path / "tiny",), port=0, store=tmp_path / "store", workers=1, worker_memory_mb=RESERVED_MB
    )
    with capture_logs() as logged:
        service = Service(settings)
    service.stop()
    (entry,) = [entry for entry in logged if entry["event"] == "no batches"]
    assert entry["model"] == NAME
    assert "MiB" in entry["why"]


@pytest.mark.parametrize(
    ("workers", "batches", "places"), [(1, None, 1), (4, None, 3), (4, 2, 2), (2, 9, 2), (2, 0, 0)]
)
def test_one_worker_is_left_for_single_images(workers: int, batches: int | None, places: int) -> None:
    assert Settings(workers=workers, batches=batches).batch_places == places


# ---- the files that batches wait in


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "store", 100_000, 3600)


def _names(store: KeyStore) -> list[str]:
    return [path.name for path in store.root.iterdir()]


def test_ciphertexts_are_read_as_they_were_written(store: KeyStore) -> None:
    written = [bytes([number]) * (number + 1) for number in range(5)]
    with store.spool(1000) as spool:
        for ciphertext in written:
            spool.write(ciphertext)
        assert list(spooled(spool.path)) == written
        assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600
    assert _names(store) == []


def test_a_spool_is_gone_whatever_happens(store: KeyStore) -> None:
    def fails() -> None:
        with store.spool(1000) as spool:
            spool.write(b"something")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert _names(store) == []
    assert store._spooled == {}


def test_a_spool_that_is_dropped_stops_its_reader(store: KeyStore) -> None:
    with store.spool(1000) as spool:
        for _ in range(3):
            spool.write(b"something")
        reading = spooled(spool.path)
        assert next(reading) == b"something"
        spool.drop()
        with pytest.raises(SpoolDroppedError):
            next(reading)
        with pytest.raises(SpoolDroppedError):
            next(spooled(spool.path))


def test_what_a_crash_left_is_deleted_at_the_next_start(store: KeyStore) -> None:
    left, other = store.root / f"{'a' * 32}.batch", store.root / "notes.batch"
    for path in (left, other):
        path.write_bytes(b"ciphertexts")
    again = KeyStore(store.root, 100_000, 3600)
    assert _names(again) == ["notes.batch"]


def test_a_spool_in_use_survives_a_sweep(store: KeyStore) -> None:
    with store.spool(1000) as spool:
        spool.write(b"something")
        store.sweep()
        assert list(spooled(spool.path)) == [b"something"]


def test_room_is_kept_for_what_will_come(store: KeyStore) -> None:
    info = KeySetInfo("model", "requirements")
    with store.spool(60_000) as spool:
        spool.write(bytes(10_000))
        with pytest.raises(Refused, match="no room to keep this batch"), store.spool(50_000):
            pass
        with pytest.raises(Refused, match="no room"), store.upload("0" * 64, info, 50_000, 0):
            pass
        with store.upload("0" * 64, info, 30_000, 0), pytest.raises(Refused), store.spool(20_000):
            pass
    store.delete("0" * 64)
    with store.spool(99_000):
        pass


def test_a_batch_that_grows_beyond_the_limit_is_refused(store: KeyStore) -> None:
    def grow() -> None:
        with store.spool(1000) as spool:
            for _ in range(11):
                spool.write(bytes(10_000))

    with pytest.raises(Refused) as refused:
        grow()
    assert refused.value.reason == "STORE_FULL"
    assert _names(store) == []
