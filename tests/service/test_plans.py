"""Several plans for a model and several ciphertexts for a request: what is admitted, and what is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from client_sdk import Client
from client_sdk._crypto import KeyHolder
from hemacrypt.embedded import bundle_path
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.preprocess import Pixels, Preprocessing
from hemacrypt.seal.evaluation_keys import key_set_id
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import digest
from service.catalogue import load_models
from service.server import Service
from service.settings import Settings
from service.worker import Worker, apart


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logistic regression on 40x40 pixels called ``wide``: 4800 values, which no ciphertext of degree 4096 holds."""
    random = np.random.default_rng(6)
    network = CollapsedNetwork((3, 40, 40), (Dense(random.normal(size=(2, 4800)) / 70, random.normal(size=2)),))
    preprocessing = Preprocessing(image_size=80, crop=80, block=2)
    bundle = Bundle.create(network, name="wide", labels=("no", "yes"), preprocessing=preprocessing)
    directory = tmp_path_factory.mktemp("models") / "wide"
    bundle.write(directory)
    return directory


@dataclass(frozen=True)
class Wide:
    """A service with the wide and the small model, and a client of the wide one whose keys are registered."""

    service: Service
    client: Client
    stub: pb_grpc.EncryptedInferenceStub
    bundle: Bundle

    def request(self, pixels: Pixels) -> pb.PredictRequest:
        return self.client._request(self.client.plan, [pixels])[0]


@pytest.fixture(scope="module")
def wide(wide_bundle: Path, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wide]:
    directory = tmp_path_factory.mktemp("wide")
    settings = Settings(
        bundles=(wide_bundle, small_bundle),
        port=0,
        store=directory / "store",
        cache=directory / "cache",
        workers=1,
        threads=2,
        grace_seconds=0,
    )
    service = Service(settings)
    service.start()
    try:
        address = f"127.0.0.1:{service.port}"
        with (
            grpc.insecure_channel(address) as channel,
            Client(address, "wide", key_directory=directory / "keys") as client,
        ):
            client.prepare()
            stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
            yield Wide(service, client, stub, Bundle.read(wide_bundle))
    finally:
        service.stop()


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return np.random.default_rng(7).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.fixture
def request_message(wide: Wide, pixels: Pixels) -> pb.PredictRequest:
    return wide.request(pixels)


def _refusal(wide: Wide, request: pb.PredictRequest) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.RpcError) as error:
        wide.stub.Predict(request, timeout=60)
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    if status is not None:
        assert status.details[0].Unpack(info)
    return error.value.code(), info.reason, str(error.value.details())


def test_an_image_over_several_ciphertexts_is_answered(wide: Wide, pixels: Pixels) -> None:
    request = wide.request(pixels)
    assert len(request.ciphertexts) == wide.client.plan.input_layout.ciphertexts > 1
    clear = wide.bundle.network(wide.client.preprocessing(pixels)[None])[0]
    assert np.abs(wide.client.predict(pixels).logits - clear).max() <= wide.client.plan.logit_error_bound


_Change = Callable[[list[bytes]], list[bytes]]
_WRONG_LISTS: dict[str, tuple[_Change, str]] = {
    "none": (lambda parts: [], "0 ciphertexts; the plan lays its input over"),
    "one too few": (lambda parts: parts[:-1], "ciphertexts; the plan lays its input over"),
    "one too many": (lambda parts: [*parts, parts[0]], "ciphertexts; the plan lays its input over"),
    "all in one": (lambda parts: [b"".join(parts)], "1 ciphertexts; the plan lays its input over"),
    "ten thousand of nothing": (lambda parts: [b""] * 10_000, "10000 ciphertexts"),
    "an empty one": (lambda parts: [*parts[:-1], b""], "0 bytes; expected 1 to"),
    "an empty first": (lambda parts: [b"", *parts[1:]], "0 bytes; expected 1 to"),
    "one too large": (lambda parts: [*parts[:-1], bytes(200_000)], "200000 bytes; expected 1 to"),
    "another boundary": (lambda parts: [parts[0] + parts[1][:1], parts[1][1:], *parts[2:]], "cut off or extended"),
    "another order of halves": (lambda parts: [parts[0][:50], parts[0][50:] + parts[1], *parts[2:]], "cut off"),
    "nonsense at the end": (lambda parts: [*parts[:-1], b"nonsense"], "no SEAL object"),
}


@pytest.mark.parametrize(("change", "told"), _WRONG_LISTS.values(), ids=_WRONG_LISTS.keys())
def test_lists_that_are_not_the_plans_are_refused(
    wide: Wide, request_message: pb.PredictRequest, change: _Change, told: str
) -> None:
    request_message.ciphertexts[:] = change(list(request_message.ciphertexts))
    request_message.ciphertext_sha256 = digest(request_message.ciphertexts)
    code, reason, text = _refusal(wide, request_message)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CIPHERTEXT_INVALID")
    assert told in text


