"""Bad input gets a clear status and changes nothing: a table of what goes wrong, each against the running service."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from client_sdk import Client, RequestRefusedError
from client_sdk._crypto import KeyHolder
from hemacrypt.embedded import SampleCell, bundle_path
from hemacrypt.errors import ImageError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.plan.plan import Layout, PublicPlan
from hemacrypt.planner import plan_network
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys, LevelKeys, key_set_id
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import digest


@pytest.fixture(autouse=True)
def nothing_changes(
    client: Client, cells: list[SampleCell], service_directory: Path, request: pytest.FixtureRequest
) -> Iterator[None]:
    """After every refusal the store holds what it held, and the service still gives the right answer."""
    before = _stored(service_directory)
    yield
    assert _stored(service_directory) == before
    clear = request.getfixturevalue("bundle").network(client.preprocessing(cells[0].path)[None])[0]
    assert np.abs(client.predict(cells[0].path).logits - clear).max() <= client.plan.logit_error_bound


def _stored(service_directory: Path) -> dict[str, str]:
    store = service_directory / "store"
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def valid(client: Client, cells: list[SampleCell]) -> pb.PredictRequest:
    return client._request(client.plan, [cells[0].path])[0]


def _carry(request: pb.PredictRequest, *ciphertexts: bytes) -> None:
    request.ciphertexts[:] = ciphertexts
    request.ciphertext_sha256 = digest(ciphertexts)


def _refusal(client: Client, request: pb.PredictRequest) -> RequestRefusedError:
    with pytest.raises(RequestRefusedError) as refused:
        client._predict_once(request)
    return refused.value


@pytest.fixture(scope="module")
def other() -> KeyHolder:
    """Somebody who follows another plan: degree 4096, two data primes."""
    random = np.random.default_rng(1)
    return KeyHolder(
        plan_network(CollapsedNetwork((1, 4, 4), (Dense(random.normal(size=(2, 16)), np.zeros(2)),))).public
    )


def _altered(client: Client, **changes: object) -> KeyHolder:
    """The client's own key, but following a plan that differs."""
    values = {field: getattr(client.plan, field) for field in PublicPlan.__dataclass_fields__} | changes
    return KeyHolder(PublicPlan(**values), client._holder(client.plan).secret_bytes())


def _uncompressed(ciphertext: bytes, client: Client) -> bytearray:
    largest = sealformat.largest_ciphertext(client.plan.parameters)
    body = sealformat.unwrap(ciphertext, largest, "ciphertext")
    return bytearray(sealformat.header(16 + len(body), sealio.seal_minor_version()) + body)


def _lower_level(client: Client, ciphertext: bytes) -> bytes:
    import tenseal.sealapi as seal

    context = sealio.make_context(client.plan.parameters)
    loaded = sealio.load(seal.Ciphertext(), context, ciphertext)
    seal.Evaluator(context).mod_switch_to_next_inplace(loaded)
    return sealio.dump(loaded)


def _patched(position: int, replacement: bytes) -> Callable[[bytes, Client], bytes]:
    def patch(ciphertext: bytes, client: Client) -> bytes:
        content = _uncompressed(ciphertext, client)
        content[position : position + len(replacement)] = replacement
        return bytes(content)

    return patch


