"""Many images: a sequence goes in pairs, anything else one by one, and every answer belongs to its image."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2

from client_sdk import Client, ReplyError, RequestRefusedError
from client_sdk._crypto import KeyHolder
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.model.network import Array
from hemacrypt.model.preprocess import Pixels
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import digest
from tests.client_sdk.conftest import Impostor, Met, Small, serving


def _images(count: int) -> list[Pixels]:
    random = np.random.default_rng(count)
    return [random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(count)]


def _clear(met: Met, small: Small, images: Iterable[Pixels]) -> Array:
    return small.bundle.network(np.stack([met.client.preprocessing(image) for image in images]))


@pytest.fixture
def asked(met: Met, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans of the requests that reached the service, in order."""
    found: list[str] = []
    evaluate = met.impostor.evaluate

    def counted(request: pb.PredictRequest) -> pb.PredictResponse:
        found.append(request.plan_id)
        return evaluate(request)

    monkeypatch.setattr(met.impostor, "evaluate", counted)
    return found


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_a_sequence_goes_in_pairs(met: Met, small: Small, asked: list[str], count: int, kind: type) -> None:
    images = _images(count)
    answers = list(met.client.predict_many(kind(images)))
    single, pair = (plan.public.plan_id for plan in small.plans)
    assert asked == [pair] * (count // 2) + [single] * (count % 2)
    assert [answer.images for answer in answers] == [2] * (count - count % 2) + [1] * (count % 2)
    if count:
        # Random images: a swap within a pair, or between pairs, would stand out by far.
        errors = np.abs(np.stack([answer.logits for answer in answers]) - _clear(met, small, images)).max(axis=1)
        assert all(error <= answer.error_bound for error, answer in zip(errors, answers, strict=True))


def test_pairs_and_single_images_have_the_same_answers(met: Met, small: Small, asked: list[str]) -> None:
    images = _images(5)
    paired = list(met.client.predict_many(images))
    alone = [met.client.predict(image) for image in images]
    assert len(asked) == 3 + 5
    for one, other in zip(paired, alone, strict=True):
        assert np.abs(one.logits - other.logits).max() <= one.error_bound + other.error_bound
        assert one.label == other.label


def test_two_images_of_a_pair_share_its_times_and_bytes(met: Met) -> None:
    first, second, third = met.client.predict_many(_images(3))
    assert first.milliseconds is second.milliseconds
    assert first.size == second.size
    assert third.milliseconds is not first.milliseconds


def test_an_array_of_images_is_a_sequence_too(met: Met, small: Small, asked: list[str]) -> None:
    images = np.stack(_images(4))
    answers = list(met.client.predict_many(images))
    assert len(asked) == 2
    assert np.abs(np.stack([answer.logits for answer in answers]) - _clear(met, small, images)).max() < 1e-3


def test_a_generator_goes_one_by_one(met: Met, small: Small, asked: list[str]) -> None:
    images = _images(4)
    answers = list(met.client.predict_many(image for image in images))
    assert asked == [small.plan.plan_id] * 4
    assert {answer.images for answer in answers} == {1}


class _EachAtOnce(Impostor):
    """An impostor that answers every request of a stream before it reads the next."""

    def PredictStream(  # noqa: N802
        self, request_iterator: Iterator[pb.PredictRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictStreamResponse]:
        for index, request in enumerate(request_iterator):
            yield pb.PredictStreamResponse(index=index, prediction=self.evaluate(request))


@pytest.mark.timeout(120)
def test_an_image_of_a_generator_is_answered_before_the_next_is_there(small: Small, tmp_path: Path) -> None:
    """A microscope gives one image at a time: none may wait for a partner that comes much later, or never."""
    read = threading.Semaphore(1)

    def microscope() -> Iterator[Pixels]:
        for image in _images(3):
            assert read.acquire(timeout=60), "the next image is asked for although the last one has no answer"
            yield image

    with (
        serving(_EachAtOnce(small)) as address,
        Client(address, "small", key_directory=tmp_path / "keys") as client,
    ):
        client.prepare()
        assert client.pair_plan is not None
        answers = []
        for answer in client.predict_many(microscope()):
            answers.append(answer)
            read.release()
    assert len(answers) == 3


def test_a_refusal_of_a_pair_names_both_images(met: Met, tmp_path: Path) -> None:
    from PIL import Image

    paths = [tmp_path / name for name in ("left.png", "right.png")]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    refusal = pb.Refusal(code=code_pb2.NOT_FOUND, reason="KEY_SET_NOT_FOUND", message="gone")
    met.impostor.tamper = lambda method, honest, context: iter([pb.PredictStreamResponse(index=0, refusal=refusal)])
    with pytest.raises(RequestRefusedError, match=r"left\.png and .*right\.png"):
        list(met.client.predict_many(paths))


def _answering(*replies: bytes) -> Any:
    answer = pb.PredictResponse(ciphertexts=replies, ciphertext_sha256=digest(replies))
    return lambda method, honest, context: iter([pb.PredictStreamResponse(index=0, prediction=answer)])


@pytest.mark.parametrize("count", [0, 2, 3, 64])
def test_more_or_fewer_ciphertexts_than_promised_are_an_error(met: Met, count: int) -> None:
    images = _images(2)
    assert met.client.pair_plan is not None
    request, _ = met.client._request(met.client.pair_plan, list(images))
    (reply,) = met.impostor.evaluate(request).ciphertexts
    met.impostor.tamper = _answering(*[reply] * count)
    with pytest.raises(ReplyError, match=rf"{count} ciphertexts; expected 1"):
        list(met.client.predict_many(images))


def test_the_digest_covers_every_ciphertext_in_order(met: Met) -> None:
    whole = digest([b"one", b"two"])
    assert whole == digest([b"onetwo"])  # where one ends is for the plan's sizes to check
    assert len({whole, digest([b"two", b"one"]), digest([b"one"]), digest([b"one", b"twp"]), digest([])}) == 5

    def tamper(method: str, answer: pb.PredictResponse, context: grpc.ServicerContext) -> pb.PredictResponse:
        answer.ciphertexts.append(answer.ciphertexts[0])
        return answer

    met.impostor.tamper = tamper
    with pytest.raises(ReplyError, match="damaged on the way"):
        met.client.predict(_images(1)[0])


def test_a_holder_serves_another_plan_with_the_same_key(small: Small) -> None:
    single, pair = (plan.public for plan in small.plans)
    holder = KeyHolder(single)
    assert holder.serving(single) is holder
    other = holder.serving(pair)
    assert other.plan is pair
    assert other.secret_bytes()[48:] == holder.secret_bytes()[48:]
    engines = small.engines
    keys = small.engine.load_keys(holder.evaluation_keys())
    images = np.random.default_rng(3).random((2, 3, 4, 4))
    logits = other.decrypt(engines[pair.plan_id].evaluate(other.encrypt(images), keys))
    assert logits.shape == (2, 2)
    assert np.abs(logits - small.bundle.network(images)).max() <= pair.logit_error_bound


@pytest.mark.parametrize("images", [1, 3])
def test_a_pair_is_two_images(small: Small, images: int) -> None:
    holder = KeyHolder(small.plans[1].public)
    with pytest.raises(PlanError, match="this layout holds"):
        holder.encrypt(np.zeros((images, 3, 4, 4)))


def test_a_reply_to_a_pair_under_another_key_is_refused(small: Small) -> None:
    pair = small.plans[1].public
    ours, stranger = KeyHolder(pair), KeyHolder(pair)
    keys = small.engine.load_keys(stranger.evaluation_keys())
    reply = small.engines[pair.plan_id].evaluate(stranger.encrypt(np.ones((2, 3, 4, 4))), keys)
    assert stranger.decrypt(reply).shape == (2, 2)
    with pytest.raises(FormatError, match=r"copies of a logit disagree|too large"):
        ours.decrypt(reply)
