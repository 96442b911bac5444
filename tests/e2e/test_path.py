"""The main job, over a real service process: from image files to decrypted logits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from typer.testing import CliRunner

from audit.demo import run_demo, running_service
from client_sdk import Client, KeysMissingError, RequestRefusedError, ServiceUnavailableError
from hemacrypt.cli import application
from hemacrypt.embedded import SampleCell, bundle_path
from hemacrypt.engines import DEFAULT_ENGINE
from hemacrypt.model.bundle import Bundle
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.recording import recording_proxy
from tests.large import write_large_bundle


def test_encrypted_answers_equal_clear_ones_within_the_bound(
    client: Client, bundle: Bundle, cells: list[SampleCell]
) -> None:
    for cell in cells:
        answer = client.predict(cell.path)
        clear = bundle.network(client.preprocessing(cell.path)[None])[0]
        assert np.abs(answer.logits - clear).max() <= client.plan.logit_error_bound
        assert answer.index == int(np.argmax(clear))
        assert answer.label == bundle.manifest.labels[answer.index]
        assert answer.size.upload <= 245_000
        assert answer.size.reply <= 80_000


def test_stream_gives_the_same_answers_in_order(client: Client, cells: list[SampleCell]) -> None:
    answers = list(client.predict_many(cell.path for cell in cells))
    assert [answer.source for answer in answers] == [str(cell.path) for cell in cells]
    for answer, cell in zip(answers, cells, strict=True):
        assert np.abs(answer.logits - client.predict(cell.path).logits).max() <= 2 * client.plan.logit_error_bound


def test_a_list_goes_in_pairs_and_every_answer_belongs_to_its_image(
    client: Client, bundle: Bundle, cells: list[SampleCell], service_directory: Path
) -> None:
    log = service_directory / "service.log"
    chosen = [*cells, *cells[::-1]][:7]
    before = log.read_text().count("answered")
    answers = list(client.predict_many([cell.path for cell in chosen]))
    assert log.read_text().count("answered") - before == 4
    assert [answer.source for answer in answers] == [str(cell.path) for cell in chosen]
    assert [answer.images for answer in answers] == [2] * 6 + [1]
    clear = bundle.network(np.stack([client.preprocessing(cell.path) for cell in chosen]))
    for answer, expected in zip(answers, clear, strict=True):
        assert np.abs(answer.logits - expected).max() <= answer.error_bound
        assert answer.index == int(np.argmax(expected))
    assert client.pair_plan is not None
    pair = client.pair_plan
    assert all(pair.logit_error_floor < answer.error_bound <= pair.logit_error_bound for answer in answers[:6])
    assert answers[6].error_bound <= client.plan.logit_error_bound


def test_stream_goes_on_after_a_refused_image(client: Client, address: str, cells: list[SampleCell]) -> None:
    good, _ = client._request(client.plan, [cells[0].path])
    bad = pb.PredictRequest()
    bad.CopyFrom(good)
    bad.ciphertexts[0] += b"more"
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
        replies = list(stub.PredictStream(iter([good, bad, good]), timeout=60))
    assert [reply.index for reply in replies] == [0, 1, 2]
    assert [reply.WhichOneof("result") for reply in replies] == ["prediction", "refusal", "prediction"]
    assert replies[1].refusal.reason == "DIGEST_MISMATCH"


def test_stream_answers_a_client_that_waits_for_each_answer(
    client: Client, address: str, cells: list[SampleCell]
) -> None:
    request, _ = client._request(client.plan, [cells[0].path])
    answered = threading.Semaphore(1)

    def one_by_one() -> Iterator[pb.PredictRequest]:
        for _ in range(3):
            assert answered.acquire(timeout=60)
            yield request

    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
        indices = []
        for reply in stub.PredictStream(one_by_one(), timeout=60):
            indices.append(reply.index)
            answered.release()
    assert indices == [0, 1, 2]


def test_silent_streams_are_ended_and_give_their_place_back(
    bundle: Bundle, cells: list[SampleCell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "service", str(bundle_path()), "--port", "0", "--workers", "1"]
    command += ["--store", str(tmp_path / "store"), "--port-file", str(tmp_path / "port")]
    limits = os.environ | {"HEMACRYPT_STREAMS": "2", "HEMACRYPT_STREAM_IDLE_SECONDS": "1.5"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=limits)
    try:
        _wait_until((tmp_path / "port").exists)
        target = f"127.0.0.1:{int((tmp_path / 'port').read_text())}"
        silence = threading.Event()

        def silent() -> Iterator[pb.PredictRequest]:
            silence.wait(60)
            yield from ()

        with grpc.insecure_channel(target) as channel:
            stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
            idle = [stub.PredictStream(silent(), timeout=60) for _ in range(2)]
            time.sleep(0.3)  # let them arrive first, or the next call may take a place of theirs
            # Both places are taken: another stream is refused, a short call is not.
            _wait_until(lambda: _refused_for_places(stub))
            assert stub.ListModels(pb.ListModelsRequest(), timeout=10).models
            for stream in idle:
                with pytest.raises(grpc.RpcError) as ended:
                    next(stream)
                assert ended.value.code() is grpc.StatusCode.CANCELLED
            _wait_until(lambda: not _refused_for_places(stub))
            silence.set()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def _refused_for_places(stub: pb_grpc.EncryptedInferenceStub) -> bool:
    call = stub.PredictStream(iter(()), timeout=10)
    return bool(call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_stream_reports_an_unreadable_image(client: Client, cells: list[SampleCell], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="does not exist"):
        list(client.predict_many([cells[0].path, tmp_path / "missing.png"]))


def test_pixels_file_and_bmp_give_the_same_answer(client: Client, cells: list[SampleCell], tmp_path: Path) -> None:
    with Image.open(cells[0].path) as image:
        pixels = np.asarray(image.convert("RGB"))
        image.convert("RGB").save(tmp_path / "cell.bmp")
    answers = [client.predict(given) for given in (cells[0].path, tmp_path / "cell.bmp", pixels)]
    for answer in answers[1:]:
        assert np.abs(answer.logits - answers[0].logits).max() <= 2 * client.plan.logit_error_bound


def test_keys_survive_a_restart_and_a_deleted_key_set_is_gone(
    bundle: Bundle, cells: list[SampleCell], tmp_path: Path
) -> None:
    name, keys = bundle.manifest.name, tmp_path / "keys"
    with (
        running_service(bundle_path(), tmp_path, 1, tmp_path / "first.log") as target,
        Client(target, name, key_directory=keys) as first,
    ):
        key_set = first.prepare()
        before = first.predict(cells[0].path)
    with (
        running_service(bundle_path(), tmp_path, 1, tmp_path / "second.log") as target,
        Client(target, name, key_directory=keys) as second,
    ):
        assert second._stub.GetKeySet(pb.GetKeySetRequest(key_set_id=key_set)).state == pb.KEY_SET_STATE_READY
        after = second.predict(cells[0].path)
        assert np.abs(before.logits - after.logits).max() <= 2 * second.plan.logit_error_bound
        assert second.forget() is True
        assert second.forget() is False
        assert not (tmp_path / "store" / key_set).exists()
        request, _ = second._request(second.plan, [cells[0].path])
        with pytest.raises(RequestRefusedError) as refused:
            second._predict_once(request)
        assert refused.value.reason == "KEY_SET_NOT_FOUND"
        # The client notices and registers its keys again.
        again = second.predict(cells[0].path)
        assert again.index == before.index


def test_a_broken_upload_is_resumed_where_it_broke_off(address: str, bundle: Bundle, tmp_path: Path) -> None:
    with recording_proxy(address) as (proxied, wire):
        with Client(proxied, bundle.manifest.name, key_directory=tmp_path / "keys") as flaky:
            key_set = flaky.generate_keys()
            total = len(flaky.keys.evaluation_blob())
            wire.cut_after = len(wire.to_service) + total // 2
            with pytest.raises(ServiceUnavailableError):
                flaky._upload(flaky.keys.evaluation_blob(), key_set, lambda sent, of: None)
        with Client(address, bundle.manifest.name, key_directory=tmp_path / "keys") as steady:
            received = _wait_for_partial(steady, key_set)
            assert 0 < received < total
            sent: list[int] = []
            steady.register(lambda done, of: sent.append(done))
            assert min(sent) > received
            state = steady._stub.GetKeySet(pb.GetKeySetRequest(key_set_id=key_set))
            assert (state.state, state.received_bytes) == (pb.KEY_SET_STATE_READY, total)
            steady.forget()


def _wait_for_partial(client: Client, key_set: str) -> int:
    """Return how much of an upload has arrived once the service has noticed that the connection is gone."""
    last = -1
    for _ in range(100):
        state = client._stub.GetKeySet(pb.GetKeySetRequest(key_set_id=key_set))
        if state.state == pb.KEY_SET_STATE_PARTIAL and state.received_bytes == last:
            return int(last)
        last = state.received_bytes
        time.sleep(0.1)
    raise AssertionError("the upload never settled")


def test_registering_twice_uploads_once(client: Client) -> None:
    sent: list[tuple[int, int]] = []
    client.register(lambda done, of: sent.append((done, of)))
    total = len(client.keys.evaluation_blob())
    assert sent == [(total, total)]


def test_a_deadline_is_honoured(client: Client, cells: list[SampleCell], address: str) -> None:
    request, _ = client._request(client.plan, [cells[0].path])
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
        # One evaluation is over sooner than any deadline worth naming; forty before it are not.
        before = [stub.Predict.future(request) for _ in range(40)]
        with pytest.raises(grpc.RpcError) as error:
            stub.Predict(request, timeout=0.02)
        assert all(call.result().ciphertexts for call in before)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert client.predict(cells[0].path).label


def test_health_and_reflection_answer(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "hemacrypt.v1.EncryptedInference"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    assert "hemacrypt.v1.EncryptedInference" in {entry.name for entry in listed.list_services_response.service}


def test_the_health_check_command_tells_a_service_from_none(address: str) -> None:
    port = address.rsplit(":", 1)[1]
    for given, expected in ((port, 0), ("1", 1)):
        environment = os.environ | {"HEMACRYPT_PORT": given}
        done = subprocess.run([sys.executable, "-m", "service.healthcheck"], env=environment, capture_output=True)
        assert done.returncode == expected


def test_a_stopping_service_finishes_what_runs(bundle: Bundle, cells: list[SampleCell], tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "service", str(bundle_path()), "--port", "0", "--port-file", str(port_file)]
    command += ["--store", str(tmp_path / "store"), "--workers", "1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until(port_file.exists)
        target = f"127.0.0.1:{int(port_file.read_text())}"
        with Client(target, bundle.manifest.name, key_directory=tmp_path / "keys") as client:
            client.prepare()
            client.predict(cells[0].path)
            request, _ = client._request(client.plan, [cells[0].path])
            running = client._stub.Predict.future(request, timeout=60)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert client._holder(client.plan).decrypt(running.result(timeout=60).ciphertexts).shape == (1, 2)
            assert process.wait(timeout=60) == 0
            with pytest.raises(ServiceUnavailableError):
                client.predict(cells[0].path)
    finally:
        process.kill()
        process.wait()


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_the_reference_engine_serves_too(bundle: Bundle, cells: list[SampleCell], tmp_path: Path) -> None:
    assert DEFAULT_ENGINE == "vector"
    with (
        running_service(bundle_path(), tmp_path, 1, tmp_path / "log", engine="seal") as target,
        Client(target, bundle.manifest.name, key_directory=tmp_path / "keys") as client,
    ):
        client.prepare()
        chosen = [cell.path for cell in cells[::2]]
        clear = bundle.network(np.stack([client.preprocessing(path) for path in chosen]))
        for path, expected in zip(chosen[:2], clear, strict=False):
            assert np.abs(client.predict(path).logits - expected).max() <= client.plan.logit_error_bound
        # SEAL's digits make the errors of pairs too large for what the margins ask for.
        assert client.pair_plan is None
        answers = list(client.predict_many(chosen))
        assert [answer.images for answer in answers] == [1, 1, 1]
        for answer, expected in zip(answers, clear, strict=True):
            assert np.abs(answer.logits - expected).max() <= answer.error_bound


def test_the_demo_agrees_and_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    assert run_demo(tmp_path, 4, 1, Console()) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 4
    assert report["disagreements"] == 0
    assert 0 < report["max_logit_error"] <= report["logit_error_bound"]
    assert report["encrypted_accuracy"] == report["clear_accuracy"]
    for stage in ("encrypt", "upload", "compute", "decrypt"):
        assert 0 < report["ms"][stage]["median"] <= report["ms"][stage]["p95"]
    assert report["bytes"]["upload_per_image"] <= 245_000
    assert report["bytes"]["reply_per_image"] <= 80_000
    assert report["bytes"]["evaluation_keys"] <= 40_000_000
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size[0] > 1000
    printed = capsys.readouterr().out
    assert "disagree on 0 of 4" in printed
    assert "not a diagnosis" in printed


def test_the_commands_follow_each_other(address: str, cells: list[SampleCell], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("hemacrypt")
        where = ["--server", address, "--keys", str(tmp_path / "keys")]
        return subprocess.run([program, *arguments, *where], capture_output=True, text=True)

    made = run("keygen")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "keys" / "secret.key").stat().st_mode & 0o777 == 0o600
    again = run("keygen")
    assert again.returncode == 1
    assert "--replace" in again.stderr
    registered = run("register")
    assert registered.returncode == 0, registered.stderr
    predicted = run("predict", "--json", str(cells[0].path))
    assert predicted.returncode == 0, predicted.stderr
    record = json.loads(predicted.stdout.splitlines()[-1])
    assert record["label"] in ("normal", "leukaemic")
    assert abs(sum(record["probabilities"].values()) - 1) < 1e-9
    assert "not a diagnosis" in record["note"]
    refused = run("predict", str(tmp_path / "missing.png"))
    assert refused.returncode == 1
    assert "does not exist" in refused.stderr
    forgotten = run("forget")
    assert forgotten.returncode == 0, forgotten.stderr


def test_predicting_without_keys_says_what_to_do(address: str, cells: list[SampleCell], tmp_path: Path) -> None:
    with (
        Client(address, "leukaemia", key_directory=tmp_path / "none") as keyless,
        pytest.raises(KeysMissingError, match="hemacrypt keygen"),
    ):
        keyless.predict(cells[0].path)


def test_the_demo_shows_a_model_that_reads_64_pixels(tmp_path: Path) -> None:
    write_large_bundle(tmp_path / "large")
    arguments = ["demo", "--model", str(tmp_path / "large"), "--limit", "4", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(application(), arguments)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["images"], report["disagreements"]) == (4, 0)
