"""Starting and stopping the service."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hemacrypt.engines import check_engine
from hemacrypt.errors import HemacryptError
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from service.catalogue import Model, load_models, why_no_batches
from service.keystore import KeyStore
from service.pool import WorkerPool
from service.servicer import InferenceServicer
from service.settings import Settings

log = structlog.get_logger()

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EncryptedInference"].full_name
# Room for the fields around a ciphertext or chunk in a message.
_ENVELOPE = 64 * 1024
_SMALLEST_LIMIT = 1024 * 1024
# Calls that are answered without waiting, health checks among them.
_SHORT_CALLS = 16


class Service:
    """The whole service: models, workers, key store, gRPC server.

    Parameters
    ----------
    settings:
        What the operator chose.

    Raises
    ------
    HemacryptError
        If a bundle cannot be served or the port is taken.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        check_engine(settings.engine)
        # Workers first: a process that is started after gRPC has threads is asking for trouble. They read and plan the
        # models while this process does.
        self._pool = WorkerPool(settings, wait=False)
        try:
            self.models = load_models(
                settings.bundles,
                settings.key_budget,
                exact=settings.exact,
                precision=settings.precision,
                engine=settings.engine,
            )
            self._store = KeyStore(settings.store, settings.store_limit_mb << 20, settings.upload_idle_hours * 3600)
            self._pool.wait_ready()
        except BaseException:
            self._pool.close()
            raise
        self._health = health.HealthServicer()
        # Threads only wait for workers and for the network: one for each request that may wait and for each stream, and
        # some for short calls. Beyond that gRPC refuses at once, so that nobody waits for a thread.
        count = settings.workers + settings.queue + settings.streams + _SHORT_CALLS
        threads = ThreadPoolExecutor(count, thread_name_prefix="rpc")
        self._server = grpc.server(threads, options=self._options(self.models), maximum_concurrent_rpcs=count)
        batchless = {
            name: why_no_batches(
                model, settings.engine, settings.threads, settings.worker_memory_mb, settings.batch_places
            )
            for name, model in self.models.items()
        }
        for name, why in batchless.items():
            if why:
                log.warning("no batches", model=name, why=why)
        for model in self.models.values():
            if settings.exact and not model.exact:
                log.warning("no exact evaluation", model=model.name, why=model.no_exact)
        self._servicer = InferenceServicer(self.models, self._store, self._pool, settings, batchless)
        pb_grpc.add_EncryptedInferenceServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = self._listen()

    def _options(self, models: dict[str, Model]) -> list[tuple[str, int]]:
        largest = max(model.largest_request for model in models.values()) + _ENVELOPE
        reply = max(model.largest_reply for model in models.values()) + _ENVELOPE
        return [
            # An encrypted image in one message, and nothing much larger; under BFV it may have several megabytes.
            ("grpc.max_receive_message_length", max(largest, _SMALLEST_LIMIT)),
            ("grpc.max_send_message_length", max(reply, _SMALLEST_LIMIT)),
            # A connection whose machine is gone is noticed by asking it; its streams then end and free their threads.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # Load balancers drop silent connections after some minutes; clients may ping a little more often.
            ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
            # Two services on one port would share requests but not keys.
            ("grpc.so_reuseport", 0),
        ]

    def _listen(self) -> int:
        address = f"{self.settings.host}:{self.settings.port}"
        try:
            if self.settings.tls_certificate and self.settings.tls_key:
                key, chain = self.settings.tls_key.read_bytes(), self.settings.tls_certificate.read_bytes()
                return int(self._server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)])))
            return int(self._server.add_insecure_port(address))
        except RuntimeError:
            self._pool.close()
            if self.settings.tls_certificate:
                raise HemacryptError(
                    f"cannot listen on {address} with certificate {self.settings.tls_certificate} and its key; "
                    "check that both are PEM and belong together, and that the address is free"
                ) from None
            raise HemacryptError(f"cannot listen on {address}; choose another --port or stop what uses it") from None

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        for name in ("", SERVICE_NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if not self.settings.loopback:
            # There is no authentication yet: whoever reaches the port may use the model.
            log.warning("open to the network", host=self.settings.host, tls=self.settings.tls_key is not None)
        log.info("ready", host=self.settings.host, port=self.port, models=list(self.models))

    def stop(self) -> None:
        """Refuse new requests, let running ones finish within the grace period, end the workers."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self.settings.grace_seconds).wait()
        self._pool.close()
        log.info("stopped")

    def run_until_told(self, when_ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; call ``when_ready`` once requests are answered."""
        told = threading.Event()

        def tell(number: int, frame: FrameType | None) -> None:
            told.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, tell)
        self.start()
        when_ready()
        told.wait()
        self.stop()