_DAMAGES: dict[str, _Change] = {
    "a bit of the first": lambda parts: [parts[0][:100] + bytes([parts[0][100] ^ 1]) + parts[0][101:], *parts[1:]],
    "a bit of the last": lambda parts: [*parts[:-1], parts[-1][:-1] + bytes([parts[-1][-1] ^ 128])],
    "the order": lambda parts: parts[::-1],
    "the first twice": lambda parts: [parts[0], parts[0], *parts[2:]],
}


@pytest.mark.parametrize("change", _DAMAGES.values(), ids=_DAMAGES.keys())
def test_the_digest_covers_all_ciphertexts_in_order(
    wide: Wide, request_message: pb.PredictRequest, change: _Change
) -> None:
    request_message.ciphertexts[:] = change(list(request_message.ciphertexts))
    assert _refusal(wide, request_message)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH")


@pytest.mark.parametrize("sent", ["", "0" * 64, "none"])
def test_a_digest_that_is_none_is_refused(wide: Wide, request_message: pb.PredictRequest, sent: str) -> None:
    request_message.ciphertext_sha256 = sent
    assert _refusal(wide, request_message)[1] == "DIGEST_MISMATCH"


def test_a_list_that_is_far_too_large_is_refused_by_grpc(wide: Wide, request_message: pb.PredictRequest) -> None:
    request_message.ciphertexts.extend([request_message.ciphertexts[0]] * 64)
    assert _refusal(wide, request_message)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_largest_request_comes_as_far_as_the_service(wide: Wide, request_message: pb.PredictRequest) -> None:
    told = wide.stub.GetModel(pb.GetModelRequest(name="wide"), timeout=60)
    request_message.ciphertexts[:] = [bytes(told.largest_ciphertext)] * len(request_message.ciphertexts)
    assert _refusal(wide, request_message)[1] == "DIGEST_MISMATCH"


def test_plans_of_other_models_are_refused(wide: Wide, request_message: pb.PredictRequest) -> None:
    for plan_id in (wide.service.models["small"].plans[0].public.plan_id, "", "f" * 64, request_message.plan_id[:-1]):
        request_message.plan_id = plan_id
        assert _refusal(wide, request_message)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "PLAN_CHANGED")


def test_keys_of_another_model_are_refused(wide: Wide, tmp_path: Path) -> None:
    """Two models on one service, whose plans need different keys: each key set serves its own."""
    address = f"127.0.0.1:{wide.service.port}"
    models = wide.service.models
    assert models["small"].plans[0].public.requirements_id != models["wide"].plans[0].public.requirements_id
    with Client(address, "small", key_directory=tmp_path / "keys") as client:
        client.prepare()
        small = np.random.default_rng(8).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        request, _ = client._request(client.plan, [small])
        assert wide.stub.Predict(request, timeout=60).ciphertexts
        request.key_set_id = wide.client.keys.info().key_set_id
        code, reason, text = _refusal(wide, request)
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEYS_FOR_OTHER_PARAMETERS")
        assert "model wide" in text
        assert client.forget()


