"""Both schemes over a real service process with the embedded model: the same keys, exact integers, clean refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc import RpcError, StatusCode
from grpc_status import rpc_status

from client_sdk import Client
from hemacrypt.embedded import SampleCell
from hemacrypt.model.bundle import Bundle
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.planner import plan_bundle_layouts
from hemacrypt.planner.latency.bfv import quantised_for
from hemacrypt.seal.evaluation_keys import EvaluationKeys
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import digest


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> BfvPlan:
    """The plan that the service must have come to by itself."""
    (found,) = plan_bundle_layouts(bundle, exact=True).exact
    return found


@pytest.fixture
def valid(client: Client, cells: list[SampleCell]) -> pb.PredictRequest:
    return client._request(client._plan_for("bfv"), [cells[0].path])[0]


def _integers(plan: BfvPlan, bundle: Bundle, cell: SampleCell) -> tuple[int, ...]:
    values = bundle.manifest.preprocessing(cell.path)[None]
    return tuple(int(number) for number in quantised_for(bundle.network, plan).integers(values)[0])


def test_exact_answers_are_the_integers_of_the_quantised_network(
    client: Client, bundle: Bundle, cells: list[SampleCell], plan: BfvPlan
) -> None:
    assert client.exact_plan is not None
    assert client.exact_plan.plan_id == plan.public.plan_id
    assert client.exact_plan.proven
    for cell in cells[:3]:
        answer = client.predict(cell.path, scheme="bfv")
        assert answer.integers == _integers(plan, bundle, cell)
        clear = bundle.network(client.preprocessing(cell.path)[None])[0]
        assert np.abs(answer.logits - clear).max() < 5 * answer.quantisation_error
        assert answer.index == int(np.argmax(clear))


def test_a_stream_of_exact_answers(client: Client, bundle: Bundle, cells: list[SampleCell], plan: BfvPlan) -> None:
    answers = list(client.predict_many([cell.path for cell in cells[3:]], scheme="bfv"))
    assert [answer.integers for answer in answers] == [_integers(plan, bundle, cell) for cell in cells[3:]]


def test_both_schemes_share_the_key_set_and_keep_the_budget(client: Client, plan: BfvPlan) -> None:
    assert client.plan.keys == plan.public.keys
    assert client.batch_plan is not None
    assert client.batch_plan.keys == plan.public.keys
    blob = client.keys.evaluation_blob()
    assert len(blob) < 34_500_000
    assert len(EvaluationKeys.from_bytes(blob).levels) == len(plan.public.keys)


def test_the_command_predicts_exactly(address: str, client: Client, cells: list[SampleCell], plan: BfvPlan) -> None:
    program = Path(sys.executable).with_name("hemacrypt")
    command = [program, "predict", str(cells[0].path), "--server", address, "--keys", str(client.keys.path)]
    done = subprocess.run([*command, "--scheme", "bfv", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["scheme"], told["logit_error_bound"]) == ("bfv", 0)
    assert told["logits"] == client.predict(cells[0].path, scheme="bfv").logits.tolist()


def test_batches_are_no_matter_of_bfv(address: str, client: Client, cells: list[SampleCell]) -> None:
    program = Path(sys.executable).with_name("hemacrypt")
    command = [program, "predict", str(cells[0].path), "--server", address, "--scheme", "bfv", "--layout", "batch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


_Change = Callable[[Client, list[bytes], list[bytes]], list[bytes]]
_HOSTILE: dict[str, tuple[str, _Change, str]] = {
    "no ciphertext": ("bfv", lambda client, exact, other: [], "ciphertexts"),
    "one too few": ("bfv", lambda client, exact, other: exact[:-1], "ciphertexts"),
    "one too many": ("bfv", lambda client, exact, other: [*exact, exact[0]], "ciphertexts"),
    "exact ciphertexts for CKKS": ("ckks", lambda client, exact, other: exact, "ciphertexts"),
    "one exact ciphertext for CKKS": ("ckks", lambda client, exact, other: exact[:1], "level"),
    "CKKS for BFV": ("bfv", lambda client, exact, other: other, "ciphertexts"),
    "CKKS in the place of one": ("bfv", lambda client, exact, other: [*other, *exact[1:]], "level"),
    "moduli exchanged": ("bfv", lambda client, exact, other: exact[::-1], "level"),
    "one modulus twice": ("bfv", lambda client, exact, other: [exact[0], *exact[:-1]], "level"),
    "cut in half": ("bfv", lambda client, exact, other: [exact[0][: len(exact[0]) // 2], *exact[1:]], "ciphertext"),
    "a byte short": ("bfv", lambda client, exact, other: [*exact[:-1], exact[-1][:-1]], "ciphertext"),
    "all in one": ("bfv", lambda client, exact, other: [b"".join(exact)], "ciphertexts"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "change", "field"), _HOSTILE.values(), ids=_HOSTILE.keys())
def test_hostile_requests_are_refused_with_details(
    client: Client,
    bundle: Bundle,
    cells: list[SampleCell],
    plan: BfvPlan,
    valid: pb.PredictRequest,
    scheme: str,
    change: _Change,
    field: str,
) -> None:
    approximate = client._request(client.plan, [cells[0].path])[0]
    asked = valid if scheme == "bfv" else approximate
    parts = change(client, list(valid.ciphertexts), list(approximate.ciphertexts))
    hostile = pb.PredictRequest(
        model=asked.model,
        plan_id=asked.plan_id,
        key_set_id=asked.key_set_id,
        ciphertexts=parts,
        ciphertext_sha256=digest(parts),
    )
    with pytest.raises(RpcError) as error:
        client._stub.Predict(hostile, timeout=60)
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert error.value.code() is StatusCode.INVALID_ARGUMENT
    assert (info.domain, info.reason) == ("hemacrypt.v1", "CIPHERTEXT_INVALID")
    assert bad.field_violations[0].field == field, status.message
    assert "Traceback" not in status.message
    answer = client.predict(cells[1].path, scheme="bfv")
    assert answer.integers == _integers(plan, bundle, cells[1])
