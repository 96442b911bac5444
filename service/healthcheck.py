"""``python -m service.healthcheck``: exit 0 when the service on this machine answers that it serves."""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    """Ask the health service; the address is ``HEMACRYPT_HEALTH_TARGET``, by default this machine's port 50051."""
    target = os.environ.get("HEMACRYPT_HEALTH_TARGET", f"127.0.0.1:{os.environ.get('HEMACRYPT_PORT', '50051')}")
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError as error:
            print(f"{target}: {error.code().name}", file=sys.stderr)
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