_SHAPE = 16 + 33  # behind header, identifier and form flag: polynomials, degree, primes
_DAMAGES: dict[str, tuple[Callable[[bytes, Client], bytes], str]] = {
    "empty": (lambda ciphertext, client: b"", "0 bytes"),
    "not a ciphertext": (lambda ciphertext, client: b"\x89PNG\r\n\x1a\n" + bytes(1000), "SEAL's header"),
    "cut in half": (lambda ciphertext, client: ciphertext[: len(ciphertext) // 2], "cut off"),
    "one byte short": (lambda ciphertext, client: ciphertext[:-1], "cut off"),
    "one byte long": (lambda ciphertext, client: ciphertext + b"\0", "extended"),
    "three polynomials": (_patched(_SHAPE, struct.pack("<Q", 3)), "3 polynomials"),
    "half the degree": (_patched(_SHAPE + 8, struct.pack("<Q", 4096)), "degree 4096"),
    "an absurd degree": (_patched(_SHAPE + 8, struct.pack("<Q", 1 << 62)), "expected 2 of degree"),
    "five primes": (_patched(_SHAPE + 16, struct.pack("<Q", 5)), "over 5 primes"),
    "another scale": (_patched(_SHAPE + 24, struct.pack("<d", 2.0**20)), "scale: 2^20"),
    "no number as scale": (_patched(_SHAPE + 24, struct.pack("<d", float("nan"))), "scale"),
    "an absurd count": (_patched(_SHAPE + 40 + 16, struct.pack("<Q", 1 << 60)), "residues; expected"),
    "a residue above its prime": (_patched(_SHAPE + 40 + 24, struct.pack("<Q", 1 << 40)), "below its prime"),
    "another level": (lambda ciphertext, client: _lower_level(client, ciphertext), "belongs to level 4"),
}


@pytest.mark.parametrize(("damage", "told"), _DAMAGES.values(), ids=_DAMAGES.keys())
def test_damaged_ciphertexts_are_refused(
    client: Client, valid: pb.PredictRequest, damage: Callable[[bytes, Client], bytes], told: str
) -> None:
    _carry(valid, damage(valid.ciphertexts[0], client))
    refused = _refusal(client, valid)
    assert (refused.status, refused.reason) == ("INVALID_ARGUMENT", "CIPHERTEXT_INVALID")
    assert told in str(refused)


@pytest.mark.parametrize("count", [0, 2, 100])
def test_more_or_fewer_ciphertexts_than_the_plan_has_are_refused(
    client: Client, valid: pb.PredictRequest, count: int
) -> None:
    _carry(valid, *[valid.ciphertexts[0][:1000]] * count)
    refused = _refusal(client, valid)
    assert (refused.status, refused.reason) == ("INVALID_ARGUMENT", "CIPHERTEXT_INVALID")
    assert f"{count} ciphertexts; the plan lays its input over 1" in str(refused)


def test_a_bit_that_flips_on_the_way_is_noticed(client: Client, valid: pb.PredictRequest) -> None:
    content = bytearray(valid.ciphertexts[0])
    content[len(content) // 2] ^= 0x10
    valid.ciphertexts[0] = bytes(content)
    assert _refusal(client, valid).reason == "DIGEST_MISMATCH"


def test_a_ciphertext_for_other_parameters_is_refused(
    client: Client, valid: pb.PredictRequest, other: KeyHolder
) -> None:
    _carry(valid, *other.encrypt(np.zeros((1, 4, 4))))
    assert _refusal(client, valid).reason == "CIPHERTEXT_INVALID"


def test_a_ciphertext_at_another_scale_is_refused(
    client: Client, valid: pb.PredictRequest, cells: list[SampleCell]
) -> None:
    holder = _altered(client, input_scale=client.plan.input_scale * 2)
    _carry(valid, *holder.encrypt(client.preprocessing(cells[0].path)))
    refused = _refusal(client, valid)
    assert (refused.reason, refused.status) == ("CIPHERTEXT_INVALID", "INVALID_ARGUMENT")
    assert "scale" in str(refused)


def test_a_ciphertext_of_two_megabytes_is_refused_by_its_size(client: Client, valid: pb.PredictRequest) -> None:
    _carry(valid, bytes(2_000_000))
    assert _refusal(client, valid).status in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")


def test_unknown_models_are_refused(client: Client, valid: pb.PredictRequest, address: str) -> None:
    valid.model = "melanoma"
    refused = _refusal(client, valid)
    assert (refused.status, refused.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    with (
        Client(address, "melanoma", key_directory="unused") as stranger,
        pytest.raises(RequestRefusedError, match="leukaemia"),
    ):
        assert stranger.plan


def test_unknown_key_sets_are_refused(client: Client, valid: pb.PredictRequest) -> None:
    valid.key_set_id = "0" * 64
    refused = _refusal(client, valid)
    assert (refused.status, refused.reason) == ("NOT_FOUND", "KEY_SET_NOT_FOUND")


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 62 + "/."])
def test_names_that_are_no_digest_are_refused(client: Client, valid: pb.PredictRequest, name: str) -> None:
    valid.key_set_id = name
    assert _refusal(client, valid).reason == "KEY_SET_ID_INVALID"


def test_another_plan_is_refused(client: Client, valid: pb.PredictRequest) -> None:
    valid.plan_id = "f" * 64
    refused = _refusal(client, valid)
    assert (refused.status, refused.reason) == ("FAILED_PRECONDITION", "PLAN_CHANGED")


def _keys_refused(client: Client, blob: bytes, name: str | None = None) -> RequestRefusedError:
    with pytest.raises(RequestRefusedError) as refused:
        client._upload(blob, name or key_set_id(blob), lambda sent, total: None)
    return refused.value


def test_keys_for_other_parameters_are_refused(client: Client, other: KeyHolder) -> None:
    refused = _keys_refused(client, other.evaluation_keys().to_bytes())
    assert (refused.status, refused.reason) == ("INVALID_ARGUMENT", "KEYS_INVALID")


def test_keys_without_a_rotation_are_refused(client: Client) -> None:
    first, *others = client.plan.keys
    fewer = _altered(client, keys=(first._replace(elements=first.elements[1:]), *others))
    assert _keys_refused(client, fewer.evaluation_keys().to_bytes()).reason == "KEYS_INVALID"


def test_keys_with_a_rotation_too_many_are_refused(client: Client) -> None:
    *others, last = client.plan.keys
    unused = next(element for element in range(5, 1000, 2) if element not in last.elements)
    more = _altered(client, keys=(*others, last._replace(elements=tuple(sorted((*last.elements, unused))))))
    assert _keys_refused(client, more.evaluation_keys().to_bytes()).reason == "KEYS_INVALID"


def test_swapped_keys_are_refused(client: Client) -> None:
    levels = EvaluationKeys.from_bytes(client.keys.evaluation_blob()).levels
    swapped = tuple(LevelKeys(keys.galois, keys.relinearisation) for keys in levels)
    assert _keys_refused(client, EvaluationKeys(swapped).to_bytes()).reason == "KEYS_INVALID"


def test_keys_at_another_level_are_refused(client: Client) -> None:
    """Every level's keys are fine ones, but each for another chain than the one that it stands for."""
    levels = EvaluationKeys.from_bytes(client.keys.evaluation_blob()).levels
    one, other, *_ = (number for number, group in enumerate(client.plan.keys) if group.elements)
    moved = list(levels)
    moved[one], moved[other] = (
        replace(levels[one], galois=levels[other].galois),
        replace(levels[other], galois=levels[one].galois),
    )
    refused = _keys_refused(client, EvaluationKeys(tuple(moved)).to_bytes())
    assert (refused.status, refused.reason) == ("INVALID_ARGUMENT", "KEYS_INVALID")


@pytest.mark.parametrize("change", ["fewer", "more", "empty"])
def test_keys_for_more_or_fewer_levels_are_refused(client: Client, change: str) -> None:
    levels = EvaluationKeys.from_bytes(client.keys.evaluation_blob()).levels
    changed = {"fewer": levels[:-1], "more": (*levels, levels[-1]), "empty": ()}[change]
    refused = _keys_refused(client, EvaluationKeys(changed).to_bytes())
    assert refused.reason == "KEYS_INVALID"
    assert f"for {len(changed)} levels" in str(refused)


def test_cut_keys_are_refused(client: Client) -> None:
    assert _keys_refused(client, client.keys.evaluation_blob()[:-5]).reason == "KEYS_INVALID"


def test_keys_that_are_noise_are_refused(client: Client) -> None:
    assert _keys_refused(client, np.random.default_rng(0).bytes(100_000)).reason == "KEYS_INVALID"


def test_keys_under_a_wrong_name_are_refused(client: Client) -> None:
    refused = _keys_refused(client, b"short", name="1" * 64)
    assert (refused.status, refused.reason) == ("INVALID_ARGUMENT", "DIGEST_MISMATCH")


def test_too_many_key_bytes_are_refused_before_they_come(client: Client) -> None:
    header = pb.KeySetHeader(model=client.model, plan_id=client.plan.plan_id, key_set_id="2" * 64, total_bytes=1 << 40)
    with pytest.raises(grpc.RpcError) as error:
        client._stub.RegisterKeys(iter([pb.RegisterKeysRequest(header=header)]), timeout=10)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _header(client: Client, **changes: object) -> pb.RegisterKeysRequest:
    values = {
        "model": client.model,
        "plan_id": client.plan.plan_id,
        "key_set_id": "3" * 64,
        "total_bytes": 10,
    } | changes
    return pb.RegisterKeysRequest(header=pb.KeySetHeader(**values))


_UPLOADS: dict[str, tuple[Callable[[Client], list[pb.RegisterKeysRequest]], str]] = {
    "nothing": (lambda client: [], "HEADER_EXPECTED"),
    "chunk first": (lambda client: [pb.RegisterKeysRequest(chunk=b"abc")], "HEADER_EXPECTED"),
    "two headers": (lambda client: [_header(client), _header(client)], "CHUNK_EXPECTED"),
    "more than announced": (
        lambda client: [_header(client), pb.RegisterKeysRequest(chunk=bytes(11))],
        "UPLOAD_TOO_LONG",
    ),
    "offset of nothing": (lambda client: [_header(client, offset=5)], "OFFSET_MISMATCH"),
    "size of zero": (lambda client: [_header(client, total_bytes=0)], "KEYS_TOO_LARGE"),
    "other plan": (lambda client: [_header(client, plan_id="x")], "PLAN_CHANGED"),
    "path as name": (lambda client: [_header(client, key_set_id="../../keys")], "KEY_SET_ID_INVALID"),
}


@pytest.mark.parametrize(("messages", "reason"), _UPLOADS.values(), ids=_UPLOADS.keys())
def test_malformed_uploads_are_refused(
    client: Client, messages: Callable[[Client], list[pb.RegisterKeysRequest]], reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        client._stub.RegisterKeys(iter(messages(client)), timeout=10)
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    assert status is not None
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("hemacrypt.v1", reason)
    client._stub.DeleteKeySet(pb.DeleteKeySetRequest(key_set_id="3" * 64))


def test_images_that_are_none_are_refused_before_anything_is_sent(client: Client, tmp_path: Path) -> None:
    fake, small, huge = tmp_path / "fake.png", tmp_path / "small.png", tmp_path / "huge.png"
    fake.write_text("this is not an image")
    from PIL import Image

    Image.new("RGB", (32, 32)).save(small)
    with huge.open("wb") as file:
        file.truncate(1 << 30)
    for path, told in ((fake, "no PNG"), (small, "32x32"), (huge, "1,073,741,824"), (tmp_path, "not a file")):
        with pytest.raises(ImageError, match=told):
            client.predict(path)


def test_pixels_of_a_wrong_shape_or_type_are_refused(client: Client) -> None:
    for pixels in (
        np.zeros((450, 450), dtype=np.uint8),
        np.zeros((449, 450, 3), dtype=np.uint8),
        np.zeros((450, 450, 3), dtype=np.float32),
    ):
        with pytest.raises(ImageError, match="expected"):
            client.predict(pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors", "all_weights.csv", "all_bias.csv"])
def test_a_bundle_with_a_flipped_bit_is_not_served(tmp_path: Path, name: str, bundle: Bundle) -> None:
    shutil.copytree(bundle_path(), tmp_path / "bundle")
    path = tmp_path / "bundle" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    path.write_bytes(content)
    command = [sys.executable, "-m", "service", str(tmp_path / "bundle"), "--port", "0", "--store", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_refusals_carry_details_and_no_traceback(client: Client, valid: pb.PredictRequest) -> None:
    _carry(valid, b"nonsense")
    with pytest.raises(grpc.RpcError) as error:
        client._stub.Predict(valid, timeout=10)
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    assert status is not None
    violation = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(violation)
    assert violation.field_violations[0].field == "ciphertext"
    assert "Traceback" not in status.message
    assert ".py" not in status.message


def test_a_layout_may_not_repeat_a_slot() -> None:
    with pytest.raises(Exception, match="share a slot"):
        Layout(np.array([1, 1]), 4, 4)
