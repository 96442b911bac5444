"""``python -m service.healthcheck``: exit 0 when the service on this machine answers that it serves."""

from __future__ import annotations

import os
import socket
import ssl
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS = 5.0


def main() -> int:
    """Ask the service at ``HEMACRYPT_PORT`` on this machine; with ``HEMACRYPT_TLS_CERTIFICATE`` set, by TLS."""
    port = os.environ.get("HEMACRYPT_PORT", "50051")
    healthy = _handshakes(int(port)) if os.environ.get("HEMACRYPT_TLS_CERTIFICATE") else _serves(f"127.0.0.1:{port}")
    return 0 if healthy else 1


def _serves(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError as error:
            print(f"{target}: {error.code().name}", file=sys.stderr)
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _handshakes(port: int) -> bool:
    """Tell whether something speaks TLS and HTTP/2 at a port.

    The certificate names the service as others see it, not 127.0.0.1, so it is not verified here: the question is
    whether the process answers, not who it is.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as plain,
            context.wrap_socket(plain) as secured,
        ):
            return secured.selected_alpn_protocol() == "h2"
    except OSError as error:
        print(f"127.0.0.1:{port}: {type(error).__name__}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(main())
