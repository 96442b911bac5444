"""Fixtures of the service's tests: a small bundle that starts quickly, stored keys, a service inside this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from client_sdk import Client
from hemacrypt.embedded import bundle_path
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.preprocess import Preprocessing
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from service.server import Service
from service.settings import Settings

Until = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="session")
def until() -> Until:
    """Wait for a condition that must come true; only a test that fails anyway waits to the end."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logistic regression on 4x4 pixels called ``small``: degree 4096, ready within a second."""
    random = np.random.default_rng(5)
    network = CollapsedNetwork((3, 4, 4), (Dense(random.normal(size=(2, 48)) / 7, random.normal(size=2)),))
    preprocessing = Preprocessing(image_size=8, crop=8, block=2)
    bundle = Bundle.create(network, name="small", labels=("no", "yes"), preprocessing=preprocessing)
    directory = tmp_path_factory.mktemp("models") / "small"
    bundle.write(directory)
    return directory


@contextmanager
def serving(bundle: Path, directory: Path, **settings: Any) -> Iterator[tuple[Service, str]]:
    """Serve one bundle inside this process, with one worker and a store of its own; yield service and address."""
    places = {"store": directory / "store", "cache": directory / "cache"}
    service = Service(Settings(bundles=(bundle,), port=0, workers=1, grace_seconds=0, **places, **settings))
    service.start()
    try:
        yield service, f"127.0.0.1:{service.port}"
    finally:
        service.stop()


@dataclass(frozen=True)
class Keys:
    """The shared client's evaluation keys."""

    name: str
    blob: bytes

    def stored_below(self, directory: Path) -> Path:
        """Write the blob into a new directory and return the file."""
        directory.mkdir(parents=True)
        path = directory / "keys"
        path.write_bytes(self.blob)
        return path


@pytest.fixture(scope="session")
def keys(client: Client) -> Keys:
    return Keys(client.keys.info().key_set_id, client.keys.evaluation_blob())


@dataclass(frozen=True)
class Inside:
    """A service in this process, and a channel to it that never repeats a call."""

    service: Service
    channel: grpc.Channel
    stub: pb_grpc.EncryptedInferenceStub

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.service.port}"

    @property
    def worker(self) -> int:
        """Process id of the only worker."""
        (process,) = self.service._pool._processes
        return process._process.pid

    @property
    def pending(self) -> int:
        """Requests that have a worker or wait for one."""
        return self.service._pool._pending


@pytest.fixture(scope="module")
def inside(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """The embedded model, one worker, room for one waiting request, the shared client's keys registered."""
    store = tmp_path_factory.mktemp("inside") / "store"
    settings = Settings(
        bundles=(bundle_path(),), host="127.0.0.1", port=0, store=store, workers=1, queue=1, grace_seconds=0
    )
    service = Service(settings)
    service.start()
    try:
        target = f"127.0.0.1:{service.port}"
        with (
            grpc.insecure_channel(target, options=[("grpc.enable_retries", 0)]) as channel,
            Client(target, client.model, key_directory=client.keys.path) as registrar,
        ):
            registrar.register()
            yield Inside(service, channel, pb_grpc.EncryptedInferenceStub(channel))  # type: ignore[no-untyped-call]
    finally:
        service.stop()


@pytest.fixture(scope="session")
def image(client: Client) -> pb.PredictRequest:
    """A valid request of the shared client; it may be sent to every service that has its keys."""
    from hemacrypt.embedded import sample

    request, _ = client._request(client.plan, [sample()[0].path])
    return request