def test_keys_may_be_registered_for_any_plan_of_a_model(wide: Wide, tmp_path: Path) -> None:
    address = f"127.0.0.1:{wide.service.port}"
    with Client(address, "small", key_directory=tmp_path / "keys") as client:
        pair = client.pair_plan
        assert pair is not None
        assert pair.plan_id != client.plan.plan_id
        name = client.generate_keys()
        blob = client.keys.evaluation_blob()
        header = pb.KeySetHeader(model="small", plan_id=pair.plan_id, key_set_id=name, total_bytes=len(blob))
        messages = [pb.RegisterKeysRequest(header=header), pb.RegisterKeysRequest(chunk=blob)]
        assert wide.stub.RegisterKeys(iter(messages), timeout=60).key_set_id == name
        images = list(np.random.default_rng(9).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
        clear = wide.service.models["small"].bundle.network(np.stack([client.preprocessing(one) for one in images]))
        for answer, expected in zip(client.predict_many(images), clear, strict=True):
            assert np.abs(answer.logits - expected).max() <= answer.error_bound
        assert client.forget()


@pytest.mark.parametrize("budget", [None, 20_000_000])
def test_all_plans_of_a_model_need_the_same_keys(wide_bundle: Path, small_bundle: Path, budget: int | None) -> None:
    for model in load_models([wide_bundle, small_bundle, bundle_path()], budget).values():
        assert model.plans[0].public.images == 1
        assert len({plan.public.plan_id for plan in model.plans}) == len(model.plans)
        assert len({plan.public.requirements_id for plan in model.plans}) == 1
        assert model.plan(model.plans[-1].public.plan_id) is model.plans[-1]
        assert model.plan("f" * 64) is None


def _arguments(service: Service) -> dict[str, Any]:
    """Return what a service's only worker was started with."""
    (process,) = service._pool._processes
    found: dict[str, Any] = json.loads(Path(f"/proc/{process._process.pid}/cmdline").read_bytes().split(b"\0")[-2])
    return found


def test_threads_reach_the_worker(wide: Wide) -> None:
    arguments = _arguments(wide.service)
    assert (arguments["threads"], arguments["key_budget"], arguments["engine"]) == (2, None, "vector")


def test_a_key_budget_reaches_the_worker(small_bundle: Path, tmp_path: Path) -> None:
    """It must plan as the service does, or no request would find its plan."""
    settings = Settings(
        bundles=(small_bundle,), port=0, store=tmp_path / "store", workers=1, key_budget_mb=1, grace_seconds=0
    )
    service = Service(settings)
    service.start()
    try:
        assert _arguments(service)["key_budget"] == 1_000_000
        with Client(f"127.0.0.1:{service.port}", "small", key_directory=tmp_path / "keys") as client:
            client.prepare()
            generous = load_models([small_bundle])["small"].plans[0].public
            assert client.plan.galois_keys < generous.galois_keys
            assert len(client.keys.evaluation_blob()) <= 1_000_000
            images = list(np.random.default_rng(9).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
            clear = Bundle.read(small_bundle).network(np.stack([client.preprocessing(one) for one in images]))
            for answer, expected in zip(client.predict_many(images), clear, strict=True):
                assert np.abs(answer.logits - expected).max() <= answer.error_bound
    finally:
        service.stop()


def test_a_request_gets_the_threads_that_were_set(small_bundle: Path, tmp_path: Path) -> None:
    """Both in one process, so that its threads can be counted by name."""
    import threading

    def team() -> int:
        return sum(thread.name.startswith("team-") for thread in threading.enumerate())

    for threads in (1, 3):
        before = team()
        worker = Worker([small_bundle], "vector", 1, threads)
        header, body, _ = _job(small_bundle, tmp_path / str(threads))
        reply, content = worker.handle(header, body)
        assert reply["ok"]
        assert reply["sizes"] == [len(content)]
        assert team() - before == threads - 1


def _job(bundle: Path, file: Path) -> tuple[dict[str, Any], bytes, KeyHolder]:
    """Return a job's frames, its keys in a file, and who can read the answer."""
    plan = load_models([bundle])["small"].plans[0].public
    holder = KeyHolder(plan)
    blob = holder.evaluation_keys().to_bytes()
    file.write_bytes(blob)
    (upload,) = holder.encrypt(np.ones((3, 4, 4)) / 2)
    header = {"forget": [], "model": "small", "key_set_id": key_set_id(blob), "keys": os.fspath(file)}
    return header | {"job": "predict", "plan_id": plan.plan_id, "sizes": [len(upload)]}, upload, holder


def test_frames_with_wrong_sizes_are_refused_and_the_worker_goes_on(small_bundle: Path, tmp_path: Path) -> None:
    worker = Worker([small_bundle], "seal", 1)
    header, body, holder = _job(small_bundle, tmp_path / "keys")
    size = len(body)
    for sizes in ([], [size - 1], [size + 1], [size, 1], [-1, size + 1], [size + 5, -5], [2**70, size - 2**70]):
        reply, content = worker.handle(header | {"sizes": sizes}, body)
        assert (reply, content) == ({"ok": False, "refusal": "engine", "error": "ValueError"}, b"")
    for sizes in ([0, size], [size, 0], [5, size - 5]):
        reply, content = worker.handle(header | {"sizes": sizes}, body)
        assert (reply["ok"], reply["refusal"], reply["field"], content) == (False, "ciphertext", "ciphertexts", b"")
    reply, content = worker.handle(header, body)
    assert holder.decrypt(apart(content, reply["sizes"])).shape == (1, 2)


@pytest.mark.parametrize(
    ("body", "sizes", "parts"),
    [(b"", [], ()), (b"", [0, 0], (b"", b"")), (b"abc", [3], (b"abc",)), (b"abc", [1, 0, 2], (b"a", b"", b"bc"))],
)
def test_a_frame_is_taken_apart(body: bytes, sizes: list[int], parts: tuple[bytes, ...]) -> None:
    assert apart(body, sizes) == parts


@pytest.mark.parametrize("sizes", [[], [2], [4], [1, 1], [-1, 4], [4, -1], [3, 2**64]])
def test_sizes_that_do_not_add_up_are_an_error(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="a frame of 3 bytes"):
        apart(b"abc", sizes)


def test_many_sizes_take_no_time() -> None:
    """As many as a header can name: taking a frame apart must not cost the square of that."""
    assert len(apart(b"", [0] * 300_000)) == 300_000
