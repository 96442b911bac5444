"""The service over a real channel: incidents, a full queue, lost workers, limits, and keys that are dropped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from client_sdk import Client
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from service.pool import Job
from service.server import Service
from service.settings import Settings
from tests.service.conftest import Inside, Keys, Until

SECRET = "secret: logits of patient H12 are 3.14159"


def _detail(error: grpc.RpcError, kind: type[Message]) -> Any:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


def _reason(error: grpc.RpcError) -> str:
    return str(_detail(error, error_details_pb2.ErrorInfo).reason)


def _fail(*arguments: object, **named: object) -> NoReturn:
    raise RuntimeError(SECRET)


@pytest.mark.parametrize(
    ("method", "request_message", "broken"),
    [
        ("GetKeySet", pb.GetKeySetRequest(key_set_id="0" * 64), "status"),
        ("DeleteKeySet", pb.DeleteKeySetRequest(key_set_id="0" * 64), "delete"),
        ("Predict", None, "path_of"),
    ],
)
def test_an_unforeseen_error_becomes_an_incident(
    inside: Inside,
    image: pb.PredictRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    method: str,
    request_message: Message | None,
    broken: str,
) -> None:
    monkeypatch.setattr(inside.service._store, broken, _fail)
    with capture_logs() as logged, pytest.raises(grpc.RpcError) as error:
        getattr(inside.stub, method)(request_message or image, timeout=60)
    assert error.value.code() is grpc.StatusCode.INTERNAL
    info = _detail(error.value, error_details_pb2.ErrorInfo)
    assert info.reason == "INTERNAL"
    assert info.metadata["incident"] in error.value.details()
    assert SECRET not in str(error.value)
    assert SECRET not in str(error.value.trailing_metadata())
    (entry,) = [entry for entry in logged if entry["event"] == "incident"]
    assert (entry["method"], entry["error"]) == (method, "RuntimeError")
    assert entry["incident"] == info.metadata["incident"]
    assert any("test_servicer.py" in place for place in entry["places"])
    assert SECRET not in str(logged)
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err


def test_an_incident_in_a_stream_is_told_and_the_stream_goes_on(
    inside: Inside, image: pb.PredictRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of, calls = inside.service._store.path_of, []

    def fails_once(key_set_id: str) -> object:
        calls.append(key_set_id)
        return _fail() if len(calls) == 1 else path_of(key_set_id)

    monkeypatch.setattr(inside.service._store, "path_of", fails_once)
    with capture_logs() as logged:
        broken, fine = inside.stub.PredictStream(iter([image, image]), timeout=60)
    assert broken.refusal.reason == "INTERNAL"
    assert SECRET not in str(broken) + str(logged)
    assert fine.WhichOneof("result") == "prediction"


def test_the_service_still_answers(inside: Inside, image: pb.PredictRequest, client: Client) -> None:
    reply = inside.stub.Predict(image, timeout=60)
    assert client._holder(client.plan).decrypt(reply.ciphertexts).shape == (1, 2)


def test_a_full_queue_refuses_with_a_time_to_come_back(inside: Inside, image: pb.PredictRequest, until: Until) -> None:
    os.kill(inside.worker, signal.SIGSTOP)
    try:
        waiting = [inside.stub.Predict.future(image, timeout=60) for _ in range(2)]
        until(lambda: inside.pending == 2)
        with pytest.raises(grpc.RpcError) as error:
            inside.stub.Predict(image, timeout=60)
    finally:
        os.kill(inside.worker, signal.SIGCONT)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert _reason(error.value) == "QUEUE_FULL"
    assert _detail(error.value, error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1
    for call in waiting:
        assert call.result().ciphertexts


def test_a_client_that_hangs_up_frees_its_place(inside: Inside, image: pb.PredictRequest, until: Until) -> None:
    os.kill(inside.worker, signal.SIGSTOP)
    try:
        running = inside.stub.Predict.future(image, timeout=60)
        until(lambda: inside.pending == 1)
        waiting = inside.stub.Predict.future(image, timeout=60)
        until(lambda: inside.pending == 2)
        waiting.cancel()
        until(lambda: inside.pending == 1)
        third = inside.stub.Predict.future(image, timeout=60)
        until(lambda: inside.pending == 2)
    finally:
        os.kill(inside.worker, signal.SIGCONT)
    assert running.result().ciphertexts
    assert third.result().ciphertexts


def test_a_lost_worker_is_told_with_a_time_to_come_back(inside: Inside, image: pb.PredictRequest, until: Until) -> None:
    before = inside.worker
    os.kill(before, signal.SIGSTOP)
    lost = inside.stub.Predict.future(image, timeout=120)
    until(lambda: inside.pending == 1)
    os.kill(before, signal.SIGKILL)
    error = lost.exception()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert _reason(error) == "WORKER_LOST"
    assert _detail(error, error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1
    assert inside.stub.Predict(image, timeout=120).ciphertexts
    assert inside.worker != before


def test_a_deadline_that_passes_in_the_queue_frees_the_place(
    inside: Inside, image: pb.PredictRequest, until: Until
) -> None:
    os.kill(inside.worker, signal.SIGSTOP)
    try:
        running = inside.stub.Predict.future(image, timeout=60)
        until(lambda: inside.pending == 1)
        with pytest.raises(grpc.RpcError) as error:
            inside.stub.Predict(image, timeout=0.3)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: inside.pending == 1)
    finally:
        os.kill(inside.worker, signal.SIGCONT)
    assert running.result().ciphertexts


@pytest.mark.parametrize("size", [10_000_000, 6_000_000])
def test_a_message_that_is_far_too_large_is_refused_by_grpc(
    inside: Inside, image: pb.PredictRequest, size: int
) -> None:
    large = pb.PredictRequest()
    large.CopyFrom(image)
    large.ciphertexts[0] = bytes(size)
    with pytest.raises(grpc.RpcError) as error:
        inside.stub.Predict(large, timeout=60)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # It never came as far as the service, which would have said why.
    assert rpc_status.from_call(error.value) is None  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as error:
        inside.stub.RegisterKeys(iter([pb.RegisterKeysRequest(chunk=bytes(size))]), timeout=60)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_limits_that_are_told_hold(inside: Inside, image: pb.PredictRequest) -> None:
    told = inside.stub.GetModel(pb.GetModelRequest(name=image.model), timeout=60)
    padded = pb.PredictRequest()
    padded.CopyFrom(image)
    for size, reason in (
        (told.largest_ciphertext, "DIGEST_MISMATCH"),
        (told.largest_ciphertext + 1, "CIPHERTEXT_INVALID"),
    ):
        padded.ciphertexts[0] = bytes(size)
        with pytest.raises(grpc.RpcError) as error:
            inside.stub.Predict(padded, timeout=60)
        assert _reason(error.value) == reason
    header = pb.KeySetHeader(
        model=image.model, plan_id=image.plan_id, key_set_id="4" * 64, total_bytes=told.largest_key_set
    )
    for size, reason in ((told.largest_key_set, "UPLOAD_INCOMPLETE"), (told.largest_key_set + 1, "KEYS_TOO_LARGE")):
        header.total_bytes = size
        with pytest.raises(grpc.RpcError) as error:
            inside.stub.RegisterKeys(iter([pb.RegisterKeysRequest(header=header)]), timeout=60)
        assert _reason(error.value) == reason
    inside.stub.DeleteKeySet(pb.DeleteKeySetRequest(key_set_id="4" * 64), timeout=60)


def _upload_again(inside: Inside, client: Client) -> None:
    with Client(inside.address, client.model, key_directory=client.keys.path) as registrar:
        registrar.register()


def test_deleting_keys_drops_them_from_the_workers(
    inside: Inside, image: pb.PredictRequest, keys: Keys, client: Client
) -> None:
    assert inside.stub.Predict(image, timeout=60).ciphertexts
    path, _ = inside.service._store.path_of(keys.name)
    assert inside.stub.DeleteKeySet(pb.DeleteKeySetRequest(key_set_id=keys.name), timeout=60).existed
    # The store refuses such a request before any worker sees it; ask the worker itself what it still has.
    outcome = inside.service._pool.submit(
        Job("predict", image.model, image.plan_id, keys.name, path, tuple(image.ciphertexts))
    ).result()
    assert (outcome.header["ok"], outcome.header.get("refusal")) == (False, "missing")
    with pytest.raises(grpc.RpcError) as error:
        inside.stub.Predict(image, timeout=60)
    assert _reason(error.value) == "KEY_SET_NOT_FOUND"
    _upload_again(inside, client)
    assert inside.stub.Predict(image, timeout=60).ciphertexts


def test_keys_damaged_on_the_services_disk_are_deleted_and_asked_for_again(
    inside: Inside, image: pb.PredictRequest, keys: Keys, client: Client
) -> None:
    path, _ = inside.service._store.path_of(keys.name)
    inside.service._pool.forget(keys.name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(grpc.RpcError) as error:
        inside.stub.Predict(image, timeout=60)
    assert (error.value.code(), _reason(error.value)) == (grpc.StatusCode.NOT_FOUND, "KEY_SET_NOT_FOUND")
    state = inside.stub.GetKeySet(pb.GetKeySetRequest(key_set_id=keys.name), timeout=60)
    assert state.state == pb.KEY_SET_STATE_ABSENT
    # The client hears that, uploads its keys again and asks once more, all by itself.
    with Client(inside.address, client.model, key_directory=client.keys.path) as hospital:
        from hemacrypt.embedded import sample

        assert hospital.predict(sample()[0].path).label in hospital.plan.labels


@pytest.mark.parametrize("gone", ["keys", "info.json"])
def test_a_file_that_is_missing_in_the_store_is_no_incident(
    inside: Inside, image: pb.PredictRequest, keys: Keys, client: Client, gone: str
) -> None:
    path, _ = inside.service._store.path_of(keys.name)
    inside.service._pool.forget(keys.name)
    path.with_name(gone).unlink()
    try:
        state = inside.stub.GetKeySet(pb.GetKeySetRequest(key_set_id=keys.name), timeout=60)
        assert state.state == pb.KEY_SET_STATE_ABSENT
        with pytest.raises(grpc.RpcError) as error:
            inside.stub.Predict(image, timeout=60)
        assert _reason(error.value) == "KEY_SET_NOT_FOUND"
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
        _upload_again(inside, client)
    assert inside.stub.Predict(image, timeout=60).ciphertexts


def test_keys_of_other_parameters_are_refused_before_a_worker_sees_them(
    inside: Inside, image: pb.PredictRequest, keys: Keys
) -> None:
    information = inside.service._store.path_of(keys.name)[0].with_name("info.json")
    content = information.read_text()
    information.write_text(json.dumps(json.loads(content) | {"requirements_id": "another", "model": "melanoma"}))
    try:
        with pytest.raises(grpc.RpcError) as error:
            inside.stub.Predict(image, timeout=60)
    finally:
        information.write_text(content)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert _reason(error.value) == "KEYS_FOR_OTHER_PARAMETERS"
    assert "melanoma" in error.value.details()


def test_a_store_without_room_refuses_an_upload_and_keeps_nothing(
    inside: Inside, image: pb.PredictRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside.service._store, "_limit", 1000)
    before = sorted(Path(inside.service._store.root).rglob("*"))
    header = pb.KeySetHeader(model=image.model, plan_id=image.plan_id, key_set_id="5" * 64, total_bytes=2000)
    with pytest.raises(grpc.RpcError) as error:
        inside.stub.RegisterKeys(iter([pb.RegisterKeysRequest(header=header)]), timeout=60)
    assert (error.value.code(), _reason(error.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert sorted(Path(inside.service._store.root).rglob("*")) == before


def test_nothing_personal_is_logged(inside: Inside, image: pb.PredictRequest, keys: Keys) -> None:
    with capture_logs() as logged:
        inside.stub.Predict(image, timeout=60)
        inside.stub.GetKeySet(pb.GetKeySetRequest(key_set_id=keys.name), timeout=60)
        list(inside.stub.PredictStream(iter([image]), timeout=60))
    # Whoever knows the name of a key set can delete it, so it is no business of the log.
    assert keys.name not in str(logged)
    assert image.ciphertext_sha256 not in str(logged)


@contextmanager
def _small_service(bundle: Path, store: Path, **changes: Any) -> Iterator[tuple[Service, Any]]:
    values: dict[str, Any] = {"bundles": (bundle,), "port": 0, "store": store, "workers": 1, "grace_seconds": 0}
    service = Service(Settings(**(values | changes)))
    service.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            yield service, pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
    finally:
        service.stop()


def _held(first: list[Any], until_set: threading.Event) -> Iterator[Any]:
    """Send some messages and then stay silent with the stream open."""
    yield from first
    until_set.wait(60)


def test_streams_are_limited_and_places_come_back(small_bundle: Path, tmp_path: Path, until: Until) -> None:
    refusals: list[grpc.RpcError] = []

    def refused() -> bool:
        try:
            return list(stub.PredictStream(iter([]), timeout=60)) != []
        except grpc.RpcError as error:
            refusals.append(error)
            return True

    with _small_service(small_bundle, tmp_path / "store", streams=1, stream_idle_seconds=600) as (_, stub):
        enough = threading.Event()
        assert not refused()
        stream = stub.PredictStream(_held([], enough), timeout=600)
        time.sleep(0.3)  # let it arrive first, or the next call may take its place
        until(refused)
        # Calls that are no streams go on.
        assert stub.ListModels(pb.ListModelsRequest(), timeout=60).models
        stream.cancel()
        until(lambda: not refused())
        enough.set()
    for error in refusals:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert _reason(error) == "TOO_MANY_STREAMS"
        assert _detail(error, error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1


def _is_hung_up_on(call: Callable[[], object]) -> bool:
    with pytest.raises(grpc.RpcError) as error:
        call()
    # The place of an earlier stream is given back a moment after its client was told, so "too many" may come first.
    assert error.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return bool(error.value.code() is grpc.StatusCode.CANCELLED)


def test_a_silent_client_is_hung_up_on(small_bundle: Path, tmp_path: Path, until: Until) -> None:
    with _small_service(small_bundle, tmp_path / "store", streams=1, stream_idle_seconds=0.2) as (service, stub):
        enough = threading.Event()
        plan_id = service.models["small"].plans[0].public.plan_id
        header = pb.KeySetHeader(model="small", plan_id=plan_id, key_set_id="6" * 64, total_bytes=100)
        upload = [pb.RegisterKeysRequest(header=header), pb.RegisterKeysRequest(chunk=b"some")]
        until(lambda: _is_hung_up_on(lambda: stub.RegisterKeys(_held(upload, enough), timeout=600)))
        until(lambda: _is_hung_up_on(lambda: list(stub.PredictStream(_held([], enough), timeout=600))))
        enough.set()


def test_a_client_that_hangs_up_during_an_upload_is_no_incident(
    inside: Inside, image: pb.PredictRequest, until: Until
) -> None:
    enough = threading.Event()
    header = pb.KeySetHeader(model=image.model, plan_id=image.plan_id, key_set_id="7" * 64, total_bytes=100)
    messages = [pb.RegisterKeysRequest(header=header), pb.RegisterKeysRequest(chunk=b"some")]
    store = inside.service._store
    with capture_logs() as logged:
        call = inside.stub.RegisterKeys.future(_held(messages, enough), timeout=600)
        until(lambda: store.status("7" * 64).received == 4)
        call.cancel()
        until(lambda: not store._uploading)
    enough.set()
    assert [entry for entry in logged if entry["event"] == "incident"] == []
    assert store.status("7" * 64).received == 4
    assert inside.stub.DeleteKeySet(pb.DeleteKeySetRequest(key_set_id="7" * 64), timeout=60).existed
