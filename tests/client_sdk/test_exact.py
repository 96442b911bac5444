"""The client under BFV: the very integers of the network, the keys of CKKS, and no answer but a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from client_sdk import Client, ClientError, ReplyError, RequestRefusedError
from client_sdk._crypto import BfvKeyHolder
from client_sdk.cli import as_record
from hemacrypt.model.preprocess import Pixels
from hemacrypt.plan.plan import united
from hemacrypt.planner.chain import primes_below
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import bfv_plan_to_message, digest
from tests.client_sdk.conftest import Impostor, Met, Small, make_small, serving
from tests.hemacrypt.handmade import Handmade, handmade


@dataclass(frozen=True)
class Exact:
    """The small model with an exact plan beside its others, for some network of the same shape."""

    small: Small
    network: Handmade

    def integers(self, client: Client, image: Pixels) -> list[int]:
        """Return what the client must get."""
        (row,) = self.network.integers(client.preprocessing(image).reshape(1, -1))
        return [int(number) for number in row]


@pytest.fixture(scope="session")
def exact() -> Exact:
    approximate = make_small()
    first = approximate.plan
    network = handmade([48, 2], first.parameters, tuple(islice(primes_below(1 << 18, first.parameters.degree), 2)))
    plan = network.plan
    keys = united([first.keys, plan.public.keys])
    public = replace(
        plan.public, model="small", labels=first.labels, keys=keys, preprocessing_digest=first.preprocessing_digest,
        largest_logit=1 << 33,
    )  # fmt: skip
    plans = tuple(replace(plan, public=replace(plan.public, keys=keys)) for plan in approximate.plans)
    return Exact(Small(approximate.bundle, plans, (replace(plan, public=public),)), network)


@pytest.fixture(scope="module")
def image() -> Pixels:
    return np.random.default_rng(9).integers(0, 256, (4, 4, 3), dtype=np.uint8)


@pytest.fixture
def served(exact: Exact, tmp_path: Path) -> Iterator[Met]:
    impostor = Impostor(exact.small)
    with serving(impostor) as address, Client(address, "small", key_directory=tmp_path / "keys") as client:
        client.prepare()
        impostor.calls.clear()
        yield Met(impostor, client, address)


def test_the_integers_are_those_of_the_network(served: Met, exact: Exact, image: Pixels) -> None:
    answer = served.client.predict(image, scheme="bfv")
    expected = exact.integers(served.client, image)
    assert answer.integers == tuple(expected)
    np.testing.assert_array_equal(answer.logits, np.array(expected) / 1000.0)
    assert (answer.scheme, answer.error_bound, answer.quantisation_error) == ("bfv", 0.0, 0.5)
    assert answer.index == int(np.argmax(expected))
    assert min(answer.size.upload, answer.size.reply) > 0


def test_one_set_of_keys_serves_both_schemes(served: Met, exact: Exact, image: Pixels) -> None:
    client = served.client
    approximate = client.predict(image)
    assert (approximate.scheme, approximate.integers, approximate.quantisation_error) == ("ckks", None, 0.0)
    clear = exact.small.bundle.network(client.preprocessing(image)[None])[0]
    assert np.abs(approximate.logits - clear).max() <= approximate.error_bound
    assert client.predict(image, scheme="bfv").integers == tuple(exact.integers(client, image))
    assert served.impostor.calls == ["Predict", "Predict"]
    assert len(served.impostor.keys) == 1


def test_many_images_come_back_in_order(served: Met, exact: Exact) -> None:
    random = np.random.default_rng(10)
    images = [random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(5)]
    answers = list(served.client.predict_many(images, scheme="bfv"))
    assert [answer.integers for answer in answers] == [tuple(exact.integers(served.client, i)) for i in images]
    assert {answer.images for answer in answers} == {1}


def test_a_label_is_sure_when_quantisation_cannot_change_it(served: Met, image: Pixels) -> None:
    answer = served.client.predict(image, scheme="bfv")
    gap = abs(answer.logits[0] - answer.logits[1])
    assert replace(answer, quantisation_error=gap * 0.49).decided_beyond_error
    assert not replace(answer, quantisation_error=gap * 0.51).decided_beyond_error


def test_the_record_of_an_exact_answer_has_its_scheme_and_logits_as_they_are(served: Met, image: Pixels) -> None:
    answer = served.client.predict(image, scheme="bfv")
    record = as_record(answer)
    assert (record["scheme"], record["logit_error_bound"], record["quantisation_error"]) == ("bfv", 0.0, 0.5)
    assert record["logits"] == answer.logits.tolist()
    assert "integers" not in repr(answer)


def test_a_service_without_exact_plans_is_told_apart(met: Met, image: Pixels) -> None:
    assert met.client.exact_plan is None
    for ask in (
        lambda: met.client.predict(image, scheme="bfv"),
        lambda: list(met.client.predict_many([image], scheme="bfv")),
    ):
        with pytest.raises(RequestRefusedError, match="under BFV") as refusal:
            ask()
        assert (refusal.value.status, refusal.value.reason) == ("FAILED_PRECONDITION", "SCHEME_NOT_SERVED")
    assert met.impostor.calls == []


def test_a_scheme_of_another_name_is_refused(served: Met, image: Pixels) -> None:
    with pytest.raises(ClientError, match="no scheme is called 'bgv'"):
        served.client.predict(image, scheme="bgv")  # type: ignore[arg-type]


_Lie = Callable[[Exact, pb.GetModelResponse], None]


def _exact_plan(**changes: Any) -> _Lie:
    """Say something else in the exact plan, under its true name."""

    def change(exact: Exact, message: pb.GetModelResponse) -> None:
        message.exact[0].CopyFrom(bfv_plan_to_message(replace(exact.small.exact[0].public, **changes)))

    return change


def _fewer_keys(exact: Exact, message: pb.GetModelResponse) -> None:
    public = exact.small.exact[0].public
    keys = tuple(group._replace(elements=group.elements[:-1]) for group in public.keys)
    message.exact[0].CopyFrom(bfv_plan_to_message(replace(public, keys=keys)))


def _smaller_image(exact: Exact, message: pb.GetModelResponse) -> None:
    public = exact.small.exact[0].public
    layout = replace(public.input_layout, positions=public.input_layout.positions[:-1], imaginary=None)
    message.exact[0].CopyFrom(bfv_plan_to_message(replace(public, input_layout=layout)))


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (_exact_plan(labels=("a", "b")), "need different keys or name different labels"),
        (_exact_plan(model="another"), "hashes to another name"),
        (_exact_plan(preprocessing_digest="0" * 64), "hashes to another name"),
        (_fewer_keys, "need different keys or name different labels"),
        (_smaller_image, "do not fit together"),
        (lambda exact, message: message.exact[0].plain_moduli.append(97), "no prime|slots"),
        (lambda exact, message: message.exact.add(), "cannot be used"),
    ],
    ids=["labels", "model", "preprocessing", "keys", "size", "modulus", "an empty plan"],
)
def test_a_service_that_lies_about_its_exact_plan_is_not_used(
    exact: Exact, tmp_path: Path, lie: _Lie, told: str
) -> None:
    message = exact.small.message()
    lie(exact, message)
    client = Client("127.0.0.1:1", "small", key_directory=tmp_path)
    client._stub = SimpleNamespace(GetModel=lambda request, timeout: message)
    with client, pytest.raises(ReplyError, match=told):
        _ = client.exact_plan


_Change = Callable[[list[bytes]], list[bytes]]
_FALSE_REPLIES: dict[str, tuple[_Change, str]] = {
    "none": (lambda parts: [], "0 ciphertexts; expected 2"),
    "one too few": (lambda parts: parts[:1], "1 ciphertexts; expected 2"),
    "one too many": (lambda parts: [*parts, parts[0]], "3 ciphertexts; expected 2"),
    "the moduli exchanged": (lambda parts: parts[::-1], "other parameters"),
    "one modulus twice": (lambda parts: [parts[0], parts[0]], "other parameters"),
    "nonsense": (lambda parts: [parts[0], b"nonsense"], "no SEAL object"),
    "cut off": (lambda parts: [parts[0][:-1], parts[1]], "cut off"),
}


@pytest.mark.parametrize(("change", "told"), _FALSE_REPLIES.values(), ids=_FALSE_REPLIES.keys())
def test_replies_that_are_not_the_plans_are_refused(served: Met, image: Pixels, change: _Change, told: str) -> None:
    def tamper(method: str, answer: Any, context: grpc.ServicerContext) -> Any:
        if method == "Predict":
            parts = change(list(answer.ciphertexts))
            return pb.PredictResponse(ciphertexts=parts, ciphertext_sha256=digest(parts))
        return answer

    served.impostor.tamper = tamper
    with pytest.raises(ReplyError, match=told):
        served.client.predict(image, scheme="bfv")


def test_an_answer_of_the_other_scheme_is_refused(served: Met, exact: Exact, image: Pixels) -> None:
    client = served.client
    requests = {scheme: client._request(client._plan_for(scheme), [image])[0] for scheme in ("ckks", "bfv")}
    replies = {scheme: served.impostor.evaluate(request) for scheme, request in requests.items()}
    for asked, given in (("bfv", "ckks"), ("ckks", "bfv")):
        parts = list(replies[given].ciphertexts)
        wanted = exact.small.exact[0].public.output_ciphertexts if asked == "bfv" else 1
        parts = (parts * 2)[:wanted]
        served.impostor.tamper = lambda method, answer, context, parts=parts: pb.PredictResponse(
            ciphertexts=parts, ciphertext_sha256=digest(parts)
        )
        with pytest.raises(ReplyError, match="cannot be decrypted"):
            client.predict(image, scheme=asked)  # type: ignore[arg-type]


def test_an_answer_under_another_key_is_refused(served: Met, exact: Exact, image: Pixels) -> None:
    plan = exact.small.exact[0]
    stranger = BfvKeyHolder(plan.public)
    engine = exact.small.engines[plan.public.plan_id]
    values = served.client.preprocessing(image)
    parts = engine.evaluate(stranger.encrypt(values[None]), engine.load_keys(stranger.evaluation_keys()))
    served.impostor.tamper = lambda method, answer, context: pb.PredictResponse(
        ciphertexts=parts, ciphertext_sha256=digest(parts)
    )
    with pytest.raises(ReplyError, match="not computed from what this key encrypted"):
        served.client.predict(image, scheme="bfv")
