"""The channel: nobody there, statuses with and without details, answers that were damaged on the way."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from client_sdk import Client, ClientError, ReplyError, RequestRefusedError, ServiceUnavailableError
from client_sdk._crypto import KeyHolder
from hemacrypt.model.preprocess import Pixels
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import digest
from tests.client_sdk.conftest import Met, Small

# A call that waits for its deadline would run into the limit of the test and not of the call.
_FOR_EVER = 100_000.0


def test_an_honest_answer_is_right(met: Met, small: Small, pixels: Pixels) -> None:
    """The impostor computes as a service does, so what fails below fails for its falsehood alone."""
    clear = small.bundle.network(met.client.preprocessing(pixels)[None])[0]
    assert np.abs(met.client.predict(pixels).logits - clear).max() <= small.plan.logit_error_bound
    (answer,) = met.client.predict_many([pixels])
    assert np.abs(answer.logits - clear).max() <= small.plan.logit_error_bound


@pytest.mark.timeout(120)
def test_nobody_there_is_told_without_waiting_for_the_deadline(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with (
            Client(address, "small", key_directory=tmp_path, timeout=_FOR_EVER) as client,
            pytest.raises(ServiceUnavailableError, match=address),
        ):
            client.models()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("address", ["no-such-host.invalid:50051", "not an address"])
def test_an_address_that_is_none_is_told(tmp_path: Path, address: str) -> None:
    with (
        Client(address, "small", key_directory=tmp_path, timeout=_FOR_EVER) as client,
        pytest.raises(ServiceUnavailableError),
    ):
        client.models()


@pytest.mark.timeout(120)
def test_a_service_that_never_answers_runs_into_the_deadline(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Client(f"127.0.0.1:{silent.getsockname()[1]}", "small", key_directory=tmp_path, timeout=0.5) as client,
        pytest.raises(ServiceUnavailableError),
    ):
        client.models()


def _abort(code: grpc.StatusCode, text: str, details: bytes | None = None) -> Callable[..., NoReturn]:
    def tamper(method: str, answer: Any, context: grpc.ServicerContext) -> NoReturn:
        if details is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(code, text)

    return tamper


def _packed(*messages: Any) -> list[AnyMessage]:
    envelopes = []
    for message in messages:
        envelope = AnyMessage()
        envelope.Pack(message)
        envelopes.append(envelope)
    return envelopes


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE", "DEADLINE_EXCEEDED")]
)
def test_a_status_without_details_is_a_refusal_by_its_code(met: Met, code: grpc.StatusCode) -> None:
    met.impostor.tamper = _abort(code, "some text")
    with pytest.raises(RequestRefusedError, match="some text") as refused:
        met.client.models()
    assert (refused.value.status, refused.value.reason, refused.value.metadata) == (code.name, code.name, {})


def test_a_service_that_cannot_answer_in_time_is_unavailable(met: Met) -> None:
    met.impostor.tamper = _abort(grpc.StatusCode.DEADLINE_EXCEEDED, "some text")
    with pytest.raises(ServiceUnavailableError, match="in time"):
        met.client.models()


def test_a_status_with_details_tells_reason_and_facts(met: Met) -> None:
    info = error_details_pb2.ErrorInfo(
        reason="OFFSET_MISMATCH", domain="hemacrypt.v1", metadata={"received_bytes": "7"}
    )
    other = error_details_pb2.RetryInfo()
    status = status_pb2.Status(code=code_pb2.OUT_OF_RANGE, message="continue there", details=_packed(other, info))

    def tamper(method: str, answer: Any, context: grpc.ServicerContext) -> None:
        context.abort_with_status(rpc_status.to_status(status))

    met.impostor.tamper = tamper
    with pytest.raises(RequestRefusedError, match="continue there") as refused:
        met.client.models()
    assert (refused.value.status, refused.value.reason) == ("OUT_OF_RANGE", "OFFSET_MISMATCH")
    assert refused.value.metadata == {"received_bytes": "7"}


_BROKEN_INFO = AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff")


@pytest.mark.parametrize(
    "details",
    [
        b"",
        b"\xff\xff\xff\xff garbage",
        status_pb2.Status(code=code_pb2.ABORTED, message="another").SerializeToString(),
        status_pb2.Status(code=code_pb2.NOT_FOUND, message="some text", details=[_BROKEN_INFO]).SerializeToString(),
        status_pb2.Status(code=12345, message="some text").SerializeToString(),
    ],
    ids=["empty", "garbage", "another code", "broken detail", "no code"],
)
def test_details_that_are_broken_do_not_hide_the_refusal(met: Met, details: bytes) -> None:
    met.impostor.tamper = _abort(grpc.StatusCode.NOT_FOUND, "some text", details)
    with pytest.raises(RequestRefusedError) as refused:
        met.client.models()
    assert refused.value.status == "NOT_FOUND"


def test_a_refusal_cannot_steer_the_terminal(met: Met) -> None:
    met.impostor.tamper = _abort(grpc.StatusCode.INTERNAL, "fine\x1b]0;title\x07\x1b[2J\rgone")
    with pytest.raises(RequestRefusedError) as refused:
        met.client.models()
    assert str(refused.value).isprintable()


def test_a_moment_of_trouble_is_bridged(met: Met, pixels: Pixels) -> None:
    def tamper(method: str, answer: Any, context: grpc.ServicerContext) -> Any:
        if len(met.impostor.calls) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "a moment, please")
        return answer

    met.impostor.tamper = tamper
    assert met.client.predict(pixels).label in ("no", "yes")
    assert met.impostor.calls == ["Predict"] * 3


def test_a_refusal_is_not_asked_again(met: Met, pixels: Pixels) -> None:
    met.impostor.tamper = _abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
    with pytest.raises(RequestRefusedError):
        met.client.predict(pixels)
    assert met.impostor.calls == ["Predict"]


def test_a_bit_that_flips_in_the_answer_is_noticed(met: Met, pixels: Pixels) -> None:
    places = iter([0, 20, 3000, -1])

    def tamper(method: str, answer: pb.PredictResponse, context: grpc.ServicerContext) -> pb.PredictResponse:
        content = bytearray(answer.ciphertexts[0])
        content[next(places)] ^= 1
        answer.ciphertexts[0] = bytes(content)
        return answer

    met.impostor.tamper = tamper
    for _ in range(4):
        with pytest.raises(ReplyError, match="damaged on the way"):
            met.client.predict(pixels)


def _resealed(*contents: bytes) -> pb.PredictResponse:
    return pb.PredictResponse(ciphertexts=contents, ciphertext_sha256=digest(contents))


_FALSE_REPLIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda reply: b"",
    "text": lambda reply: b"all is well",
    "cut": lambda reply: reply[:-1],
    "long": lambda reply: reply + b"\0",
    "large": lambda reply: bytes(5_000_000),
    "header alone": lambda reply: reply[:16],
}


@pytest.mark.parametrize("falsify", _FALSE_REPLIES.values(), ids=_FALSE_REPLIES.keys())
def test_an_answer_that_is_no_ciphertext_is_an_error(
    met: Met, pixels: Pixels, falsify: Callable[[bytes], bytes]
) -> None:
    met.impostor.tamper = lambda method, answer, context: _resealed(falsify(answer.ciphertexts[0]))
    with pytest.raises(ReplyError, match="cannot be decrypted"):
        met.client.predict(pixels)


def test_the_image_sent_back_is_no_answer(met: Met, pixels: Pixels) -> None:
    request, _ = met.client._request(met.client.plan, [pixels])
    met.impostor.tamper = lambda method, answer, context: _resealed(*request.ciphertexts)
    with pytest.raises(ReplyError):
        met.client.predict(pixels)


def test_an_answer_under_another_key_is_an_error(met: Met, small: Small, pixels: Pixels) -> None:
    assert small.plan.output_layout.copies > 1
    stranger = KeyHolder(small.plan)
    keys = small.engine.load_keys(stranger.evaluation_keys())
    for _ in range(5):
        foreign = small.engine.evaluate(stranger.encrypt(met.client.preprocessing(pixels)), keys)
        assert stranger.decrypt(foreign).shape == (1, 2)
        met.impostor.tamper = lambda method, answer, context, reply=foreign: _resealed(*reply)
        with pytest.raises(ReplyError):
            met.client.predict(pixels)


def test_an_empty_answer_is_an_error(met: Met, pixels: Pixels) -> None:
    met.impostor.tamper = lambda method, answer, context: pb.PredictResponse()
    with pytest.raises(ReplyError):
        met.client.predict(pixels)


def test_absurd_times_are_harmless(met: Met, pixels: Pixels) -> None:
    def tamper(method: str, answer: pb.PredictResponse, context: grpc.ServicerContext) -> pb.PredictResponse:
        answer.timing.queue_us = answer.timing.compute_us = 2**64 - 1
        return answer

    met.impostor.tamper = tamper
    assert met.client.predict(pixels).milliseconds.upload == 0


def _stream(change: Callable[[list[pb.PredictStreamResponse]], list[pb.PredictStreamResponse]]) -> Any:
    return lambda method, honest, context: iter(change(honest))


def _renumbered(index: int, answer: pb.PredictStreamResponse) -> pb.PredictStreamResponse:
    return pb.PredictStreamResponse(index=index, prediction=answer.prediction)


_FALSE_STREAMS: dict[str, Callable[[list[pb.PredictStreamResponse]], list[pb.PredictStreamResponse]]] = {
    "one too many": lambda honest: [*honest, _renumbered(2, honest[0])],
    "one too few": lambda honest: honest[:1],
    "none": lambda honest: [],
    "swapped": lambda honest: honest[::-1],
    "all number 0": lambda honest: [_renumbered(0, answer) for answer in honest],
    "absurd number": lambda honest: [honest[0], _renumbered(2**64 - 1, honest[1])],
    "neither answer nor refusal": lambda honest: [pb.PredictStreamResponse(index=0), honest[1]],
    "a refusal of no known code": lambda honest: [
        pb.PredictStreamResponse(index=0, refusal=pb.Refusal(code=-999, reason="\x1b[2J", message="no")),
        honest[1],
    ],
    "a refusal that is OK": lambda honest: [pb.PredictStreamResponse(index=0, refusal=pb.Refusal()), honest[1]],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("change", _FALSE_STREAMS.values(), ids=_FALSE_STREAMS.keys())
def test_a_stream_that_answers_something_else_is_an_error(
    met: Met, pixels: Pixels, change: Callable[[list[pb.PredictStreamResponse]], list[pb.PredictStreamResponse]]
) -> None:
    met.impostor.tamper = _stream(change)
    with pytest.raises(ClientError) as error:
        # One by one, so that the stream has two answers.
        list(met.client.predict_many(iter([pixels, pixels[::-1]])))
    assert str(error.value).isprintable()


def test_a_refusal_in_a_stream_names_its_image(met: Met, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "cell.png"
    Image.new("RGB", (8, 8)).save(path)
    refusal = pb.Refusal(code=code_pb2.NOT_FOUND, reason="KEY_SET_NOT_FOUND", message="gone")
    met.impostor.tamper = _stream(lambda honest: [pb.PredictStreamResponse(index=0, refusal=refusal)])
    with pytest.raises(RequestRefusedError, match=r"cell\.png") as refused:
        list(met.client.predict_many([path]))
    assert (refused.value.status, refused.value.reason) == ("NOT_FOUND", "KEY_SET_NOT_FOUND")
