"""The secret key never leaves the hospital: not over the wire, not onto the service's disk, not in any message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from audit.demo import running_service
from client_sdk import Client, RequestRefusedError
from hemacrypt.embedded import SampleCell, bundle_path
from hemacrypt.model.bundle import Bundle
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys, LevelKeys, key_set_id
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import digest
from tests.e2e.recording import recording_proxy

_BLOCK = 32
# Every field that carries bytes, and what is in it; a new one has to be argued for here.
_BYTES_FIELDS = {
    "hemacrypt.v1.RegisterKeysRequest.chunk": "a piece of the evaluation keys",
    "hemacrypt.v1.PredictRequest.ciphertexts": "encrypted images",
    "hemacrypt.v1.PredictResponse.ciphertexts": "encrypted logits",
    "hemacrypt.v1.BatchCiphertext.content": "an encrypted value of many images",
    "hemacrypt.v1.PredictBatchResponse.ciphertext": "an encrypted logit of many images",
}


def _blocks(content: bytes, count: int = 64) -> list[bytes]:
    """Cut out blocks of 32 bytes, evenly spread; 32 random-looking bytes do not turn up by chance."""
    step = max((len(content) - _BLOCK) // count, 1)
    return [content[start : start + _BLOCK] for start in range(16, len(content) - _BLOCK, step)]


def _found(blocks: list[bytes], haystack: bytes) -> int:
    return sum(block in haystack for block in blocks)


def test_no_byte_of_the_secret_key_reaches_the_wire_or_the_service(
    bundle: Bundle, cells: list[SampleCell], tmp_path: Path
) -> None:
    server = tmp_path / "server"
    server.mkdir()
    with (
        running_service(bundle_path(), server, 1, server / "service.log") as target,
        recording_proxy(target) as (proxied, wire),
        Client(proxied, bundle.manifest.name, key_directory=tmp_path / "hospital") as client,
    ):
        key_set = client.prepare()
        client.predict(cells[0].path)
        list(client.predict_many([cell.path for cell in cells[1:4]]))
        exact = client.predict(cells[0].path, scheme="bfv")
        list(client.predict_many([cell.path for cell in cells[1:3]], scheme="bfv"))
        evaluation = client.keys.evaluation_blob()
    secret = (tmp_path / "hospital" / "secret.key").read_bytes()
    # As it is stored, and as it is before compression: the residues of the key itself, which are BFV's as well.
    forms = _blocks(secret) + _blocks(sealformat.unwrap(secret, 1 << 24, "secret key"))
    assert len(forms) >= 120
    assert exact.integers is not None

    disk = b"".join(path.read_bytes() for path in sorted(server.rglob("*")) if path.is_file())
    recorded = bytes(wire.to_service) + bytes(wire.to_client)
    assert _found(forms, recorded) == 0
    assert _found(forms, disk) == 0

    # The same search finds what did travel and was stored, so it would have found the secret key too.
    public = _blocks(evaluation)
    assert _found(public, recorded) > len(public) * 0.9
    assert _found(public, disk) == len(public)
    assert _found(forms, secret + sealformat.unwrap(secret, 1 << 24, "secret key")) == len(forms)
    assert (server / "store" / key_set / "keys").read_bytes() == evaluation


def _messages() -> Iterator[Descriptor]:
    def nested(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for inner in message.nested_types:
            yield from nested(inner)

    for message in pb.DESCRIPTOR.message_types_by_name.values():
        yield from nested(message)


def test_no_message_could_carry_a_secret_key() -> None:
    carrying = {
        field.full_name
        for message in _messages()
        for field in message.fields
        if field.type == FieldDescriptor.TYPE_BYTES
    }
    assert carrying == set(_BYTES_FIELDS)
    for message in _messages():
        for field in message.fields:
            assert not any(word in field.name for word in ("secret", "private", "pixel", "logits", "weights"))


def test_a_secret_key_in_the_place_of_an_evaluation_key_is_refused_and_not_kept(
    client: Client, service_directory: Path, tmp_path: Path
) -> None:
    secret = client._holder(client.plan).secret_bytes()
    levels = [LevelKeys(secret * group.relinearise, secret * bool(group.elements)) for group in client.plan.keys]
    blob = EvaluationKeys(tuple(levels)).to_bytes()
    with pytest.raises(RequestRefusedError) as refused:
        client._upload(blob, key_set_id(blob), lambda sent, total: None)
    assert refused.value.reason == "KEYS_INVALID"
    kept = b"".join(path.read_bytes() for path in (service_directory / "store").rglob("*") if path.is_file())
    assert _found(_blocks(secret), kept) == 0


def test_a_secret_key_in_the_place_of_a_ciphertext_is_refused(client: Client, cells: list[SampleCell]) -> None:
    request, _ = client._request(client.plan, [cells[0].path])
    request.ciphertexts[0] = client._holder(client.plan).secret_bytes()
    request.ciphertext_sha256 = digest(request.ciphertexts)
    with pytest.raises(RequestRefusedError) as refused:
        client._predict_once(request)
    assert refused.value.reason == "CIPHERTEXT_INVALID"


def test_only_the_client_can_name_a_secret_key() -> None:
    root = Path(sealio.__file__).parents[1]
    for package in ("service", "hemacrypt", "training"):
        for path in (root / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "SecretKey(" not in text, path
            assert "KeyGenerator(" not in text, path
            assert "Decryptor(" not in text, path
