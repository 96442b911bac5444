"""Both schemes on one service: exact answers with the keys of CKKS, and whatever is mixed up is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

import service.worker
from client_sdk import Client, RequestRefusedError
from client_sdk._crypto import BfvKeyHolder
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import Pixels
from hemacrypt.planner.latency.bfv import quantised_for
from hemacrypt.seal import format as sealformat
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import digest
from service.catalogue import load_models
from service.server import Service
from service.settings import Settings
from service.worker import Worker
from tests.service.conftest import serving


@dataclass(frozen=True)
class Both:
    """A service with the small model under both schemes, and a client with registered keys."""

    service: Service
    client: Client
    stub: pb_grpc.EncryptedInferenceStub
    bundle: Bundle

    def request(self, scheme: str, pixels: Pixels) -> pb.PredictRequest:
        return self.client._request(self.client._plan_for(scheme), [pixels])[0]  # type: ignore[arg-type]

    def integers(self, pixels: Pixels) -> tuple[int, ...]:
        """Return the logits of the network with integer weights."""
        (plan,) = self.service.models["small"].exact
        quantised = quantised_for(self.bundle.network, plan)
        return tuple(int(number) for number in quantised.integers(self.client.preprocessing(pixels)[None])[0])


@pytest.fixture(scope="module", params=["seal", "vector"])
def both(
    request: pytest.FixtureRequest, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    directory = tmp_path_factory.mktemp("both")
    with (
        serving(small_bundle, directory, engine=request.param) as (service, address),
        grpc.insecure_channel(address) as channel,
        Client(address, "small", key_directory=directory / "keys") as client,
    ):
        client.prepare()
        stub = pb_grpc.EncryptedInferenceStub(channel)  # type: ignore[no-untyped-call]
        yield Both(service, client, stub, Bundle.read(small_bundle))


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return np.random.default_rng(7).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def _refusal(both: Both, request: pb.PredictRequest) -> tuple[grpc.StatusCode, str, str, str]:
    """Return code, reason, field and text of a refusal."""
    with pytest.raises(grpc.RpcError) as error:
        both.stub.Predict(request, timeout=60)
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    if status is not None:
        assert status.details[0].Unpack(info)
        assert info.domain == "hemacrypt.v1"
        for detail in status.details[1:]:
            detail.Unpack(bad)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return error.value.code(), info.reason, field, str(error.value.details())


def test_exact_answers_are_the_integers_of_the_network(both: Both, pixels: Pixels) -> None:
    answer = both.client.predict(pixels, scheme="bfv")
    assert answer.integers == both.integers(pixels)
    assert answer.error_bound == 0
    clear = both.bundle.network(both.client.preprocessing(pixels)[None])[0]
    assert np.abs(answer.logits - clear).max() < 5 * answer.quantisation_error


def test_one_key_set_serves_everything(both: Both, pixels: Pixels) -> None:
    told = both.stub.GetModel(pb.GetModelRequest(name="small"), timeout=60)
    groups = [[(g.level, g.relinearise, *g.elements) for g in plan.keys] for plan in (*told.plans, *told.exact)]
    assert len(told.exact) == 1
    assert all(group == groups[0] for group in groups)
    assert both.client.predict(pixels).scheme == "ckks"
    assert both.client.predict(pixels, scheme="bfv").scheme == "bfv"
    names = {path.name for path in (both.service.settings.store).iterdir()}
    assert names == {both.client.keys.info().key_set_id}


def test_a_stream_may_carry_both_schemes(both: Both, pixels: Pixels) -> None:
    order = ["bfv", "ckks", "bfv", "ckks"]
    replies = list(both.stub.PredictStream(iter([both.request(scheme, pixels) for scheme in order]), timeout=60))
    assert [reply.WhichOneof("result") for reply in replies] == ["prediction"] * 4
    for scheme, reply in zip(order, replies, strict=True):
        holder = both.client._holder(both.client._plan_for(scheme))  # type: ignore[arg-type]
        clear = both.bundle.network(both.client.preprocessing(pixels)[None])[0]
        assert np.abs(holder.decrypt(reply.prediction.ciphertexts)[0] - clear).max() < 0.5


def test_many_images_come_back_exactly_and_in_order(both: Both) -> None:
    random = np.random.default_rng(11)
    images = [random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(4)]
    answers = list(both.client.predict_many(images, scheme="bfv"))
    assert [answer.integers for answer in answers] == [both.integers(image) for image in images]


_Change = Callable[[Both, Pixels, list[bytes]], list[bytes]]


def _other_scheme(scheme: str) -> _Change:
    def change(both: Both, pixels: Pixels, parts: list[bytes]) -> list[bytes]:
        theirs = list(both.request(scheme, pixels).ciphertexts)
        return (theirs * len(parts))[: len(parts)]

    return change


def _other_modulus(both: Both, pixels: Pixels, parts: list[bytes]) -> list[bytes]:
    """Encrypt under a plaintext modulus that the plan does not have."""
    plan = both.service.models["small"].exact[0].public
    theirs = replace(plan, plain_moduli=(65537, 114689)[: len(plan.plain_moduli)], largest_logit=1)
    holder = BfvKeyHolder(theirs, both.client._own().secret_bytes())
    return holder.encrypt(both.client.preprocessing(pixels)[None])


def _patched(position: int, replacement: bytes) -> _Change:
    def change(both: Both, pixels: Pixels, parts: list[bytes]) -> list[bytes]:
        plan = both.service.models["small"].exact[0].public
        largest = sealformat.ciphertext_bytes(plan.parameters, plan.parameters.top_level, seeded=False)
        content = bytearray(sealformat.unwrap(parts[0], largest, "ciphertext"))
        content[position : position + len(replacement)] = replacement
        return [sealformat.header(16 + len(content), 3) + bytes(content), *parts[1:]]

    return change


_WRONG: dict[str, tuple[str, _Change, str, str]] = {
    "none": ("bfv", lambda both, pixels, parts: [], "ciphertexts", "0 ciphertexts; the plan lays its input over"),
    "one too few": ("bfv", lambda both, pixels, parts: parts[:-1], "ciphertexts", "the plan lays its input over"),
    "one too many": ("bfv", lambda both, pixels, parts: [*parts, parts[0]], "ciphertexts", "lays its input over"),
    "an empty one": ("bfv", lambda both, pixels, parts: [*parts[:-1], b""], "ciphertexts", "0 bytes; expected 1 to"),
    "too large": ("bfv", lambda both, pixels, parts: [bytes(150_000), *parts[1:]], "ciphertexts", "expected 1 to"),
    "other moduli": ("bfv", _other_modulus, "level", "other parameters"),
    "ciphertexts of CKKS": ("bfv", _other_scheme("ckks"), "level", "other parameters"),
    "ciphertexts of BFV": ("ckks", _other_scheme("bfv"), "level", "other parameters"),
    "cut in half": ("bfv", lambda both, pixels, parts: [parts[0][:30_000], *parts[1:]], "ciphertext", "cut off"),
    "one byte short": ("bfv", lambda both, pixels, parts: [*parts[:-1], parts[-1][:-1]], "ciphertext", "cut off"),
    "nonsense": ("bfv", lambda both, pixels, parts: [*parts[:-1], b"nonsense"], "ciphertext", "no SEAL object"),
    "NTT form": ("bfv", _patched(32, b"\1"), "form", "form"),
    "a scale": ("bfv", _patched(57, np.float64(2.0**30).tobytes()), "scale", "expected"),
    "a correction factor": ("bfv", _patched(65, b"\2"), "form", "form"),
    "a residue beyond its prime": ("bfv", _patched(97, b"\xff" * 8), "residues", "not below its prime"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "change", "field", "told"), _WRONG.values(), ids=_WRONG.keys())
def test_what_is_not_the_plans_is_refused_and_the_service_goes_on(
    both: Both, pixels: Pixels, scheme: str, change: _Change, field: str, told: str
) -> None:
    request = both.request(scheme, pixels)
    request.ciphertexts[:] = change(both, pixels, list(request.ciphertexts))
    request.ciphertext_sha256 = digest(request.ciphertexts)
    code, reason, found, text = _refusal(both, request)
    assert (code, reason, found) == (grpc.StatusCode.INVALID_ARGUMENT, "CIPHERTEXT_INVALID", field), text
    assert told in text
    assert both.client.predict(pixels, scheme="bfv").integers == both.integers(pixels)


def test_a_bit_that_flips_on_the_way_is_noticed(both: Both, pixels: Pixels) -> None:
    request = both.request("bfv", pixels)
    last = request.ciphertexts[-1]
    request.ciphertexts[-1] = last[:-1] + bytes([last[-1] ^ 1])
    assert _refusal(both, request)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH")


def test_the_largest_exact_request_comes_as_far_as_the_service(both: Both, pixels: Pixels) -> None:
    told = both.stub.GetModel(pb.GetModelRequest(name="small"), timeout=60)
    request = both.request("bfv", pixels)
    request.ciphertexts[:] = [bytes(told.largest_ciphertext)] * len(request.ciphertexts)
    assert _refusal(both, request)[1] == "DIGEST_MISMATCH"
    request.ciphertexts.extend([bytes(told.largest_ciphertext)] * 64)
    assert _refusal(both, request)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_plans_of_nobody_are_refused(both: Both, pixels: Pixels) -> None:
    request = both.request("bfv", pixels)
    for plan_id in ("", "f" * 64, request.plan_id[:-1]):
        request.plan_id = plan_id
        assert _refusal(both, request)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "PLAN_CHANGED")


def test_a_service_without_bfv_says_so(small_bundle: Path, both: Both, pixels: Pixels, tmp_path: Path) -> None:
    with (
        serving(small_bundle, tmp_path, schemes=("ckks",)) as (service, address),
        Client(address, "small", key_directory=tmp_path / "keys") as client,
    ):
        client.prepare()
        assert service.models["small"].no_exact == "the operator has switched BFV off"
        assert client.exact_plan is None
        with pytest.raises(RequestRefusedError) as refusal:
            client.predict(pixels, scheme="bfv")
        assert refusal.value.reason == "SCHEME_NOT_SERVED"
        # A client that knows an exact plan from before is told that it is behind.
        request = client._request(client.plan, [pixels])[0]
        request.plan_id = both.client._plan_for("bfv").plan_id
        with pytest.raises(RequestRefusedError) as refusal:
            client._predict_once(request)
        assert (refusal.value.status, refusal.value.reason) == ("FAILED_PRECONDITION", "PLAN_CHANGED")


def test_a_client_that_is_behind_catches_up(both: Both, pixels: Pixels) -> None:
    described = both.client._described
    both.client.__dict__["_described"] = replace(
        described, exact=(replace(described.exact[0], quantisation_error=123.0),)
    )
    assert both.client.predict(pixels, scheme="bfv").integers == both.integers(pixels)
    assert both.client.exact_plan is not None
    assert both.client.exact_plan.quantisation_error != 123.0


def test_why_there_is_no_exact_plan_is_logged(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object, **named: object) -> NoReturn:
        raise PlanError("the second layer is at fault")

    monkeypatch.setattr("hemacrypt.planner.offer.plan_bfv", refuses)
    (model,) = load_models([small_bundle]).values()
    assert (model.exact, model.no_exact) == ((), "the second layer is at fault")
    assert load_models([small_bundle], exact=False)["small"].no_exact == "the operator has switched BFV off"
    with capture_logs() as logged:
        service = Service(Settings(bundles=(small_bundle,), port=0, store=tmp_path / "store", workers=1))
        service.stop()
    (entry,) = [entry for entry in logged if entry["event"] == "no exact evaluation"]
    assert (entry["model"], entry["why"]) == ("small", "the second layer is at fault")


def _handled(worker: Worker, both: Both, request: pb.PredictRequest) -> tuple[dict[str, Any], bytes]:
    path = both.service.settings.store / request.key_set_id / "keys"
    header = {
        "job": "predict", "model": "small", "plan_id": request.plan_id, "key_set_id": request.key_set_id,
        "keys": str(path), "spool": None, "forget": [], "sizes": [len(part) for part in request.ciphertexts],
    }  # fmt: skip
    return worker.handle(header, b"".join(request.ciphertexts))


def test_the_exact_engine_is_made_when_it_is_first_asked_for(both: Both, pixels: Pixels, small_bundle: Path) -> None:
    worker = Worker([small_bundle], both.service.settings.engine, 2)
    assert _handled(worker, both, both.request("ckks", pixels))[0]["ok"]
    assert worker._exact_engines == {}
    for _ in range(2):
        reply, body = _handled(worker, both, both.request("bfv", pixels))
        assert reply["ok"]
        assert len(worker._exact_engines) == 1
        parts = service.worker.apart(body, reply["sizes"])
        holder = both.client._holder(both.client._plan_for("bfv"))
        assert isinstance(holder, BfvKeyHolder)
        assert tuple(holder.decrypt_integers(parts)[0]) == both.integers(pixels)
    assert len(worker._keys) == 1


def test_an_exact_engine_that_cannot_be_made_costs_one_answer(
    both: Both, pixels: Pixels, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> NoReturn:
        raise PlanError("no engine today")

    worker = Worker([small_bundle], both.service.settings.engine, 2)
    monkeypatch.setattr(service.worker, "encrypted_bfv_engine", refuses)
    reply, body = _handled(worker, both, both.request("bfv", pixels))
    assert (reply, body) == ({"ok": False, "refusal": "engine", "error": "PlanError"}, b"")
    assert _handled(worker, both, both.request("ckks", pixels))[0]["ok"]
