"""Batches at the hospital's side: what is sent, what is believed, and what happens when something is in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2

from client_sdk import Client, ReplyError, RequestRefusedError
from client_sdk._exceptions import ServiceUnavailableError
from hemacrypt.engines.vector.batch import BatchEngine
from hemacrypt.errors import ImageError
from hemacrypt.plan.batch_plan import BatchPlan
from hemacrypt.plan.plan import KeyGroup
from hemacrypt.planner import plan_bundle_layouts
from hemacrypt.seal.evaluation_keys import EvaluationKeys, key_set_id
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import batch_plan_to_message, digest, plan_to_message, preprocessing_to_message
from service.errors import Refused, missing, refuse
from tests.batching import NAME, PREPROCESSING, clear_logits, make_bundle, make_images

Replies = list[pb.PredictBatchResponse]


class Laboratory(pb_grpc.EncryptedInferenceServicer):
    """An honest service for the tiny model, whose answers can be changed before they go out."""

    def __init__(self) -> None:
        self.bundle = make_bundle()
        self.layouts = plan_bundle_layouts(self.bundle)
        assert self.layouts.batch is not None
        self.batch: BatchPlan = self.layouts.batch
        self.engine = BatchEngine(self.batch)
        self.break_even: int | None = 100
        self.keys: dict[str, EvaluationKeys] = {}
        self.batches: list[int] = []
        self.tamper: Callable[[Replies], Replies] = lambda replies: replies
        self.describe: Callable[[pb.GetModelResponse], None] = lambda message: None

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:  # noqa: N802
        plans = [plan.public for plan in self.layouts.plans]
        message = pb.GetModelResponse(
            model=pb.ModelSummary(name=NAME, plan_id=plans[0].plan_id),
            plans=map(plan_to_message, plans),
            preprocessing=preprocessing_to_message(PREPROCESSING),
            batch=batch_plan_to_message(self.batch.public, self.break_even),
        )
        self.describe(message)
        return message

    def GetKeySet(self, request: pb.GetKeySetRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        known = request.key_set_id in self.keys
        return pb.GetKeySetResponse(state=pb.KEY_SET_STATE_READY if known else pb.KEY_SET_STATE_ABSENT)

    def RegisterKeys(  # noqa: N802
        self, request_iterator: Iterator[pb.RegisterKeysRequest], context: grpc.ServicerContext
    ) -> pb.RegisterKeysResponse:
        blob = b"".join(message.chunk for message in request_iterator)
        self.keys[key_set_id(blob)] = EvaluationKeys.from_bytes(blob)
        return pb.RegisterKeysResponse(key_set_id=key_set_id(blob))

    def PredictBatch(  # noqa: N802
        self, request_iterator: Iterator[pb.PredictBatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictBatchResponse]:
        header = next(request_iterator).header
        self.batches.append(0)
        if header.key_set_id not in self.keys:
            refuse(context, missing("KEY_SET_NOT_FOUND", "", "", "no such keys"))
        if header.plan_id != self.batch.public.plan_id:
            refuse(context, Refused(code_pb2.FAILED_PRECONDITION, "PLAN_CHANGED", "another plan"))
        ciphertexts = []
        for message in request_iterator:
            assert digest([message.ciphertext.content]) == message.ciphertext.sha256
            ciphertexts.append(message.ciphertext.content)
            self.batches[-1] += 1
        found = self.engine.evaluate(ciphertexts, self.engine.load_keys(self.keys[header.key_set_id]))
        timing = pb.Timing(queue_us=1000, compute_us=2000)
        yield from self.tamper(
            [
                pb.PredictBatchResponse(index=n, ciphertext=one, ciphertext_sha256=digest([one]), timing=timing)
                for n, one in enumerate(found)
            ]
        )


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Laboratory, str]]:
    laboratory = Laboratory()
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        pb_grpc.add_EncryptedInferenceServicer_to_server(laboratory, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield laboratory, f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.fixture(scope="module")
def key_directory(served: tuple[Laboratory, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hospital") / "keys"
    with Client(served[1], NAME, key_directory=directory) as client:
        client.prepare()
    return directory


@pytest.fixture
def laboratory(served: tuple[Laboratory, str], key_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    laboratory = served[0]
    # Whatever a test changes is as it was afterwards.
    for name in ("tamper", "describe", "break_even", "layouts", "batch"):
        monkeypatch.setattr(laboratory, name, getattr(laboratory, name))
    laboratory.batches.clear()
    return laboratory


@pytest.fixture
def client(served: tuple[Laboratory, str], laboratory: Laboratory, key_directory: Path) -> Iterator[Client]:
    with Client(served[1], NAME, key_directory=key_directory) as client:
        client.register()
        yield client


def test_answers_are_those_of_the_clear_network(client: Client, laboratory: Laboratory) -> None:
    images, told = make_images(30), []
    answers = client.predict_batch(images, lambda sent, total: told.append((sent, total)))
    clear = clear_logits(laboratory.bundle, images)
    assert np.abs(np.stack([answer.logits for answer in answers]) - clear).max() <= answers[0].error_bound
    assert [answer.index for answer in answers] == clear.argmax(axis=1).tolist()
    assert told == [(number, 48) for number in range(1, 49)]
    assert all(answer.images == 30 for answer in answers)
    first = answers[0]
    assert (first.milliseconds.queue, first.milliseconds.compute) == (1.0, 2.0)
    assert first.milliseconds.encrypt > 0
    assert first.size.upload > 48 * 8192 * 3
    assert first.size.reply > 2 * 8192 * 3


def test_more_images_than_slots_make_several_batches(client: Client, laboratory: Laboratory) -> None:
    few = make_images(7, seed=3)
    images = [few[number % 7] for number in range(4096 + 5)]
    told: list[tuple[int, int]] = []
    answers = client.predict_batch(images, lambda sent, total: told.append((sent, total)))
    assert laboratory.batches == [48, 48]
    assert [answers[0].images, answers[-1].images] == [4096, 5]
    assert told == [(number, 96) for number in range(1, 97)]
    clear = clear_logits(laboratory.bundle, few)
    found = np.stack([answer.logits for answer in answers])
    assert np.abs(found - clear[np.arange(len(images)) % 7]).max() <= answers[0].error_bound


def test_no_images_make_no_batch(client: Client, laboratory: Laboratory) -> None:
    assert client.predict_batch([]) == []
    assert laboratory.batches == []


def test_files_are_named_in_the_answers(client: Client, tmp_path: Path) -> None:
    from PIL import Image

    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (20 * number, 30, 40)).save(path)
    answers = client.predict_batch(paths)
    assert [answer.source for answer in answers] == list(map(str, paths))
    with pytest.raises(ImageError):
        client.predict_batch([*paths, tmp_path / "absent.png"])


@pytest.mark.parametrize(
    ("break_even", "images", "layout"), [(100, 99, "single"), (100, 100, "batch"), (None, 10**6, "single")]
)
def test_the_service_says_from_how_many_images_on_batches_are_better(
    client: Client, laboratory: Laboratory, break_even: int | None, images: int, layout: str
) -> None:
    laboratory.break_even = break_even
    client.refresh()
    assert client.layout_for(images) == layout


def test_a_service_without_batches_is_told_apart(client: Client, laboratory: Laboratory) -> None:
    laboratory.describe = lambda message: message.ClearField("batch")
    client.refresh()
    assert client.batch_plan is None
    assert client.layout_for(10**6) == "single"
    with pytest.raises(RequestRefusedError) as refused:
        client.predict_batch(make_images(1))
    assert refused.value.reason == "BATCHES_NOT_SERVED"
    assert laboratory.batches == []


def _without_digest(replies: Replies) -> Replies:
    replies[1].ciphertext_sha256 = "0" * 64
    return replies


def _other_index(replies: Replies) -> Replies:
    replies[1].index = 0
    return replies


def _garbage(replies: Replies) -> Replies:
    replies[1].ciphertext = b"garbage"
    replies[1].ciphertext_sha256 = digest([b"garbage"])
    return replies


_FALSE: dict[str, tuple[Callable[[Replies], Replies], str]] = {
    "none": (lambda replies: [], "cannot be decrypted"),
    "one too few": (lambda replies: replies[:1], "cannot be decrypted"),
    "one too many": (lambda replies: [*replies, pb.PredictBatchResponse(index=2)], "not asked"),
    "the same twice": (lambda replies: [replies[0], replies[0]], "not asked"),
    "another order": (lambda replies: replies[::-1], "not asked"),
    "another number": (_other_index, "not asked"),
    "another digest": (_without_digest, "damaged on the way"),
    "garbage": (_garbage, "cannot be decrypted"),
}


@pytest.mark.parametrize(("tamper", "told"), _FALSE.values(), ids=_FALSE.keys())
def test_false_answers_are_not_believed(
    client: Client, laboratory: Laboratory, tamper: Callable[[Replies], Replies], told: str
) -> None:
    laboratory.tamper = tamper
    with pytest.raises(ReplyError, match=told):
        client.predict_batch(make_images(3))


def _set(message: pb.BatchPlan, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


_PLANS: dict[str, tuple[Callable[[pb.BatchPlan], None], str]] = {
    "another name": (lambda plan: _set(plan, plan_id="0" * 64), "hashes to another name"),
    "another scale": (lambda plan: _set(plan, input_scale=2.0**20), "hashes to another name"),
    "an insecure degree": (lambda plan: _set(plan.parameters, degree=4096), "cannot be used"),  # type: ignore[arg-type]
    "a value twice": (lambda plan: plan.input_order.append(3), "does not name every value once"),
    "a level too high": (lambda plan: _set(plan, input_level=9), "do not descend"),
    "no bound": (lambda plan: _set(plan, logit_error_bound=0.0), "no positive error bound"),
    "a label that steers": (lambda plan: plan.labels.__setitem__(0, "\x1b[2J"), "do not print"),
}


@pytest.mark.parametrize(("change", "told"), _PLANS.values(), ids=_PLANS.keys())
def test_false_batch_plans_are_not_used(
    client: Client, laboratory: Laboratory, change: Callable[[pb.BatchPlan], None], told: str
) -> None:
    laboratory.describe = lambda message: change(message.batch)
    client.refresh()
    with pytest.raises(ReplyError, match=told):
        client.predict_batch(make_images(1))


def test_a_batch_plan_must_fit_the_other_plans(client: Client, laboratory: Laboratory) -> None:
    honest = laboratory.batch
    for told, changes in (
        ("different keys", {"keys": (KeyGroup(2, True, (3, 5)),)}),
        ("different labels", {"labels": ("yes", "no")}),
        ("do not fit together", {"input_order": tuple(range(47))}),
    ):
        laboratory.batch = replace(honest, public=replace(honest.public, **changes))  # type: ignore[arg-type]
        client.refresh()
        with pytest.raises(ReplyError, match="fit together" if "fit" in told else "different keys or name different"):
            client.predict_batch(make_images(1))


def test_keys_that_the_service_lost_are_registered_again_once(client: Client, laboratory: Laboratory) -> None:
    laboratory.keys.clear()
    assert len(client.predict_batch(make_images(2))) == 2
    assert len(laboratory.batches) == 2
    assert len(laboratory.keys) == 1


def test_a_service_that_always_lost_the_keys_is_not_asked_for_ever(
    client: Client, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory.keys.clear()
    monkeypatch.setattr(client, "register", lambda: "")
    with pytest.raises(RequestRefusedError) as refused:
        client.predict_batch(make_images(2))
    assert refused.value.reason == "KEY_SET_NOT_FOUND"
    assert len(laboratory.batches) == 2


def test_a_new_version_of_the_model_is_followed(client: Client, laboratory: Laboratory) -> None:
    assert client.batch_plan is not None
    public = laboratory.batch.public
    laboratory.batch = replace(laboratory.batch, public=replace(public, logit_limit=public.logit_limit / 2))
    assert len(client.predict_batch(make_images(2))) == 2
    assert client.batch_plan.logit_limit == public.logit_limit / 2


def test_a_fault_while_encrypting_ends_the_call_and_is_told(
    client: Client, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.predict_batch(make_images(1))
    holder = client._batch_holder
    assert holder is not None
    encrypt, calls = holder._encrypt, []

    def fails(*arguments: Any) -> bytes:
        calls.append(arguments)
        if len(calls) == 5:
            _fail()
        return encrypt(*arguments)

    monkeypatch.setattr(holder, "_encrypt", fails)
    with pytest.raises(MemoryError, match="no more"):
        client.predict_batch(make_images(1))
    # The service has not taken what came for a batch.
    assert laboratory.batches[-1] <= 4


def _fail() -> NoReturn:
    raise MemoryError("no more")


def test_nobody_there_is_told(client: Client, served: tuple[Laboratory, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.batch_plan is not None
    from client_sdk._transport import open_channel

    with open_channel("127.0.0.1:1", None) as channel:
        monkeypatch.setattr(client, "_stub", pb_grpc.EncryptedInferenceStub(channel))  # type: ignore[no-untyped-call]
        with pytest.raises(ServiceUnavailableError):
            client.predict_batch(make_images(1))
