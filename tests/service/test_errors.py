"""Refusals: what a client is told, and that nothing from inside slips out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2
from structlog.testing import capture_logs

import service
from service import errors
from service.errors import Refused, translated

ROOT = Path(service.__file__).parents[1]
DOCUMENT = ROOT / "docs" / "wire-protocol.md"
SECRET = "logit 3.14159 of patient H12"


def _unpacked(refusal: Refused, kind: type[Message]) -> Message:
    """Return the one detail of a kind that is in the status that travels."""
    found = [detail for detail in refusal.status().details if detail.Is(kind.DESCRIPTOR)]
    assert len(found) == 1
    message = kind()
    assert found[0].Unpack(message)
    return message


def test_an_invalid_argument_names_its_field() -> None:
    refusal = errors.invalid("SOME_REASON", "scale", "got 2^3")
    assert (refusal.status().code, refusal.status().message) == (code_pb2.INVALID_ARGUMENT, "got 2^3")
    (violation,) = _unpacked(refusal, error_details_pb2.BadRequest).field_violations  # type: ignore[attr-defined]
    assert (violation.field, violation.description) == ("scale", "got 2^3")


def test_something_missing_is_named() -> None:
    refusal = errors.missing("SOME_REASON", "hemacrypt.v1.Model", "melanoma", "no such model")
    info = _unpacked(refusal, error_details_pb2.ResourceInfo)
    assert refusal.status().code == code_pb2.NOT_FOUND
    assert (info.resource_type, info.resource_name) == ("hemacrypt.v1.Model", "melanoma")  # type: ignore[attr-defined]


def test_an_old_view_is_a_failed_precondition() -> None:
    refusal = errors.outdated("SOME_REASON", "leukaemia", "another plan")
    (violation,) = _unpacked(refusal, error_details_pb2.PreconditionFailure).violations  # type: ignore[attr-defined]
    assert refusal.status().code == code_pb2.FAILED_PRECONDITION
    assert (violation.type, violation.subject) == ("SOME_REASON", "leukaemia")


def test_whoever_is_refused_for_now_is_told_when_to_come_back() -> None:
    refusal = errors.busy(code_pb2.UNAVAILABLE, "SOME_REASON", "later", 1.5)
    retry = _unpacked(refusal, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500  # type: ignore[attr-defined]


def test_every_refusal_has_a_reason_and_facts_for_programs() -> None:
    info = _unpacked(
        Refused(code_pb2.OUT_OF_RANGE, "SOME_REASON", "text", received_bytes="7"), error_details_pb2.ErrorInfo
    )
    assert (info.domain, info.reason) == ("hemacrypt.v1", "SOME_REASON")  # type: ignore[attr-defined]
    assert dict(info.metadata) == {"received_bytes": "7"}  # type: ignore[attr-defined]


def test_a_refusal_passes_and_is_logged_by_its_reason() -> None:
    with capture_logs() as logged, pytest.raises(Refused) as refused, translated("Predict"):
        raise errors.invalid("SOME_REASON", "scale", SECRET)
    assert refused.value.reason == "SOME_REASON"
    assert logged == [{"event": "refused", "log_level": "info", "method": "Predict", "reason": "SOME_REASON"}]


def test_anything_else_becomes_an_incident_without_its_text() -> None:
    with capture_logs() as logged, pytest.raises(Refused) as refused, translated("Predict"):
        raise RuntimeError(SECRET)
    refusal = refused.value
    incident = _unpacked(refusal, error_details_pb2.ErrorInfo).metadata["incident"]  # type: ignore[attr-defined]
    assert (refusal.code, refusal.reason) == (code_pb2.INTERNAL, "INTERNAL")
    assert incident in refusal.message
    assert len(incident) >= 16
    assert SECRET.encode() not in refusal.status().SerializeToString()
    # A chained exception would carry the text into whatever prints the refusal.
    assert refusal.__cause__ is None
    assert refusal.__suppress_context__
    (entry,) = logged
    assert (entry["event"], entry["error"], entry["incident"]) == ("incident", "RuntimeError", incident)
    assert any(re.fullmatch(r".*test_errors\.py:\d+", place) for place in entry["places"])
    assert SECRET not in str(logged)


def test_two_incidents_have_two_numbers() -> None:
    numbers = set()
    for _ in range(2):
        with pytest.raises(Refused) as refused, translated("Predict"):
            raise ValueError
        numbers.add(refused.value.message)
    assert len(numbers) == 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_being_told_to_stop_is_no_incident(kind: type[BaseException]) -> None:
    with pytest.raises(kind), translated("Predict"):
        raise kind


_CODES = {"invalid": "INVALID_ARGUMENT", "missing": "NOT_FOUND", "outdated": "FAILED_PRECONDITION"}
_REASON = re.compile(r"[A-Z]+(_[A-Z]+)*")


def _reasons_in_code() -> set[tuple[str, str]]:
    """Return reason and code of every refusal that the service's source makes."""
    found = set()
    for path in sorted((ROOT / "service").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in (*_CODES, "Refused", "busy"):
                continue
            reasons = [
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
                and _REASON.fullmatch(argument.value)
            ]
            codes = [argument.attr for argument in node.args if isinstance(argument, ast.Attribute)]
            found |= {(reason, _CODES.get(name) or codes[0]) for reason in reasons[:1]}
    return found


def test_every_reason_is_documented_with_its_code() -> None:
    if not DOCUMENT.is_file():
        pytest.skip(f"{DOCUMENT} is not written yet")
    used = _reasons_in_code()
    assert {"KEY_SET_NOT_FOUND", "QUEUE_FULL", "STORE_FULL", "INTERNAL"} <= {reason for reason, _ in used}
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == used


def test_statuses_of_the_contract_are_real_reasons() -> None:
    """The contract's comments name reasons in brackets; each must be one that the service sends."""
    contract = (ROOT / "proto" / "hemacrypt" / "v1" / "inference.proto").read_text(encoding="utf-8")
    text = re.sub(r"\n\s*// ", " ", contract)
    named = {
        (reason, code)
        for code, reasons in re.findall(r"\b([A-Z]+_[A-Z_]+) \(([A-Z_]+(?: or [A-Z_]+)?)\)", text)
        for reason in reasons.split(" or ")
    }
    assert len(named) >= 8
    assert named <= _reasons_in_code()
