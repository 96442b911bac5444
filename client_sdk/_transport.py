"""The channel to the service: options, retries, and statuses turned into exceptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from client_sdk._exceptions import ClientError, RequestRefusedError, ServiceUnavailableError

SERVICE = "hemacrypt.v1.EncryptedInference"
# Reasons that pass by themselves.
_TRY_AGAIN = ("QUEUE_FULL", "WORKER_LOST")
# An encrypted image has 0.2 MB and a reply less; a service that sends more than this is not ours.
_LARGEST_MESSAGE = 64 * 1024 * 1024

# gRPC repeats these calls by itself: they change nothing when they are repeated. Uploads are resumed instead.
_RETRIED = ("ListModels", "GetModel", "GetKeySet", "DeleteKeySet", "Predict")
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE, "method": method} for method in _RETRIED],
            "waitForReady": False,
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2.5,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def open_channel(target: str, root_certificate: Path | None) -> grpc.Channel:
    """Open a channel.

    Parameters
    ----------
    target:
        ``host:port``.
    root_certificate:
        PEM certificate of the authority that signed the service's; without it the channel is not encrypted by TLS
        (the images still are, by the hospital's own key).
    """
    options = [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        ("grpc.max_send_message_length", _LARGEST_MESSAGE),
        # Firewalls forget silent connections after some minutes; a ping every four keeps long streams alive.
        ("grpc.keepalive_time_ms", 240_000),
    ]
    if root_certificate is not None:
        try:
            content = root_certificate.read_bytes()
        except OSError as error:
            raise ClientError(f"{root_certificate} cannot be read ({error.strerror}); name a PEM file") from None
        credentials = grpc.ssl_channel_credentials(content)
        return grpc.secure_channel(target, credentials, options=options)
    return grpc.insecure_channel(target, options=options)


@contextmanager
def statuses_as_exceptions(target: str) -> Iterator[None]:
    """Turn gRPC errors into the client's exceptions."""
    try:
        yield
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        reason, metadata = _error_info(error)
        if code is grpc.StatusCode.UNAVAILABLE and not reason:
            raise ServiceUnavailableError(f"{target} does not answer; check the address and that it runs") from None
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"{target} did not answer in time; allow more with a longer timeout"
            raise ServiceUnavailableError(text) from None
        raise refused(code.value[0], reason, error.details() or "refused", metadata) from None


def refused(code: int, reason: str, message: str, metadata: dict[str, str]) -> ClientError:
    """Return the exception for a refusal; what the service wrote is shown without anything that steers a terminal."""
    name = code_pb2.Code.Name(code) if code in code_pb2.Code.values() else str(code)
    if reason in _TRY_AGAIN:
        return ServiceUnavailableError(f"{printable(message)} ({reason})")
    return RequestRefusedError(name, printable(reason) or name, printable(message), metadata)


def printable(text: str) -> str:
    """Return text from the service without control characters."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _error_info(error: grpc.RpcError) -> tuple[str, dict[str, str]]:
    info = error_details_pb2.ErrorInfo()
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # every error of a call is the call
        for detail in status.details if status is not None else ():
            if detail.Unpack(info):
                return info.reason, dict(info.metadata)
    except (ValueError, DecodeError):
        return "", {}  # details that are broken or contradict the code: the code stands
    return "", {}
