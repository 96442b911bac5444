"""Why a request is refused, as a status with machine-readable details — and nothing of what went wrong inside.

Reasons are listed in docs/wire-protocol.md. An unforeseen exception becomes INTERNAL with an incident number; its
traceback goes to the log, where only types and places are written, never values.
"""

from __future__ import annotations

import functools
import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "hemacrypt.v1"
log = structlog.get_logger()

Method = TypeVar("Method", bound=Callable[..., Any])


class Refused(Exception):  # noqa: N818 - a refusal is an answer, not an error of ours
    """A request that is answered with a status instead of a result.

    Parameters
    ----------
    code:
        A ``google.rpc.Code``.
    reason:
        UPPER_SNAKE_CASE, for programs.
    message:
        What was got, what was expected, what to do; never contents.
    details:
        Further ``google.rpc`` messages.
    metadata:
        Facts that a program may need, for example ``received_bytes``.
    """

    def __init__(self, code: int, reason: str, message: str, *details: Message, **metadata: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.details: tuple[Message, ...] = (
            error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata),
            *details,
        )

    def status(self) -> status_pb2.Status:
        """Return the google.rpc.Status to send."""
        packed = []
        for detail in self.details:
            envelope = AnyMessage()
            envelope.Pack(detail)
            packed.append(envelope)
        return status_pb2.Status(code=self.code, message=self.message, details=packed)


def invalid(reason: str, field: str, message: str) -> Refused:
    """Refuse an argument: INVALID_ARGUMENT with the field that is at fault."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
    return Refused(
        code_pb2.INVALID_ARGUMENT, reason, message, error_details_pb2.BadRequest(field_violations=[violation])
    )


def missing(reason: str, kind: str, name: str, message: str) -> Refused:
    """Refuse because something does not exist: NOT_FOUND with its kind and name."""
    info = error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name, description=message)
    return Refused(code_pb2.NOT_FOUND, reason, message, info)


def outdated(reason: str, subject: str, message: str) -> Refused:
    """Refuse because the client's view of the service is old: FAILED_PRECONDITION."""
    violation = error_details_pb2.PreconditionFailure.Violation(type=reason, subject=subject, description=message)
    return Refused(
        code_pb2.FAILED_PRECONDITION, reason, message, error_details_pb2.PreconditionFailure(violations=[violation])
    )


def busy(code: int, reason: str, message: str, retry_seconds: float) -> Refused:
    """Refuse for now, and say when to try again."""
    delay = Duration()
    delay.FromNanoseconds(int(retry_seconds * 1e9))
    return Refused(code, reason, message, error_details_pb2.RetryInfo(retry_delay=delay))


@contextmanager
def translated(method: str) -> Iterator[None]:
    """Turn everything unforeseen into a refusal with an incident number."""
    try:
        yield
    except Refused as refusal:
        log.info("refused", method=method, reason=refusal.reason)
        raise
    except grpc.RpcError:
        # What reading from a client raises when it has hung up, or was silent for too long.
        raise Refused(
            code_pb2.CANCELLED, "CANCELLED", "the client gave the request up, or was silent for too long"
        ) from None
    except Exception as error:
        incident = secrets.token_hex(8)
        # Types and places only: an exception's text may quote what it stumbled over.
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        log.error("incident", method=method, incident=incident, error=type(error).__qualname__, places=places)
        raise Refused(
            code_pb2.INTERNAL,
            "INTERNAL",
            f"the service failed unexpectedly; give incident {incident} to its operator",
            incident=incident,
        ) from None


def refuse(context: grpc.ServicerContext, refusal: Refused) -> NoReturn:
    """End a call with a refusal's status."""
    context.abort_with_status(rpc_status.to_status(refusal.status()))
    raise AssertionError("abort_with_status always raises")


def answered(method: Method) -> Method:
    """Wrap a unary or client-streaming servicer method so that refusals become statuses."""

    @functools.wraps(method)
    def wrapper(servicer: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            with translated(method.__name__):
                return method(servicer, request, context)
        except Refused as refusal:
            refuse(context, refusal)

    return wrapper  # type: ignore[return-value]
